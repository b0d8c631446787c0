"""Operators with `impl="triton"` as the tests call them: compiled for CUDA tensors, interpreted for CPU tensors."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
SLOW_IF_INTERPRETED = [pytest.mark.slow] if DEVICE == "cpu" else []  # a GPU runs the same test in no time
POISON = 0x5A5A5A5A  # neither an id nor a count

_empty, _empty_like = torch.empty, torch.empty_like


def poisoned(tensor: Tensor) -> Tensor:
    """Fill the tensor with a value that no result may hold, NaN or a large number, and return it."""
    if not tensor.is_floating_point():
        return tensor.fill_(POISON)
    return tensor.fill_(torch.nan)


def moved(value: Any, device: str | torch.device) -> Any:
    """Return tensors, and tensors in tuples, on another device; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        items = (moved(item, device) for item in value)
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


@functools.cache
def kernel(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Return the operator's kernel for CPU arguments and results; whatever it allocates starts as NaN.

    So an element that the kernel forgets to write shows.
    """

    @functools.wraps(operator)
    def run(*arguments: Any, **options: Any) -> Any:
        arguments, options = moved(arguments, DEVICE), {name: moved(x, DEVICE) for name, x in options.items()}
        with (
            mock.patch("torch.empty", lambda *a, **k: poisoned(_empty(*a, **k))),
            mock.patch("torch.empty_like", lambda *a, **k: poisoned(_empty_like(*a, **k))),
        ):
            return moved(operator(*arguments, **options, impl="triton"), "cpu")

    run.precision = torch.float32
    return run


def precision(operator: Callable[..., Any]) -> torch.dtype:
    """Return the widest dtype that an operator computes in: float64, or float32 for a kernel."""
    return getattr(operator, "precision", torch.float64)


def narrowed(value: Any, dtype: torch.dtype) -> Any:
    """Return float tensors in a dict or a named tuple in `dtype`; anything else as it is."""
    if isinstance(value, dict):
        return {name: narrowed(item, dtype) for name, item in value.items()}
    if isinstance(value, tuple):
        return type(value)(*(narrowed(item, dtype) for item in value))
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def with_kernel(operator: Callable[..., Any], *others: Any) -> pytest.MarkDecorator:
    """Run a test with `operator` as the public operator, with the others (the reference), and with the kernel."""
    names = ["public", *("reference" for _ in others), "triton"]
    return pytest.mark.parametrize(
        "operator", [operator, *others, pytest.param(kernel(operator), marks=NEEDS_TRITON)], ids=names
    )
