"""What several kernels share: the noise stream, and options given once or per row."""

from __future__ import annotations

import triton
import triton.language as tl

from latent_kernels import _noise

# Without a limit, ptxas may spill a few bytes to reach an occupancy that it chooses itself.
MAX_REGISTERS = 255
GUMBEL_LOW = tl.constexpr(_noise.GUMBEL_LOW)
GUMBEL_HIGH = tl.constexpr(_noise.GUMBEL_HIGH)


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
