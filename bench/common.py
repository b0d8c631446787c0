"""What the benchmarks share: shapes, timing, memory, the correctness gate, the roofline, and the report.

An operator's file gives an `Operator`: the cases of a shape, and a function that builds the inputs of a case together
with its providers and its check. A provider that fails the check is not timed.
"""

from __future__ import annotations

import csv
import functools
import gc
import importlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from latent_kernels import _backend

SCHEMA = 1
REPO = Path(__file__).resolve().parent.parent
BASELINE = "eager"  # the provider that ratios refer to
BARE = "matmul"  # the provider that is the matrix product alone
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

SAMPLE_SECONDS = 2e-3  # a shorter call is repeated within one sample, so that the clock's grain does not show
CASE_SECONDS = 10.0  # all samples of a case, where --repeats is not given
MAX_INNER = 200
ROUNDS = (3, 30)
MEMORY_TIMEOUT = 1800

Parameters = dict[str, Any]  # of a case: JSON values only, since the memory measurement sends them to another process
Outputs = tuple[Tensor, ...]
Run = Callable[[], Outputs]


class CaseError(ValueError):
    """Rows that an operator's case cannot have; the message names the remedy."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a model: hidden width D and vocabulary V."""

    name: str
    hidden: int
    vocab: int
    description: str


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", 64, 1003, "seconds on a CPU"),
        Shape("smollm2", 576, 49152, "SmolLM2-135M"),
        Shape("wide-vocab", 576, 128256, "SmolLM2's width with Llama's vocabulary"),
        Shape("llama-1b", 2048, 128256, "Llama-3.2-1B"),
        Shape("qwen-7b", 3584, 152064, "Qwen2.5-7B"),
    )
}


@dataclass(frozen=True)
class Provider:
    """One implementation of an operator on the inputs of a case.

    `run` is what is timed. `check` replaces the problem's where it is a part of the work only, as the bare product is.
    `checked` gives the outputs for the check where `run`'s own are random; by default `run`.
    `unavailable` says why it cannot run here. `optional` marks one whose failure to run is a remark, not an error.
    """

    name: str
    run: Run
    checked: Run | None = None
    check: Callable[[Outputs], str | None] | None = None
    unavailable: str | None = None
    optional: bool = False


@dataclass(frozen=True)
class Problem:
    """A case with its inputs allocated.

    `check` returns what is wrong with a provider's outputs, or None. `bytes_moved` and `flops` are the least that the
    operator can do, for the roofline.
    """

    providers: list[Provider]
    check: Callable[[Outputs], str | None]
    bytes_moved: int
    flops: int = 0


@dataclass(frozen=True)
class Operator:
    """A benchmark: `cases(shape, device)` and `build(parameters, device, dtype, compile)`.

    `baseline` is the provider that ratios refer to.

    `measure_memory`: measure peak memory on a CPU too, where it takes a fresh process for every provider.
    """

    name: str
    cases: Callable[[Shape, torch.device], list[Parameters]]
    build: Callable[[Parameters, torch.device, torch.dtype, bool], Problem]
    measure_memory: bool = False
    baseline: str = BASELINE


@dataclass(frozen=True)
class Row:
    """One line of the report. Times in milliseconds, memory in MB (10^6 bytes); None where there is no figure.

    ratio: the baseline's time over this provider's, the median over rounds. over_matmul: this provider's time over that
    of the bare matrix product, where a case has one. gb_per_s: the least bytes of the problem over the time. roofline:
    share of the faster of the two limits, copy bandwidth and matrix product, as measured on this device. correct: None
    where the provider did not run.
    """

    op: str
    shape: str
    provider: str
    dtype: str
    parameters: Parameters
    median_ms: float | None = None
    p20: float | None = None
    p80: float | None = None
    samples: int = 0
    peak_extra_mb: float | None = None
    ratio: float | None = None
    over_matmul: float | None = None
    gb_per_s: float | None = None
    roofline: float | None = None
    correct: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class Settings:
    """How to run: device, storage dtype, rounds (None: as many as fit a case's time), rows of the inputs (None: each
    operator's own), names of providers (None: all), and what to include."""

    device: torch.device
    dtype: torch.dtype
    repeats: int | None = None
    rows: tuple[int, ...] | None = None
    providers: tuple[str, ...] | None = None
    compile: bool = False
    memory: bool = True


