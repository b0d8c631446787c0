"""What several kernels share: the noise stream, options given once or per row, and a product tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from latent_kernels import _noise

# Without a limit, ptxas may spill a few bytes to reach an occupancy that it chooses itself.
MAX_REGISTERS = 255
GUMBEL_LOW = tl.constexpr(_noise.GUMBEL_LOW)
GUMBEL_HIGH = tl.constexpr(_noise.GUMBEL_HIGH)


def dot_dtype(*operands: Tensor) -> torch.dtype:
    """Return the dtype to which a product's operands are converted: their own, or float32 if they differ.

    The interpreter, which runs on CPU tensors, has no bfloat16 product. float32 holds the same products exactly.
    """
    first, *others = operands
    same = first.is_cuda and all(other.dtype == first.dtype for other in others)
    return first.dtype if same else torch.float32


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return Triton's name of a float dtype."""
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]


@triton.jit
def row_option(value, row, IS_TENSOR: tl.constexpr):
    """Return a number, or the row's entry of a [B] tensor, in float32."""
    if IS_TENSOR:
        return tl.load(value + row).to(tl.float32)
    else:
        return tl.cast(value, tl.float32)


@triton.jit
def counter_option(value, IS_TENSOR: tl.constexpr, offset=0):
    """Return a number, or an element of a tensor, in int64."""
    if IS_TENSOR:
        return tl.load(value + offset).to(tl.int64)
    else:
        return tl.cast(value, tl.int64)


@triton.jit
def philox_words(ids, rows, seed, step):
    """Return the words of `latent_kernels._noise.philox_words` in uint32; ids and rows are broadcast."""
    # Adding `zero` broadcasts the words of the counter to one shape, as tl.philox needs them.
    zero = (ids + rows).to(tl.int32) * 0
    low = zero + (rows & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    high = zero + (rows >> 32).to(tl.int32)
    word, _, _, _ = tl.philox(seed, zero + ids.to(tl.int32), low, high, zero + step.to(tl.int32))
    return word.to(tl.uint32, bitcast=True)


@triton.jit
def exponential_draws(ids, rows, seed, step):
    """Return the Exp(1) draws of `latent_kernels._noise.exponential_draws`; ids and rows are broadcast."""
    uniform = philox_words(ids, rows, seed, step).to(tl.float32) * 2.0**-32 + 2.0**-33
    return -tl.log(uniform)


@triton.jit
def gumbel_noise(exponential, delta, ONE_SIDED: tl.constexpr):
    """Return `clamp(-log(e), -1.5, 3)`, shifted to [delta, 4.5 + delta] if one-sided (Eq. 12-13)."""
    noise = tl.minimum(tl.maximum(-tl.log(exponential), GUMBEL_LOW), GUMBEL_HIGH)
    if ONE_SIDED:
        noise = noise - GUMBEL_LOW + delta
    return noise


@triton.jit
def product_tile(
    weight_ptr, hidden_ptr, weight_stride, hidden_stride, v, b, V, B, D, BLOCK_V: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr, DOT_TYPE: tl.constexpr,
):  # fmt: skip
    """Return `weight[v] @ hidden[b].T` [BLOCK_V, BLOCK_B] in float32. Entries outside V and B hold any finite value.

    The vocabulary is on the M axis of the matrix instruction, whose tile size is fixed. The batch is on the N axis,
    which can be small. Row indices are clamped rather than masked. Addresses are int64, because V x D may exceed 2^31.
    """
    d = tl.arange(0, BLOCK_D)
    weights = weight_ptr + tl.minimum(v, V - 1).to(tl.int64)[:, None] * weight_stride + d[None, :]
    hiddens = hidden_ptr + tl.minimum(b, B - 1).to(tl.int64)[None, :] * hidden_stride + d[:, None]
    total = tl.zeros([BLOCK_V, BLOCK_B], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        if EVEN_D:
            weight, hidden = tl.load(weights + start), tl.load(hiddens + start)
        else:
            weight = tl.load(weights + start, mask=(start + d < D)[None, :], other=0.0)
            hidden = tl.load(hiddens + start, mask=(start + d < D)[:, None], other=0.0)
        # "ieee" concerns float32 operands: TF32 would keep only ten bits of their mantissas.
        total = tl.dot(weight.to(DOT_TYPE), hidden.to(DOT_TYPE), total, input_precision="ieee")
    return total
