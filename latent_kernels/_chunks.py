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
# Bytes of one chunk of scaled exponentials (`latent_kernels._triton.scaled_exp`), half as wide as float32 logits: 1,024
# to 1,152 rows of common models. The float32 gradient of a trained head is read and written once per chunk, so chunks
# are larger there.
EXPS_BYTES = 352 * 1024 * 1024
EXPS_BYTES_TRAINED = 1024 * 1024 * 1024
ALIGNMENT = 16  # elements: rows of logits start where wide loads and the library's fast products can


def chunk_bytes(device_type: str, *, trained_head: bool = False) -> int:
    """Return the most bytes of one chunk of logits or exponentials on devices of a type: "cuda" or any other."""
    if device_type != "cuda":
        return CHUNK_BYTES
    return max(CUDA_CHUNK_BYTES, EXPS_BYTES_TRAINED) if trained_head else CUDA_CHUNK_BYTES


def row_chunks(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> list[slice]:
    """Cut rows into slices of equal length (the last one may be shorter) whose logits fit `chunk_bytes`.

    A slice has at least one row, even if its logits do not fit.
    """
    size = max(1, chunk_bytes(device.type) // (vocab * dtype.itemsize))
    if device.type == "cuda" and size > TILE_ROWS:
        size -= size % TILE_ROWS
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def exps_chunks(rows: int, row_bytes: int, width: int, device: torch.device, *, trained_head: bool) -> list[slice]:
    """Cut rows into slices whose scaled exponentials, `row_bytes` per row, fit the limit.

    On a GPU their number is that, of the upper half of those that fit, for which the tiles of the product with the head
    [V, width] that follows fill its multiprocessors best.
    """
    if device.type != "cuda":
        size = max(1, chunk_bytes(device.type) // row_bytes)
    else:
        limit = max(1, (EXPS_BYTES_TRAINED if trained_head else EXPS_BYTES) // row_bytes)
        size = fullest_waves(limit, width, multiprocessors(device))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def multiprocessors(device: torch.device) -> int:
    """Return how many programs a device runs at once; a few on a CPU, where Triton's interpreter runs them."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def fullest_waves(limit: int, width: int, count: int) -> int:
    """Return the number of rows, up to `limit`, whose tiles of [rows, width] fill `count` multiprocessors best."""
    if limit <= TILE_ROWS:
        return limit

    def used(size: int) -> float:
        tiles = size // TILE_ROWS * -(-width // TILE_ROWS)
        return round(tiles / (-(-tiles // count) * count), 3)

    sizes = [size for size in range(TILE_ROWS, limit + 1, TILE_ROWS) if size > limit // 2]
    return max(sizes, key=lambda size: (used(size), size))


def chunk_buffer(chunks: list[slice], vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate one buffer [n, V] for the logits of every chunk, so that no two chunks are ever alive."""
    rows = max((chunk.stop - chunk.start for chunk in chunks), default=0)
    return torch.empty(rows, -(-vocab // ALIGNMENT) * ALIGNMENT, dtype=dtype, device=device)[:, :vocab]


def dlogits_dtype(hidden: Tensor, lm_head: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which the gradient in the logits may be stored: that of hidden and head, if they share one.

    Otherwise it is `dtype`, that of the logits.
    """
    return lm_head.dtype if hidden.dtype == lm_head.dtype else dtype
