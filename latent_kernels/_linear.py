"""Products with the LM head in float32, whatever the storage dtype, without a float32 copy of the whole head."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latent_kernels.reference import compute_dtype

BLOCK_ROWS = 4096  # rows of the head in one product: bounds the float32 copy, and the buffer that MKL packs into


def _blocks(weight: Tensor) -> list[slice]:
    return [slice(start, start + BLOCK_ROWS) for start in range(0, len(weight), BLOCK_ROWS)]


def _no_autocast(device: torch.device) -> Any:
    """Products in the dtype of their inputs. Entering autocast takes as long as a small product, so only if need be."""
    enabled = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if enabled else nullcontext()


def project(hidden: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """`hidden @ weight.T` [n, V] for hidden [n, D], weight [V, D]: float32, or float64 for float64 inputs.

    `out` [n, V] is written where it is given.
    """
    dtype = compute_dtype(hidden, weight)
    if out is None:
        if hidden.dtype == weight.dtype == dtype and len(weight) <= BLOCK_ROWS and not weight.is_cuda:
            with _no_autocast(hidden.device):
                return F.linear(hidden, weight)
        out = torch.empty(len(hidden), len(weight), dtype=dtype, device=hidden.device)
    with _no_autocast(hidden.device):
        if weight.is_cuda and weight.dtype == dtype:
            return torch.mm(hidden.to(dtype), weight.T, out=out)
        if weight.is_cuda and hidden.dtype == weight.dtype:
            return torch.mm(hidden, weight.T, out_dtype=dtype, out=out)
        hidden = hidden.to(dtype)
        for part in _blocks(weight):
            torch.mm(hidden, weight[part].to(dtype).T, out=out[:, part])
        return out


def back_project(slope: Tensor, weight: Tensor) -> Tensor:
    """`slope @ weight` [n, D] for slope [n, V]: accumulated and returned in float32, or float64 for float64 inputs."""
    dtype = compute_dtype(slope, weight)
    with _no_autocast(slope.device):
        if slope.dtype == weight.dtype == dtype:
            return slope @ weight
        if slope.is_cuda and slope.dtype == weight.dtype:
            return torch.mm(slope, weight, out_dtype=dtype)
        out = torch.zeros(len(slope), weight.shape[1], dtype=dtype, device=slope.device)
        for part in _blocks(weight):
            out.addmm_(slope[:, part].to(dtype), weight[part].to(dtype))
        return out


def add_outer_(out: Tensor, slope: Tensor, hidden: Tensor) -> None:
    """Adds `slope.T @ hidden` to out [V, D], float32 or float64, for slope [n, V] and hidden [n, D]."""
    with _no_autocast(out.device):
        if slope.is_cuda and slope.dtype == hidden.dtype != out.dtype:
            torch.addmm(out, slope.T, hidden, out_dtype=out.dtype, out=out)
            return
        hidden = hidden.to(out.dtype)
        for part in _blocks(out):
            out[part].addmm_(slope[:, part].T.to(out.dtype), hidden)
