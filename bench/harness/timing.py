"""Times of providers that take turns, and the limits of the device."""

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

SAMPLE_SECONDS = 2e-3  # a shorter call is repeated within one sample, so that the clock's grain does not show


CASE_SECONDS = 10.0  # all samples of a case, where --repeats is not given


MAX_INNER = 200


ROUNDS = (3, 30)


@dataclass(frozen=True)
class Roofline:
    """Measured limits of the device: bytes a second of a large copy, FLOP a second of a large matrix product."""

    bytes_per_second: float
    flops_per_second: float

    def seconds(self, problem: Problem) -> float:
        """The least time that the problem's bytes and FLOPs take."""
        return max(problem.bytes_moved / self.bytes_per_second, problem.flops / self.flops_per_second)


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
