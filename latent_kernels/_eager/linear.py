"""Products with the LM head in float32, whatever the storage dtype, without a float32 copy of the whole head."""

from __future__ import annotations

import torch
from torch import Tensor

from latent_kernels.reference import compute_dtype

BLOCK_ELEMENTS = 4 * 1024 * 1024  # elements of the head that are alive in float32 at a time


def _blocks(weight: Tensor) -> range:
    return range(0, len(weight), max(1, BLOCK_ELEMENTS // max(1, weight.shape[1])))


def project(hidden: Tensor, weight: Tensor) -> Tensor:
    """`hidden @ weight.T` [n, V] for hidden [n, D], weight [V, D]: float32, or float64 for float64 inputs."""
    dtype = compute_dtype(hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):
        if weight.dtype == dtype:
            return hidden.to(dtype) @ weight.T
        if weight.is_cuda and hidden.dtype == weight.dtype:
            return torch.mm(hidden, weight.T, out_dtype=dtype)
        out = torch.empty(len(hidden), len(weight), dtype=dtype, device=hidden.device)
        hidden = hidden.to(dtype)
        for start in (blocks := _blocks(weight)):
            part = slice(start, start + blocks.step)
            out[:, part] = hidden @ weight[part].to(dtype).T
        return out


def back_project(grad: Tensor, weight: Tensor) -> Tensor:
    """`grad @ weight` [n, D] for grad [n, V] in float32 or float64, accumulated in that dtype."""
    with torch.autocast(grad.device.type, enabled=False):
        if weight.dtype == grad.dtype:
            return grad @ weight
        out = torch.zeros(len(grad), weight.shape[1], dtype=grad.dtype, device=grad.device)
        for start in (blocks := _blocks(weight)):
            part = slice(start, start + blocks.step)
            out.addmm_(grad[:, part], weight[part].to(grad.dtype))
        return out
