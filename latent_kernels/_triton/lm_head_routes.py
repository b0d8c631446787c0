"""Which way the LM head is multiplied: our product with the sidecar in its epilogue, or PyTorch's product and a pass.

The choice is a table by the number of rows, `lm_head_routes.json`, which `python -m bench.routes` writes from
measurements. Nothing is tuned while a user waits. With `LATENT_KERNELS_AUTOTUNE=1`, the first step of each bucket of
row counts times every candidate on its own tensors.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch import Tensor

from latent_kernels._triton.lm_head import ProductConfig

TABLE = Path(__file__).with_name("lm_head_routes.json")
BUCKETS = (16, 32, 64, 128, 256, 512, 1024)  # largest number of rows; more rows take the route of the last

# All tiles fit the 99 KB of shared memory of consumer GPUs since Ampere, and none spills
# (tests/kernels/test_kernel_builds.py).
PRODUCTS = (
    ProductConfig(block_b=16, block_d=64, num_warps=4, num_stages=4),
    ProductConfig(block_b=32, block_d=64, num_warps=4, num_stages=4),
    ProductConfig(block_b=64, block_d=64, num_warps=4, num_stages=4),
    ProductConfig(block_b=128, block_d=64, num_warps=8, num_stages=3),
)
Route = ProductConfig | None  # None: PyTorch's product


def bucket(rows: int) -> int:
    """Return the bucket of a number of rows."""
    return next((limit for limit in BUCKETS if rows <= limit), BUCKETS[-1])


def candidates(rows: int) -> list[Route]:
    """Return the routes that may be the fastest for a number of rows: tiles not much larger, and PyTorch's product."""
    narrowest = min(bucket(rows), PRODUCTS[-1].block_b)
    return [*(config for config in PRODUCTS if narrowest // 2 <= config.block_b <= narrowest), None]


@functools.cache
def table() -> dict[int, Route]:
    """Return the measured route of each bucket."""
    stored = json.loads(TABLE.read_text())["routes"]
    return {int(rows): None if route is None else ProductConfig(**route) for rows, route in stored.items()}


def fits(hidden: Tensor, lm_head: Tensor) -> bool:
    """Tell whether our product takes these inputs: one 16-bit dtype, whole tiles of the width, aligned rows."""
    width = hidden.shape[1]
    aligned = all(x.stride(1) == 1 and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0 for x in (hidden, lm_head))
    half = hidden.dtype == lm_head.dtype and hidden.dtype in (torch.bfloat16, torch.float16)
    return half and aligned and width > 0 and width % 64 == 0 and len(hidden) > 0


def choose(hidden: Tensor, lm_head: Tensor, run: Callable[[Route], object]) -> Route:
    """Return the route of `hidden @ lm_head.T`. `run` carries out a route, for tuning."""
    if not fits(hidden, lm_head):
        return None
    if os.environ.get("LATENT_KERNELS_AUTOTUNE", "0") == "1" and hidden.is_cuda:
        return _tuned(hidden, lm_head, run)
    return table()[bucket(len(hidden))]


_tuned_routes: dict[tuple[object, ...], Route] = {}


def _tuned(hidden: Tensor, lm_head: Tensor, run: Callable[[Route], object]) -> Route:
    """Return the fastest route for this device, dtype, bucket and head, timing the candidates the first time."""
    key = (hidden.device, hidden.dtype, bucket(len(hidden)), *lm_head.shape)
    if key not in _tuned_routes:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"LATENT_KERNELS_AUTOTUNE=1 cannot tune {len(hidden)} rows while a CUDA graph is captured; run one "
                "step of that size before the capture"
            )
        _tuned_routes[key] = fastest(candidates(len(hidden)), run)
    return _tuned_routes[key]


def fastest(routes: list[Route], run: Callable[[Route], object]) -> Route:
    """Return the route that takes the least time on this device."""
    return min(routes, key=lambda route: triton.testing.do_bench(lambda: run(route), return_mode="median"))