@dataclass(frozen=True)
class Roofline:
    """Measured limits of the device: bytes a second of a large copy, FLOP a second of a large matrix product."""

    bytes_per_second: float
    flops_per_second: float

    def seconds(self, problem: Problem) -> float:
        """The least time that the problem's bytes and FLOPs take."""
        return max(problem.bytes_moved / self.bytes_per_second, problem.flops / self.flops_per_second)


@dataclass(frozen=True)
class Report:
    """The environment, and the rows measured in it."""

    environment: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    @property
    def wrong(self) -> list[Row]:
        """The rows whose provider failed the check."""
        return [row for row in self.rows if row.correct is False]


# Providers


def ours(make: Callable[[str], Provider], device: torch.device) -> list[Provider]:
    """Our implementations; `make(impl)` builds a provider, whose name is replaced."""
    triton = replace(make("triton"), name="ours-triton", unavailable=triton_unavailable(device))
    return [replace(make("eager"), name="ours-eager"), triton]


def triton_unavailable(device: torch.device) -> str | None:
    """Why `impl="triton"` cannot run on `device`, or None where it can."""
    if not _backend.triton_available():
        return "Triton is not installed"
    return None if device.type == "cuda" else "no CUDA device"


def compiled(
    make: Callable[[Callable[..., Any]], Provider], function: Callable[..., Any], wanted: bool
) -> list[Provider]:
    """`function` under torch.compile as a provider, compiled at its first call; none unless wanted."""
    if not wanted:
        return []
    return [replace(make(torch.compile(function, dynamic=False)), name="compile", optional=True)]


def compare(name: str, value: Tensor, expected: Tensor, tolerance: float) -> str | None:
    """What is wrong with a tensor whose error in norm, relative to `expected`, must be within `tolerance`; or None."""
    if value.shape != expected.shape:
        return f"{name} has shape {list(value.shape)}, expected {list(expected.shape)}"
    value, expected = value.detach().double(), expected.detach().double()
    error = (torch.linalg.vector_norm(value - expected) / torch.linalg.vector_norm(expected).clamp_min(1e-12)).item()
    return None if error <= tolerance else f"{name} is off by {error:.2g} in relative norm, more than {tolerance:g}"


def tolerance(dtype: torch.dtype) -> float:
    """Relative error in norm that a correct implementation stays within when inputs are stored in `dtype`."""
    return 1e-4 if dtype == torch.float32 else 5e-2


# Timing


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@functools.cache
def _flush_buffer(device: torch.device) -> Tensor:
    return torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device)


def time_once(run: Run, device: torch.device, inner: int = 1) -> float:
    """Seconds of one call. CUDA: by events, after overwriting the L2 cache. CPU: the mean of `inner` calls in a row."""
    if device.type == "cuda":
        _flush_buffer(device).zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3
    begin = time.perf_counter()
    for _ in range(inner):
        run()
    return (time.perf_counter() - begin) / inner


