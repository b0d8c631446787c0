"""Products with the LM head, accumulated in float32 whatever the storage dtype, without a float32 copy of the head.

The options of a head (bias, scale, soft cap) are applied to the product in place.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latent_kernels._types import HeadOptions
from latent_kernels.reference.latent_step import compute_dtype

BLOCK_ROWS = 4096  # rows of the head per product: bounds the float32 copy and the buffer that MKL packs into


def _blocks(weight: Tensor) -> list[slice]:
    """Cut the rows of a weight into slices of BLOCK_ROWS."""
    return [slice(start, start + BLOCK_ROWS) for start in range(0, len(weight), BLOCK_ROWS)]


def no_autocast(device: torch.device) -> Any:
    """Disable autocast. It is entered only if it is enabled, because entering takes as long as a small product."""
    enabled = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if enabled else nullcontext()


def project(hidden: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Return `hidden @ weight.T` [n, V] for hidden [n, D] and weight [V, D]: float32, or float64 for float64 inputs.

    If `out` [n, V] is given, the result is written to it.
    """
    dtype = compute_dtype(hidden, weight)
    if out is None:
        if hidden.dtype == weight.dtype == dtype and len(weight) <= BLOCK_ROWS and not weight.is_cuda:
            with no_autocast(hidden.device):
                return F.linear(hidden, weight)
        out = torch.empty(len(hidden), len(weight), dtype=dtype, device=hidden.device)
    with no_autocast(hidden.device):
        if weight.is_cuda and weight.dtype == dtype:
            return torch.mm(hidden.to(dtype), weight.T, out=out)
        # Only CUDA multiplies 16-bit operands into a float32 result.
        if weight.is_cuda and hidden.dtype == weight.dtype:
            return torch.mm(hidden, weight.T, out_dtype=dtype, out=out)
        hidden = hidden.to(dtype)
        for block in _blocks(weight):
            torch.mm(hidden, weight[block].to(dtype).T, out=out[:, block])
        return out


def head_logits_(product: Tensor, head: HeadOptions) -> Tensor:
    """Turn the product with the LM head [n, V] into logits in place, and return it."""
    if head.bias is not None:
        product.add_(head.bias)
    if head.logit_scale != 1.0:
        product.mul_(head.logit_scale)
    if head.softcap is not None:
        product.div_(head.softcap).tanh_().mul_(head.softcap)
    return product


def softcap_slope(logits: Tensor, softcap: float) -> Tensor:
    """Return the derivative of capped logits, of any shape, in what they were before the cap: 1 - (z / softcap)^2."""
    return (logits / softcap).square_().neg_().add_(1.0)


def back_project(dlogits: Tensor, weight: Tensor, factor: Tensor | None = None) -> Tensor:
    """Return `factor * (dlogits @ weight)` [n, D] for dlogits [n, V]: float32, or float64 for float64 inputs.

    factor is [n]; None stands for 1.
    """
    out = _back_project(dlogits, weight)
    return out if factor is None else out.mul_(factor.unsqueeze(-1))


def _back_project(dlogits: Tensor, weight: Tensor) -> Tensor:
    """Return `dlogits @ weight`."""
    dtype = compute_dtype(dlogits, weight)
    with no_autocast(dlogits.device):
        if dlogits.dtype == weight.dtype == dtype:
            return dlogits @ weight
        if dlogits.is_cuda and dlogits.dtype == weight.dtype:
            return torch.mm(dlogits, weight, out_dtype=dtype)
        out = torch.zeros(len(dlogits), weight.shape[1], dtype=dtype, device=dlogits.device)
        for block in _blocks(weight):
            out.addmm_(dlogits[:, block].to(dtype), weight[block].to(dtype))
        return out


def add_outer_(
    out: Tensor, dlogits: Tensor, hidden: Tensor, factor: Tensor | None = None, *, fresh: bool = False
) -> None:
    """Add `dlogits.T @ (factor * hidden)` to out [V, D], float32 or float64.

    dlogits is [n, V], hidden [n, D], and factor [n]; None stands for 1. A `fresh` out holds nothing yet, and is not
    read.
    """
    beta = 0.0 if fresh else 1.0
    if factor is not None:
        hidden = hidden * factor.unsqueeze(-1)
    with no_autocast(out.device):
        if dlogits.dtype == torch.float16:
            _add_float16_outer_(out.zero_() if fresh else out, dlogits, hidden)
            return
        hidden = hidden.to(dlogits.dtype)
        # 16-bit operands, accumulated in float32 over the chunks.
        if dlogits.is_cuda and dlogits.dtype != out.dtype:
            torch.addmm(out, dlogits.T, hidden, out_dtype=out.dtype, beta=beta, out=out)
            return
        hidden = hidden.to(out.dtype)
        for block in _blocks(out):
            out[block].addmm_(dlogits[:, block].T.to(out.dtype), hidden, beta=beta)


def _add_float16_outer_(out: Tensor, dlogits: Tensor, hidden: Tensor) -> None:
    """Add `dlogits.T @ hidden` for float16 dlogits and a hidden whose numbers may lie outside the range of float16.

    The largest number of hidden becomes 2^14, and its scale is applied to the float32 products. It stays on the device,
    where no product takes it as a factor: so the products of a block are added in a second step.
    """
    scale = hidden.abs().amax().to(out.dtype).clamp_min(1e-30) * 2.0**-14
    hidden = (hidden / scale).to(torch.float16)
    for block in _blocks(out):
        out[block].addcmul_(_wide_mm(dlogits[:, block].T, hidden, out.dtype), scale)


def _wide_mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `a @ b` in `dtype` for operands of one 16-bit dtype."""
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else a.to(dtype) @ b.to(dtype)


def add_rows_(out: Tensor, dlogits: Tensor, factor: Tensor | None) -> None:
    """Add `factor @ dlogits` to out [V], float32 or float64, for dlogits [n, V] and factor [n]; None stands for 1."""
    factor = out.new_ones(len(dlogits)) if factor is None else factor.to(out.dtype)
    for block in [slice(None)] if dlogits.dtype == out.dtype else _blocks(out):  # no copy of a whole chunk
        out[block].addmv_(dlogits[:, block].T.to(out.dtype), factor)
