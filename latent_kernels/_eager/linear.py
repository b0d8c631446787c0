"""Products with the LM head in float32, whatever the storage dtype, without a float32 copy of the whole head."""

from __future__ import annotations

import torch
from torch import Tensor

from latent_kernels.reference import compute_dtype

BLOCK_ROWS = 4096  # rows of the head in one product: bounds the float32 copy, and the buffer that MKL packs into


def _blocks(weight: Tensor) -> list[slice]:
    return [slice(start, start + BLOCK_ROWS) for start in range(0, len(weight), BLOCK_ROWS)]


def project(hidden: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """`hidden @ weight.T` [n, V] for hidden [n, D], weight [V, D]: float32, or float64 for float64 inputs.

    `out` [n, V] is written where it is given.
    """
    dtype = compute_dtype(hidden, weight)
    if out is None:
        out = torch.empty(len(hidden), len(weight), dtype=dtype, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        if weight.is_cuda and weight.dtype == dtype:
            return torch.mm(hidden.to(dtype), weight.T, out=out)
        if weight.is_cuda and hidden.dtype == weight.dtype:
            return torch.mm(hidden, weight.T, out_dtype=dtype, out=out)
        hidden = hidden.to(dtype)
        for part in _blocks(weight):
            torch.mm(hidden, weight[part].to(dtype).T, out=out[:, part])
        return out


def back_project(grad: Tensor, weight: Tensor) -> Tensor:
    """`grad @ weight` [n, D] for grad [n, V] in float32 or float64, accumulated in that dtype."""
    with torch.autocast(grad.device.type, enabled=False):
        if weight.dtype == grad.dtype:
            return grad @ weight
        out = torch.zeros(len(grad), weight.shape[1], dtype=grad.dtype, device=grad.device)
        for part in _blocks(weight):
            out.addmm_(grad[:, part], weight[part].to(grad.dtype))
        return out
