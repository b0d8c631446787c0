"""The environment that figures were measured in: device, versions, commit."""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from bench.harness.cases import Settings
from bench.harness.memory import REPO
from bench.harness.timing import Roofline


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
