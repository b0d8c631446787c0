"""How rows are cut into chunks of logits."""

from __future__ import annotations

import torch
from torch import Tensor

# One chunk of logits. Fewer rows are slow to multiply: 196 of 128,256 in float32 keep two CPU cores busy, and a large
# GPU needs about 1,000 before the product with the head costs more than reading the head and writing the logits.
CHUNK_BYTES = 96 * 1024 * 1024


CUDA_CHUNK_BYTES = 512 * 1024 * 1024


TILE_ROWS = 128  # a larger chunk is whole tiles of the GPU's matrix product


ALIGNMENT = 16  # elements: rows of logits start where wide loads and the library's fast products may


def row_chunks(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> list[slice]:
    """Slices of equal length (the last shorter) whose logits take at most a chunk's bytes, or one row each."""
    on_gpu = device.type == "cuda"
    size = max(1, (CUDA_CHUNK_BYTES if on_gpu else CHUNK_BYTES) // (vocab * dtype.itemsize))
    if on_gpu and size > TILE_ROWS:
        size -= size % TILE_ROWS
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def chunk_buffer(chunks: list[slice], vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The one buffer [n, V] that every chunk's logits are written to, so that no two are ever alive."""
    rows = max((part.stop - part.start for part in chunks), default=0)
    return torch.empty(rows, -(-vocab // ALIGNMENT) * ALIGNMENT, dtype=dtype, device=device)[:, :vocab]


def slope_dtype(hidden: Tensor, lm_head: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What the slope of the log-probs may be stored in: the dtype of the product, or `dtype` where there are two."""
    return lm_head.dtype if hidden.dtype == lm_head.dtype else dtype
