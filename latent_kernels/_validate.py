"""Checks of arguments: each failure names the argument, what was given and what is wanted. None reads a tensor's
values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from latent_kernels._noise import NOISE_KINDS

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int64,)


def check_tensor(
    name: str,
    value: Any,
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype] | None = FLOATS,
    *,
    like: Tensor | None = None,
) -> None:
    """A tensor of `shape` (None is any size), one of `dtypes` (None is any), on the device of `like`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    wanted = "[" + ", ".join("*" if size is None else str(size) for size in shape) + "]"
    fits = value.ndim == len(shape) and all(s is None or s == got for s, got in zip(shape, value.shape, strict=True))
    if not fits:
        raise ValueError(f"{name} must have shape {wanted}, got {list(value.shape)}")
    if dtypes is not None and value.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(str(d) for d in dtypes)}, got {value.dtype}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, but the other inputs are on {like.device}")


def check_range(name: str, value: Any, low: float, high: float = float("inf"), *, open_low: bool = False) -> None:
    """A real number in [low, high], or in (low, high] where `open_low`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (low < value if open_low else low <= value) or not value <= high:
        raise ValueError(f"{name} must be in {'(' if open_low else '['}{low:g}, {high:g}], got {value}")


def check_row_range(
    name: str, value: Any, rows: int, like: Tensor, low: float, high: float = float("inf"), *, open_low: bool = False
) -> None:
    """A number in range, or a float tensor with one value a row (whose values are not read)."""
    if isinstance(value, Tensor):
        check_tensor(name, value, [rows] if value.ndim else [], like=like)
    else:
        check_range(name, value, low, high, open_low=open_low)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """One of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_noise(
    rows: int,
    width: int,
    like: Tensor,
    noise: str,
    noise_scale: float | Tensor,
    seed: int | Tensor | None,
    step: int | Tensor,
    row_ids: Tensor | None,
    exponential: Tensor | None,
    *,
    step_a_row: bool = False,
) -> None:
    """The arguments that describe a [rows, width] field of noise; `step_a_row` where step may be [rows]."""
    check_choice("noise", noise, NOISE_KINDS)
    check_row_range("noise_scale", noise_scale, rows, like, 0.0)
    for name, value in (("seed", seed), ("step", step)):
        if isinstance(value, Tensor):
            a_row = name == "step" and step_a_row and value.ndim > 0
            check_tensor(name, value, [rows] if a_row else [], INTEGERS, like=like)
        elif value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name} must be an int or a 0-d int64 tensor, got {type(value).__name__}")
    if row_ids is not None:
        check_tensor("row_ids", row_ids, [rows], INTEGERS, like=like)
    if exponential is not None:
        check_tensor("exponential", exponential, [rows, width], like=like)
        if seed is not None:
            raise ValueError("give either seed or exponential, not both")


def check_rows(ids: Tensor, scores: Tensor, rows: int, like: Tensor) -> None:
    """The components ids, scores [rows, K] of a trajectory."""
    check_tensor("ids", ids, [rows, None], INTEGERS, like=like)
    if ids.shape[1] == 0:
        raise ValueError("ids must have at least one component a row, got shape " + str(list(ids.shape)))
    check_tensor("scores", scores, list(ids.shape), like=like)
