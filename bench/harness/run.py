"""Runs benchmarks: checks each provider, then times it."""

from __future__ import annotations

import gc
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from bench.harness.cases import BARE, Operator, Parameters, Problem, Provider, Settings, Shape
from bench.harness.environment import dtype_name, environment
from bench.harness.memory import peak_extra_bytes, peak_extra_in_fresh_process
from bench.harness.report import Report, Row
from bench.harness.timing import Roofline, measure_roofline, quantile, time_alternating


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def gate(problem: Problem, provider: Provider) -> tuple[bool | None, str]:
    """Whether the provider's outputs are right (None: it could not run), and a remark."""
    if provider.unavailable is not None:
        return None, f"not available: {provider.unavailable}"
    try:
        fault = (provider.check or problem.check)((provider.checked or provider.run)())
    except Exception as error:
        # A provider that breaks is reported as one: the rest of the run must go on.
        if provider.optional or _out_of_memory(error):
            return None, f"not available: {_first_line(error)}"
        return False, f"failed: {_first_line(error)}"
    return fault is None, "" if fault is None else f"wrong, not timed: {fault}"


def _peak(operator: Operator, parameters: Parameters, provider: Provider, settings: Settings) -> tuple[int | None, str]:
    if not settings.memory:
        return None, ""
    if settings.device.type == "cuda":
        return peak_extra_bytes(provider.run, settings.device), ""
    if not operator.measure_memory:
        return None, ""
    try:
        dtype = dtype_name(settings.dtype)
        return peak_extra_in_fresh_process(operator.name, parameters, provider.name, dtype, settings.compile), ""
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return None, f"memory not measured: {_first_line(error)}"


def run_case(
    operator: Operator, shape: Shape, parameters: Parameters, settings: Settings, roofline: Roofline
) -> list[Row]:
    """Check, time and measure every provider of a case."""
    problem = operator.build(parameters, settings.device, settings.dtype, settings.compile)
    if settings.providers is not None:
        problem = replace(problem, providers=[p for p in problem.providers if p.name in settings.providers])
    if not problem.providers:
        return []
    verdicts = {provider.name: gate(problem, provider) for provider in problem.providers}
    right = {provider.name: provider for provider in problem.providers if verdicts[provider.name][0]}
    samples = time_alternating({name: p.run for name, p in right.items()}, settings.device, settings.repeats)
    base, bare = samples.get(operator.baseline), samples.get(BARE)
    floor = roofline.seconds(problem)
    rows = []
    for provider in problem.providers:
        correct, note = verdicts[provider.name]
        row = Row(operator.name, shape.name, provider.name, dtype_name(settings.dtype), parameters)
        if correct:
            times = samples[provider.name]
            row = replace(
                row,
                median_ms=statistics.median(times) * 1e3,
                p20=quantile(times, 0.2) * 1e3,
                p80=quantile(times, 0.8) * 1e3,
                samples=len(times),
                ratio=None if base is None else statistics.median(b / t for b, t in zip(base, times, strict=True)),
                over_matmul=None
                if bare is None
                else statistics.median(t / b for b, t in zip(bare, times, strict=True)),
                gb_per_s=problem.bytes_moved / statistics.median(times) / 1e9,
                roofline=floor / statistics.median(times),
            )
        rows.append(replace(row, correct=correct, note=note))
    names = list(right)
    if settings.device.type == "cpu":
        del problem, right, provider  # the fresh processes need the room
        gc.collect()
        measured = {name: _peak(operator, parameters, Provider(name, tuple), settings) for name in names}
    else:
        measured = {name: _peak(operator, parameters, right[name], settings) for name in names}
    for i, row in enumerate(rows):
        peak, remark = measured.get(row.provider, (None, ""))
        megabytes = None if peak is None else peak / 1e6
        rows[i] = replace(row, peak_extra_mb=megabytes, note="; ".join(filter(None, (row.note, remark))))
    return rows


def cases_of(operator: Operator, shape: Shape, settings: Settings) -> list[Parameters]:
    """The operator's cases; with the rows that the settings ask for, where its cases have rows."""
    found = operator.cases(shape, settings.device)
    if settings.rows is None:
        return found
    asked = [
        {**parameters, "rows": rows} if "rows" in parameters else parameters
        for parameters in found
        for rows in settings.rows
    ]
    return [parameters for i, parameters in enumerate(asked) if parameters not in asked[:i]]


def run_benchmarks(
    operators: Sequence[Operator],
    shapes: Sequence[Shape],
    settings: Settings,
    on_rows: Callable[[Report, list[Row]], None] = lambda report, rows: None,
) -> Report:
    """All cases of the operators on the shapes; `on_rows` sees the report so far and each case's rows as they come."""
    torch.manual_seed(0)
    roofline = measure_roofline(settings.device, settings.dtype)
    report = Report(environment(settings, roofline))
    for operator in operators:
        for shape in shapes:
            for parameters in cases_of(operator, shape, settings):
                rows = run_case(operator, shape, parameters, settings, roofline)
                report.rows.extend(rows)
                if rows:
                    on_rows(report, rows)
    return report
