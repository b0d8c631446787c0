"""Peak memory of a call, and the memory that is free."""

from __future__ import annotations

import gc
import importlib
import json
import sys
from pathlib import Path

import torch

from bench.harness.cases import Parameters, Run
from bench.harness.processes import printed_integer
from bench.harness.timing import synchronize

TIMEOUT = 1800  # seconds for one measurement in a fresh process


def peak_extra_in_fresh_process(op: str, parameters: Parameters, provider: str, dtype: str, compile: bool) -> int:
    """Return `peak_extra_bytes` of a provider on the CPU, measured in a process of its own.

    `bench.harness.fresh_process` is the program. It first warms up on the tiny shape. Raises RuntimeError with the last
    line of the process if it fails.
    """
    request = {
        "op": op,
        "parameters": parameters,
        "provider": provider,
        "dtype": dtype,
        "compile": compile,
        "threads": torch.get_num_threads(),
    }
    return printed_integer("bench.harness.fresh_process", json.dumps(request), timeout=TIMEOUT)


def peak_extra_bytes(run: Run, device: torch.device) -> int:
    """Return the peak memory in bytes during a call, beyond the memory held before it.

    The memory of the returned tensors is included.
    CUDA: allocated memory. CPU: resident memory of this process. Memory that the allocator kept from earlier calls does
    not count there, so measure in a fresh process. Without /proc the peak cannot be reset: then only a rise over the
    highest peak of the process so far shows.
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
    resource = importlib.import_module("resource")  # not on Windows, where `import resource` at the top would fail
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit


def _reset_peak_resident() -> bool:
    """Set the peak resident memory of the process back to the current one. Return False if the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        _status_bytes("VmHWM")
    except OSError:
        return False
    return True


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that can still be allocated, or None if the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
