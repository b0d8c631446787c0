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

MAX_TOP_K = 32  # mixture components that the kernel of the latent step keeps
MAX_COMPONENTS = 128  # components of a trajectory's row that the kernel of the log-prob compares with each other

# Other kernels accumulate in float32; float64 is for gradient checks, and eager.
FLOAT64_OPS: frozenset[str] = frozenset({"group_advantages"})


def triton_available() -> bool:
    """Whether Triton can be imported here."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton runs kernels on CPU tensors (`TRITON_INTERPRET=1`, set before Triton is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes", "y")


def kernels_for(device: torch.device, top_k: int) -> bool:
    """Whether latent steps of `top_k` components on `device` run as kernels, which never wait for the host."""
    return device.type == "cuda" and triton_available() and top_k <= MAX_TOP_K


def on_its_device(operator: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The operator, run with its first tensor's GPU as the current one: Triton launches on the current one."""

    @functools.wraps(operator)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        first = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(first, Tensor) and first.is_cuda:
            with torch.cuda.device(first.device):
                return operator(*args, **kwargs)
        return operator(*args, **kwargs)

    return call


def beyond_components(width: int) -> str | None:
    """What the kernels of the log-prob cannot take: rows of more than MAX_COMPONENTS components."""
    return f"scores at most {MAX_COMPONENTS} components a row, got {width}" if width > MAX_COMPONENTS else None


def resolve(op: str, impl: str, *tensors: Tensor, beyond: str | None = None) -> str:
    """`"triton"` or `"eager"` for operator `op` on the device of its inputs; `beyond` says what its kernel cannot take.

    Raises ValueError for an unknown `impl`, RuntimeError (naming the remedy) where an explicit choice cannot run.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    device = tensors[0].device
    kernel_dtype = op in FLOAT64_OPS or all(tensor.dtype != torch.float64 for tensor in tensors)
    if impl == "auto":
        fits = device.type == "cuda" and kernel_dtype and beyond is None
        return "triton" if fits and triton_available() else "eager"
    if impl == "triton":
        if not triton_available():
            raise RuntimeError(f"impl='triton' for {op} needs Triton; `pip install triton` or use impl='auto'")
        if not kernel_dtype:
            raise RuntimeError(f"impl='triton' for {op} computes in float32, got torch.float64; use impl='auto'")
        if beyond is not None:
            raise RuntimeError(f"impl='triton' for {op} {beyond}; use impl='auto'")
        if device.type != "cuda" and not interpreting():
            raise RuntimeError(f"impl='triton' for {op} needs CUDA tensors, got {device}; use impl='auto'")
    return impl
