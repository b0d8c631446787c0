"""The K best noisy scores of a latent row, merged segment by segment of its sorted order (Eq. 12-13)."""

from __future__ import annotations

import triton
import triton.language as tl

from latent_kernels._triton.common import exponential_draws, gumbel_noise
from latent_kernels._triton.token_keys import HIGHEST, LOWEST, frontier_at, key_id, key_value, token_key


@triton.jit
def keep_best(best, keys, BLOCK_K: tl.constexpr):
    """Return the BLOCK_K highest of two sets of keys, in falling order. LOWEST marks an empty place and may repeat."""
    if BLOCK_K == 1:  # Triton 3.6 takes no early return here
        best = tl.maximum(best, tl.max(keys, 0))
    else:
        best = tl.topk(tl.interleave(best, tl.topk(keys, BLOCK_K)), BLOCK_K)
    return best


@triton.jit
def score_keys(
    keys, log_probs, inside, noisy, scale, delta, row, noise_row, draws_ptr, draws_stride, seed, step,
    INJECTED: tl.constexpr, ONE_SIDED: tl.constexpr,
):  # fmt: skip
    """Return the keys of the tokens' noisy scores, or on a row without noise the tokens' own keys."""
    ids = tl.where(inside, key_id(keys), 0)
    if INJECTED:
        draws = tl.load(draws_ptr + row * draws_stride + ids, mask=inside, other=1.0).to(tl.float32)
    else:
        draws = exponential_draws(ids, noise_row, seed, step)
    return tl.where(noisy, token_key(log_probs + gumbel_noise(draws, delta, ONE_SIDED) * scale, ids), keys)


@triton.jit
def conclude(best, frontier, log_z, noisy, largest, outside_nucleus, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Tell whether no token below the frontier can change the K best, and return the frontier needed next."""
    worst = tl.min(tl.where(tl.arange(0, BLOCK_K) < K, best, HIGHEST), 0)
    enough = worst != LOWEST
    out_of_reach = key_value(worst) > key_value(frontier) - log_z + largest
    # Noise does not change -inf, so the tokens that are left tie with the K-th best and have higher ids.
    nothing_left = (key_value(frontier) == -float("inf")) & (worst > frontier)
    decided = enough & ((noisy == 0) | out_of_reach | outside_nucleus | nothing_left)
    needed = tl.where(enough, frontier_at(key_value(worst) + log_z - largest), LOWEST)
    return (frontier == LOWEST) | decided, tl.where(needed < frontier, needed, LOWEST)


@triton.jit
def latent_segment(
    keys, count, frontier, best, mass, taken, log_z, limit, noisy, scale, delta, largest, row, noise_row, draws_ptr,
    draws_stride, seed, step, NOISE: tl.constexpr, INJECTED: tl.constexpr, ONE_SIDED: tl.constexpr, K: tl.constexpr,
    BLOCK_K: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Merge a sorted segment of `count` keys into the K best of a latent row.

    Return these, the mass of the segment, whether they are final, and the frontier needed if they are not.
    """
    n = tl.arange(0, N)
    inside = n < count
    log_probs = key_value(keys) - log_z
    probs = tl.where(inside, tl.exp(log_probs), 0.0).to(tl.float64)
    before = mass + tl.cumsum(probs, 0) - probs
    candidate = inside & ((before < limit) | (taken + n < K))
    if NOISE:
        keys = score_keys(
            keys, log_probs, inside, noisy, scale, delta, row, noise_row, draws_ptr, draws_stride, seed, step,
            INJECTED, ONE_SIDED,
        )  # fmt: skip
    best = keep_best(best, tl.where(candidate, keys, LOWEST), BLOCK_K)
    segment = tl.sum(probs, 0)
    done, needed = conclude(best, frontier, log_z, noisy, largest, mass + segment >= limit, K, BLOCK_K)
    return best, segment, done, needed
