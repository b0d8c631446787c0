"""The environment that figures were measured in: device, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import latent_kernels
from bench.harness.cases import dtype_name
from bench.harness.processes import REPOSITORY
from bench.harness.timing import Roofline
from latent_grpo.watching.environment import device_name, package_version


def environment(device: torch.device, dtype: torch.dtype, roofline: Roofline) -> dict[str, Any]:
    """Return the device, versions and commit that figures belong to, with the measured limits of the device."""
    # Not `latent_grpo.watching.environment.environment`, whose keys differ: saved results keep theirs.
    return {
        "device": device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "cpu_count": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "cuda": torch.version.cuda,
        "latent_kernels": latent_kernels.__version__,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "copy_gb_per_s": roofline.bytes_per_second / 1e9,
        "matmul_tflop_per_s": roofline.flops_per_second / 1e12,
        "matmul_dtype": dtype_name(dtype),
    }


def _commit() -> str | None:
    """Return the commit of the checkout, with `-dirty` if files differ from it. None outside a checkout."""
    top = _git("rev-parse", "--show-toplevel")
    # A copy without .git may lie inside another repository, whose commit would be the wrong one.
    if top is None or Path(top).resolve() != REPOSITORY:
        return None
    return _git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
