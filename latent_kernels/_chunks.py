"""How rows are cut into chunks of logits."""

from __future__ import annotations

import torch
from torch import Tensor

# Bytes of one chunk of logits. Fewer rows are slow to multiply: 196 rows of 128,256 float32 logits keep two CPU cores
# busy. A large GPU needs about 1,000 rows before the product with the head costs more than reading the head and writing
# the logits.
CHUNK_BYTES = 96 * 1024 * 1024
CUDA_CHUNK_BYTES = 512 * 1024 * 1024
TILE_ROWS = 128  # a larger chunk is a whole number of tiles of the GPU's matrix product
ALIGNMENT = 16  # elements: rows of logits start where wide loads and the library's fast products can


def chunk_bytes(device_type: str) -> int:
    """Return the bytes of one chunk of logits on devices of a type: "cuda" or any other."""
    return CUDA_CHUNK_BYTES if device_type == "cuda" else CHUNK_BYTES


def row_chunks(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> list[slice]:
    """Cut rows into slices of equal length (the last one may be shorter) whose logits fit `chunk_bytes`.

    A slice has at least one row, even if its logits do not fit.
    """
    size = max(1, chunk_bytes(device.type) // (vocab * dtype.itemsize))
    if device.type == "cuda" and size > TILE_ROWS:
        size -= size % TILE_ROWS
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def chunk_buffer(chunks: list[slice], vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate one buffer [n, V] for the logits of every chunk, so that no two chunks are ever alive."""
    rows = max((chunk.stop - chunk.start for chunk in chunks), default=0)
    return torch.empty(rows, -(-vocab // ALIGNMENT) * ALIGNMENT, dtype=dtype, device=device)[:, :vocab]


def dlogits_dtype(hidden: Tensor, lm_head: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which the gradient in the logits may be stored: that of hidden and head, if they share one.

    Otherwise it is `dtype`, that of the logits.
    """
    return lm_head.dtype if hidden.dtype == lm_head.dtype else dtype
