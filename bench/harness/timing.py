"""Times of providers that take turns, and the measured limits of the device."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.harness.cases import Problem, Run

CASE_SECONDS = 10.0  # time for all samples of a case, unless --repeats is given
ROUNDS = (3, 30)  # fewest and most rounds of a case, whatever CASE_SECONDS allows
SAMPLE_SECONDS = 2e-3  # a shorter call is repeated within one sample, because the clock's resolution would show
MAX_INNER = 200  # most calls per sample


@dataclass(frozen=True)
class Roofline:
    """Measured limits of the device: bytes per second of a large copy, FLOP per second of a large matrix product."""

    bytes_per_second: float
    flops_per_second: float

    def seconds(self, problem: Problem) -> float:
        """Return the least time that the bytes and FLOPs of a problem take."""
        return max(problem.bytes_moved / self.bytes_per_second, problem.flops / self.flops_per_second)


def measure_roofline(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Measure copy bandwidth and matrix-product throughput of the device."""
    on_cpu = device.type == "cpu"
    # 64 MiB on a CPU, 1 GiB on a GPU: larger than the caches, so that the copy measures memory.
    source = torch.zeros(16 * 2**20 if on_cpu else 256 * 2**20, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    size = 1024 if on_cpu else 8192
    left, right = torch.randn(2, size, size, device=device).to(dtype).unbind()
    runs: dict[str, Run] = {"copy": lambda: (target.copy_(source),), "matmul": lambda: (left @ right,)}
    samples = time_alternating(runs, device, repeats=7)
    return Roofline(
        # A copy reads and writes every byte.
        2 * source.numel() * source.element_size() / statistics.median(samples["copy"]),
        2 * size**3 / statistics.median(samples["matmul"]),
    )


def time_alternating(runs: dict[str, Run], device: torch.device, repeats: int | None = None) -> dict[str, list[float]]:
    """Return the seconds of every provider in every round.

    Providers take turns, so that a disturbance of the machine meets all of them. The first call of each provider is a
    warm-up. It also tells how many calls make a sample and, without `repeats`, how many rounds fit into CASE_SECONDS.
    """
    inner, total = {}, 0.0
    for name, run in runs.items():
        seconds = time_once(run, device)
        # The first call may load code. A second one corrects the estimate, unless it would take long itself.
        seconds = min(seconds, time_once(run, device)) if seconds < 1.0 else seconds
        inner[name] = _calls_per_sample(seconds, device)
        total += seconds * inner[name]
    fewest, most = ROUNDS
    rounds = repeats if repeats is not None else max(fewest, min(most, int(CASE_SECONDS / max(total, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(rounds):
        # Every round begins with another provider, so that none always runs after the same one.
        first = turn % max(1, len(names))
        for name in names[first:] + names[:first]:
            samples[name].append(time_once(runs[name], device, inner[name]))
    return samples


def _calls_per_sample(seconds: float, device: torch.device) -> int:
    if device.type != "cpu":
        return 1  # events of the device time a single call well enough
    return min(MAX_INNER, max(1, math.ceil(SAMPLE_SECONDS / max(seconds, 1e-9))))


def time_once(run: Run, device: torch.device, inner: int = 1) -> float:
    """Return the seconds of one call.

    CUDA: measured by events, after the L2 cache was overwritten. CPU: the mean of `inner` calls in a row.
    """
    if device.type == "cuda":
        # In training other work runs between two calls, so inputs are not in the cache.
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


@functools.cache
def _flush_buffer(device: torch.device) -> Tensor:
    return torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def quantile(values: Sequence[float], q: float) -> float:
    """Return the quantile by linear interpolation."""
    return torch.quantile(torch.tensor(list(values), dtype=torch.float64), q).item()
