"""Peak memory of a call."""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from bench.harness.cases import Parameters, Run
from bench.harness.timing import synchronize

REPO = Path(__file__).resolve().parents[2]


MEMORY_TIMEOUT = 1800


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
