"""Checks of arguments. Each error names the argument, the value given and what is expected.

No check reads the values of a tensor: on a GPU, that would make the host wait for the device.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from latent_kernels._noise import NOISE_KINDS
from latent_kernels._types import HeadOptions, NoiseSpec

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int64,)
FLOAT32_MAX = torch.finfo(torch.float32).max


def check_tensor(
    name: str,
    value: Any,
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype] | None = FLOATS,
    *,
    like: Tensor | None = None,
) -> None:
    """Check a tensor's shape (None: any size), its dtype (None: any) and that it is on the device of `like`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if _is_distributed(value):
        raise TypeError(
            f"{name} must be an ordinary tensor, got a DTensor; give {name}.full_tensor(), or call the operator inside "
            "the forward pass of the sharded module, where its parameters are whole"
        )
    sizes = tuple(value.shape)
    if len(sizes) != len(shape) or any(s is not None and s != got for s, got in zip(shape, sizes, strict=True)):
        expected = "[" + ", ".join("*" if size is None else str(size) for size in shape) + "]"
        raise ValueError(f"{name} must have shape {expected}, got {list(value.shape)}")
    if dtypes is not None and value.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(str(d) for d in dtypes)}, got {value.dtype}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, but the other inputs are on {like.device}")


def _is_distributed(value: Tensor) -> bool:
    """Tell whether a tensor is a DTensor. Whoever has one has imported its module, which not every platform has."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def check_range(name: str, value: Any, low: float, high: float = float("inf"), *, open_low: bool = False) -> None:
    """Check that a real number is in [low, high], or in (low, high] if `open_low`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    # Written so that NaN, for which every comparison is false, is refused.
    if not (low < value if open_low else low <= value) or not value <= high:
        raise ValueError(f"{name} must be in {'(' if open_low else '['}{low:g}, {high:g}], got {value}")


def check_row_range(
    name: str, value: Any, rows: int, like: Tensor, low: float, high: float = float("inf"), *, open_low: bool = False
) -> None:
    """Check a number in range, or a 0-d or [rows] float tensor, whose values are not read."""
    if isinstance(value, Tensor):
        check_tensor(name, value, [rows] if value.ndim else [], like=like)
    else:
        check_range(name, value, low, high, open_low=open_low)


def check_flag(name: str, value: Any) -> None:
    """Check that the value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Check that the value is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_head(head: HeadOptions, vocab: int, like: Tensor) -> None:
    """Check the options of an LM head of `vocab` tokens. A scale below 0 would make the likeliest token the rarest."""
    if head.bias is not None:
        check_tensor("bias", head.bias, [vocab], like=like)
    check_range("logit_scale", head.logit_scale, 0.0, FLOAT32_MAX, open_low=True)
    if head.softcap is not None:
        check_range("softcap", head.softcap, 0.0, FLOAT32_MAX, open_low=True)


def check_counter(name: str, value: Any, like: Tensor, rows: int | None = None) -> None:
    """Check an int of 64 bits or a 0-d int64 tensor; with `rows`, it may also be a tensor [rows]."""
    if isinstance(value, Tensor):
        check_tensor(name, value, [rows] if rows is not None and value.ndim else [], INTEGERS, like=like)
    elif isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int or a 0-d int64 tensor, got {type(value).__name__}")
    elif not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must be in [-2^63, 2^63), got {value}")


def check_noise(noise: NoiseSpec, rows: int, width: int, like: Tensor, *, step_per_row: bool = False) -> None:
    """Check the arguments that describe noise [rows, width]; with `step_per_row`, step may be [rows]."""
    check_choice("noise", noise.kind, NOISE_KINDS)
    check_row_range("noise_scale", noise.scale, rows, like, 0.0, FLOAT32_MAX)
    check_range("noise_delta", noise.delta, 0.0, FLOAT32_MAX)
    if noise.delta and noise.kind != "one_sided":
        raise ValueError(f"noise_delta needs noise='one_sided'; give noise_delta=0 with noise={noise.kind!r}")
    if noise.seed is not None:
        check_counter("seed", noise.seed, like)
    check_counter("step", noise.step, like, rows if step_per_row else None)
    if noise.row_ids is not None:
        check_tensor("row_ids", noise.row_ids, [rows], INTEGERS, like=like)
    if noise.exponential is not None:
        check_tensor("exponential", noise.exponential, [rows, width], like=like)
        if noise.seed is not None:
            raise ValueError("give either seed or exponential, not both")


def check_components(ids: Tensor, scores: Tensor, rows: int, like: Tensor) -> None:
    """Check the components of recorded steps: ids and scores, both [rows, K] with K at least 1."""
    check_tensor("ids", ids, [rows, None], INTEGERS, like=like)
    if ids.shape[1] == 0:
        raise ValueError(f"ids must have at least one component per row, got shape {list(ids.shape)}")
    check_tensor("scores", scores, list(ids.shape), like=like)
