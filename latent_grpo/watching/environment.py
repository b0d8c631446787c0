"""Where figures were measured: device, threads and versions."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "latent-grpo")


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return the device's name, torch's threads, the platform and the versions of Python and of PACKAGES."""
    versions = {name.replace("-", "_"): package_version(name) for name in PACKAGES}
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **versions,
    }


def device_name(device: torch.device | str) -> str:
    """Return the name of a GPU, or of the processor for any other device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    # platform.processor() is empty or only "x86_64" on Linux, where /proc/cpuinfo has the model.
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def package_version(package: str) -> str | None:
    """Return the installed version of a package, None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
