"""The only place that decides which implementation of an operator runs."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

IMPLS = ("auto", "triton", "eager")

MAX_TOP_K = 32  # mixture components that the latent-step kernel keeps
MAX_COMPONENTS = 128  # components per row that the log-prob kernel compares with each other

# The other kernels accumulate in float32. float64 serves gradient checks, which run eagerly.
FLOAT64_OPS: frozenset[str] = frozenset({"group_advantages"})


def triton_available() -> bool:
    """Tell whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Tell whether Triton runs kernels on CPU tensors (`TRITON_INTERPRET=1`, set before Triton is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes", "y")


def kernels_for(device: torch.device, top_k: int) -> bool:
    """Tell whether latent steps of `top_k` components on `device` run as kernels, which never wait for the host."""
    return device.type == "cuda" and triton_available() and top_k <= MAX_TOP_K


def on_input_device(operator: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Make an operator run on the GPU of its first tensor, because Triton launches kernels on the current GPU."""

    @functools.wraps(operator)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        first = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(first, Tensor) and first.is_cuda:
            with torch.cuda.device(first.device):
                return operator(*args, **kwargs)
        return operator(*args, **kwargs)

    return call


def components_limit(width: int) -> str | None:
    """Say that rows of `width` components exceed the limit of the log-prob kernel, or return None."""
    return f"scores at most {MAX_COMPONENTS} components per row, got {width}" if width > MAX_COMPONENTS else None


def resolve(op: str, impl: str, *tensors: Tensor, unsupported: str | None = None) -> str:
    """Return "triton" or "eager" for the operator `op` on the device of its inputs.

    unsupported: the limit of the kernel that these arguments exceed, as the end of a sentence, or None. Then "auto"
    chooses "eager". Raises ValueError for an unknown `impl`, and RuntimeError, naming the remedy, if an explicit choice
    cannot run.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    device = tensors[0].device
    dtypes_fit = op in FLOAT64_OPS or all(tensor.dtype != torch.float64 for tensor in tensors)
    if impl == "auto":
        fits = device.type == "cuda" and dtypes_fit and unsupported is None
        return "triton" if fits and triton_available() else "eager"
    if impl == "triton":
        if not triton_available():
            raise RuntimeError(f"impl='triton' for {op} needs Triton; `pip install triton` or use impl='auto'")
        if not dtypes_fit:
            raise RuntimeError(f"impl='triton' for {op} computes in float32, got torch.float64; use impl='auto'")
        if unsupported is not None:
            raise RuntimeError(f"impl='triton' for {op} {unsupported}; use impl='auto'")
        if device.type != "cuda" and not interpreting():
            raise RuntimeError(f"impl='triton' for {op} needs CUDA tensors, got {device}; use impl='auto'")
    return impl