def time_alternating(runs: dict[str, Run], device: torch.device, repeats: int | None = None) -> dict[str, list[float]]:
    """Seconds of every provider in every round. Providers take turns, so that a disturbance meets all of them.

    The first call of each is a warm-up and tells how many calls make a sample and, without `repeats`, how many rounds.
    """
    inner, total = {}, 0.0
    for name, run in runs.items():
        seconds = time_once(run, device)
        seconds = min(seconds, time_once(run, device)) if seconds < 1.0 else seconds
        on_cpu = device.type == "cpu"
        inner[name] = min(MAX_INNER, max(1, math.ceil(SAMPLE_SECONDS / max(seconds, 1e-9)))) if on_cpu else 1
        total += seconds * inner[name]
    low, high = ROUNDS
    rounds = repeats if repeats is not None else max(low, min(high, int(CASE_SECONDS / max(total, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(rounds):
        first = turn % max(1, len(names))
        for name in names[first:] + names[:first]:
            samples[name].append(time_once(runs[name], device, inner[name]))
    return samples


def quantile(values: Sequence[float], q: float) -> float:
    """Quantile by linear interpolation."""
    return torch.quantile(torch.tensor(list(values), dtype=torch.float64), q).item()


def measure_roofline(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Copy bandwidth and matrix-product throughput of the device."""
    on_cpu = device.type == "cpu"
    source = torch.zeros(16 * 2**20 if on_cpu else 256 * 2**20, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    size = 1024 if on_cpu else 8192
    left, right = torch.randn(2, size, size, device=device).to(dtype).unbind()
    runs: dict[str, Run] = {"copy": lambda: (target.copy_(source),), "matmul": lambda: (left @ right,)}
    samples = time_alternating(runs, device, repeats=7)
    return Roofline(
        2 * source.numel() * source.element_size() / statistics.median(samples["copy"]),
        2 * size**3 / statistics.median(samples["matmul"]),
    )


# Memory


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def _reset_peak_resident() -> bool:
    """Set the process's peak resident memory back to what is resident now; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        _status_bytes("VmHWM")
    except OSError:
        return False
    return True


def peak_extra_bytes(run: Run, device: torch.device) -> int:
    """Peak memory during a call beyond what was held before it; what the call returns is included.

    CUDA: allocated memory. CPU: resident memory of this process, so memory that the allocator had kept from earlier
    calls does not count; measure in a fresh process. Where the peak cannot be reset (no /proc), only a rise over the
    process's highest peak so far shows.
    """
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    if _reset_peak_resident():
        before = _status_bytes("VmRSS")
        run()
        return max(0, _status_bytes("VmHWM") - before)
    resource = importlib.import_module("resource")
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit


def peak_extra_in_fresh_process(op: str, parameters: Parameters, provider: str, dtype: str, compile: bool) -> int:
    """`peak_extra_bytes` of a provider on the CPU, after a warm-up on the tiny shape, in a process of its own.

    Raises RuntimeError with the process's last line where it fails.
    """
    request = json.dumps(
        {
            "op": op,
            "parameters": parameters,
            "provider": provider,
            "dtype": dtype,
            "compile": compile,
            "threads": torch.get_num_threads(),
        }
    )
    path = os.pathsep.join(filter(None, (str(REPO), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", request],
        capture_output=True,
        text=True,
        timeout=MEMORY_TIMEOUT,
        env={**os.environ, "PYTHONPATH": path},
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return int(done.stdout.split()[-1])


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


# Running


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


# The report


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(REPO), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _commit() -> str | None:
    """The commit of the checkout that holds this file, `-dirty` where files differ from it; None outside one."""
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != REPO:
        return None
    return _git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _version(module: str) -> str | None:
    try:
        return str(importlib.import_module(module).__version__)
    except ImportError:
        return None


def environment(settings: Settings, roofline: Roofline) -> dict[str, Any]:
    """Where and on what the figures were taken."""
    return {
        "device": _device_name(settings.device),
        "device_type": settings.device.type,
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "cpu_count": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "latent_kernels": _version("latent_kernels"),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "copy_gb_per_s": roofline.bytes_per_second / 1e9,
        "matmul_tflop_per_s": roofline.flops_per_second / 1e12,
        "matmul_dtype": dtype_name(settings.dtype),
    }


def _figure(value: float | None, pattern: str = "{:.3g}") -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else pattern.format(value)


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """The rows of one case as a table."""
    head = rows[0]
    case = ", ".join(f"{name} {value}" for name, value in head.parameters.items())
    table = Table(title=f"{head.op}  {head.shape}  {head.dtype}  ({case})", title_justify="left")
    names = ("provider", "ms", "p20", "p80", "times eager", "over matmul", "GB/s", "roofline", "peak MB", "note")
    shown = [name for name in names if name != "over matmul" or any(row.over_matmul is not None for row in rows)]
    for name in shown:
        numeric = name not in ("provider", "note")
        table.add_column(name, justify="right" if numeric else "left", no_wrap=numeric)
    for row in rows:
        share = "-" if row.roofline is None else f"{row.roofline:.0%}"
        figures = [_figure(x) for x in (row.median_ms, row.p20, row.p80, row.ratio, row.over_matmul, row.gb_per_s)]
        cells = [row.provider, *figures, share, _figure(row.peak_extra_mb), row.note]
        table.add_row(*(cell for name, cell in zip(names, cells, strict=True) if name in shown))
    console.print(table)


def write_whole(path: Path, text: str) -> None:
    """Write a file such that a reader, or a run cut off, finds the old content or the new, never a part."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def write_json(report: Report, path: Path) -> None:
    """An object with the schema's number, the environment, and the rows, each with the fields of `Row`."""
    content = {"schema": SCHEMA, "environment": report.environment, "rows": [asdict(row) for row in report.rows]}
    write_whole(path, json.dumps(content, indent=1) + "\n")


def write_csv(report: Report, path: Path) -> None:
    """One line a row; the parameters as JSON, the environment's device, threads and commit repeated."""
    stamp = {name: report.environment[name] for name in ("device", "threads", "torch", "commit")}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*(f.name for f in fields(Row)), *stamp])
        writer.writeheader()
        for row in report.rows:
            writer.writerow({**asdict(row), "parameters": json.dumps(row.parameters), **stamp})
