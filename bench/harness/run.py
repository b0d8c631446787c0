"""Runs benchmarks: check every provider, then time it, then measure its memory."""

from __future__ import annotations

import gc
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from bench.harness.cases import BARE_PRODUCT, Operator, Parameters, Problem, Provider, Shape, dtype_name
from bench.harness.environment import environment
from bench.harness.memory import peak_extra_bytes, peak_extra_in_fresh_process
from bench.harness.report import Report, Row
from bench.harness.timing import Roofline, measure_roofline, quantile, time_alternating


@dataclass(frozen=True)
class Settings:
    """How to run benchmarks.

    repeats: rounds per case. None: as many as fit the time of a case.
    rows: rows of the inputs. None: those of each operator.
    providers: names of the providers to run. None: all.
    compile: also time torch.compile.
    memory: measure peak memory.
    """

    device: torch.device
    dtype: torch.dtype
    repeats: int | None = None
    rows: tuple[int, ...] | None = None
    providers: tuple[str, ...] | None = None
    compile: bool = False
    memory: bool = True


def run_benchmarks(
    operators: Sequence[Operator],
    shapes: Sequence[Shape],
    settings: Settings,
    on_rows: Callable[[Report, list[Row]], None] = lambda report, rows: None,
) -> Report:
    """Run all cases of the operators on the shapes.

    `on_rows(report, rows)` is called after each case with the report so far and the rows of the case.
    """
    torch.manual_seed(0)
    roofline = measure_roofline(settings.device, settings.dtype)
    report = Report(environment(settings.device, settings.dtype, roofline))
    for operator in operators:
        for shape in shapes:
            for parameters in cases_of(operator, shape, settings):
                rows = run_case(operator, shape, parameters, settings, roofline)
                report.rows.extend(rows)
                if rows:
                    on_rows(report, rows)
    return report


def cases_of(operator: Operator, shape: Shape, settings: Settings) -> list[Parameters]:
    """Return the cases of an operator. `settings.rows` replaces the rows of every case that has rows."""
    cases = operator.cases(shape, settings.device)
    if settings.rows is None:
        return cases
    replaced = [
        {**parameters, "rows": rows} if "rows" in parameters else parameters
        for parameters in cases
        for rows in settings.rows
    ]
    # Cases that differed only in their rows are now the same, and so are the repeated cases without rows.
    return [parameters for i, parameters in enumerate(replaced) if parameters not in replaced[:i]]


def run_case(
    operator: Operator, shape: Shape, parameters: Parameters, settings: Settings, roofline: Roofline
) -> list[Row]:
    """Check, time and measure every provider of a case; return one row per provider."""
    rows = _check_and_time(operator, shape, parameters, settings, roofline)
    if not settings.memory or not operator.measure_memory or settings.device.type != "cpu":
        return rows
    # Fresh processes allocate the inputs again. Free those of this process first, the ones in reference cycles too.
    gc.collect()
    return [_with_peak_of_fresh_process(row, settings.compile) if row.correct else row for row in rows]


def _check_and_time(
    operator: Operator, shape: Shape, parameters: Parameters, settings: Settings, roofline: Roofline
) -> list[Row]:
    """Return the rows of a case with times and, on CUDA, memory."""
    problem = operator.build(parameters, settings.device, settings.dtype, settings.compile)
    providers = [p for p in problem.providers if settings.providers is None or p.name in settings.providers]
    verdicts = {provider.name: gate(problem, provider) for provider in providers}
    runs = {provider.name: provider.run for provider in providers if verdicts[provider.name][0]}
    samples = time_alternating(runs, settings.device, settings.repeats)
    rows = []
    for provider in providers:
        correct, note = verdicts[provider.name]
        row = Row(operator.name, shape.name, provider.name, dtype_name(settings.dtype), parameters)
        row = replace(row, correct=correct, note=note)
        if correct:
            row = _with_times(row, samples, operator.baseline, problem, roofline)
        if correct and settings.memory and settings.device.type == "cuda":
            row = replace(row, peak_extra_mb=peak_extra_bytes(provider.run, settings.device) / 1e6)
        rows.append(row)
    return rows


def gate(problem: Problem, provider: Provider) -> tuple[bool | None, str]:
    """Return whether the outputs of a provider are right (None: it could not run), and a remark."""
    if provider.unavailable is not None:
        return None, f"not available: {provider.unavailable}"
    try:
        fault = (provider.check or problem.check)((provider.checked or provider.run)())
    except Exception as error:
        # Report a provider that raises as a fault. The rest of the run must go on.
        if provider.optional or _out_of_memory(error):
            return None, f"not available: {_error_line(error)}"
        return False, f"failed: {_error_line(error)}"
    return fault is None, "" if fault is None else f"wrong, not timed: {fault}"


def _out_of_memory(error: Exception) -> bool:
    # A CPU allocation that fails raises a RuntimeError, which only its text tells from others.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _error_line(error: BaseException) -> str:
    # Unlike `latent_grpo.errors.first_line`, this also names the type.
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _with_times(row: Row, samples: dict[str, list[float]], baseline: str, problem: Problem, roofline: Roofline) -> Row:
    times = samples[row.provider]
    median = statistics.median(times)
    return replace(
        row,
        median_ms=median * 1e3,
        p20=quantile(times, 0.2) * 1e3,
        p80=quantile(times, 0.8) * 1e3,
        samples=len(times),
        ratio=_median_ratio(samples.get(baseline), times),
        over_matmul=_median_ratio(times, samples.get(BARE_PRODUCT)),
        gb_per_s=problem.bytes_moved / median / 1e9,
        roofline=roofline.seconds(problem) / median,
    )


def _median_ratio(numerator: list[float] | None, denominator: list[float] | None) -> float | None:
    """Return the median over rounds of the ratio of two providers' times; None if one of them was not timed."""
    if numerator is None or denominator is None:
        return None
    # Ratios within a round: a disturbance that lasts longer than a round cancels.
    return statistics.median(n / d for n, d in zip(numerator, denominator, strict=True))


def _with_peak_of_fresh_process(row: Row, compile: bool) -> Row:
    try:
        peak = peak_extra_in_fresh_process(row.op, row.parameters, row.provider, row.dtype, compile)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        remark = f"memory not measured: {_error_line(error)}"
        return replace(row, note="; ".join(filter(None, (row.note, remark))))
    return replace(row, peak_extra_mb=peak / 1e6)
