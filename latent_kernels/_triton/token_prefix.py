"""The prefix of a row's sorted order, in segments: what a latent step and a text token are chosen from.

The sidecar gives log Z and the order of the groups of ids. A frontier is a key. The tokens above it, and below the
frontier of the segment before, are gathered into a buffer of N and sorted.
"""

from __future__ import annotations

import triton
import triton.language as tl

from latent_kernels._triton.token_keys import ABSENT, LOWEST, height_value, key_value, sortable, token_key


@triton.jit
def gather_segment(
    logits_ptr, list_ptr, buffer_ptr, heights, frontier, ceiling, V, WIDTH: tl.constexpr, BLOCK_G: tl.constexpr,
    TILE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Count the keys in (frontier, ceiling], and write as many as fit to the buffer, in the order of their ids."""
    above = (heights >= (frontier >> 32).to(tl.int32)) & (heights != ABSENT)
    tl.debug_barrier()  # all threads have read the list and the buffer of the last segment
    tl.store(list_ptr + tl.cumsum(above.to(tl.int32), 0) - 1, tl.arange(0, BLOCK_G), mask=above)
    tl.debug_barrier()
    elements = tl.sum(above.to(tl.int32), 0) * WIDTH
    count = 0
    for start in range(0, elements, TILE):
        i = start + tl.arange(0, TILE)
        v = tl.load(list_ptr + i // WIDTH, mask=i < elements, other=0) * WIDTH + i % WIDTH
        inside = (i < elements) & (v < V)
        key = token_key(tl.load(logits_ptr + v, mask=inside, other=0.0).to(tl.float32), v)
        hit = inside & (key > frontier) & (key <= ceiling)
        place = count + tl.cumsum(hit.to(tl.int32), 0) - 1
        tl.store(buffer_ptr + place, key, mask=hit & (place < N))
        count += tl.sum(hit.to(tl.int32), 0)
    tl.debug_barrier()
    return count


@triton.jit
def read_sidecar(
    logits_ptr, maxima_ptr, sums_ptr, inverse, V, G, BLOCK_G: tl.constexpr, RUN: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return the sum of exp((logit - peak) * inverse), the sortable maxima of runs of WIDTH ids, RUN groups each
    [BLOCK_G], and the row's highest key, whose value is the peak. The sums of the sidecar have the same `inverse`.
    """
    run = tl.arange(0, BLOCK_G)
    heights = tl.full([BLOCK_G], ABSENT, dtype=tl.int32)
    for j in range(RUN):
        group = run * RUN + j
        maxima = tl.load(maxima_ptr + group, mask=group < G, other=0.0)
        heights = tl.maximum(heights, tl.where(group < G, sortable(maxima), ABSENT))
    peak = height_value(tl.max(heights, 0))
    total = tl.zeros([BLOCK_G], dtype=tl.float32)
    for j in range(RUN):  # the maxima are read again, because holding them takes too many registers
        group = run * RUN + j
        maxima = tl.load(maxima_ptr + group, mask=group < G, other=-float("inf"))
        total += tl.load(sums_ptr + group, mask=group < G, other=0.0) * tl.exp((maxima - peak) * inverse)
    first = tl.min(tl.where(heights == tl.max(heights, 0), run, BLOCK_G), 0)
    v = first * WIDTH + tl.arange(0, WIDTH)
    logits = tl.load(logits_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32)
    return tl.sum(total, 0), heights, tl.max(tl.where(v < V, token_key(logits, v), LOWEST), 0)


@triton.jit
def frontier_of_rank(highest, rank, COARSE: tl.constexpr):
    """Return a key just below the `rank`-th of the sorted maxima [COARSE], or LOWEST beyond them."""
    height = tl.min(tl.where(tl.arange(0, COARSE) < rank, highest, 0x7FFFFFFF), 0)
    return tl.where((rank > COARSE) | (height == ABSENT), LOWEST, (height.to(tl.int64) << 32) - 1)


@triton.jit
def coarse_order(heights, log_z, inverse, limit, COARSE: tl.constexpr, BLOCK_G: tl.constexpr):
    """Return the sorted maxima of COARSE sets of runs, and the rank among them of a first frontier for a nucleus.

    About 0.7 COARSE tokens are above that frontier at most, and 0.9 COARSE on a nearly uniform row, where few sets hold
    two of them and K scores need more tokens.
    """
    highest = tl.max(tl.reshape(heights, [BLOCK_G // COARSE, COARSE]), 0)
    if COARSE > 1:
        highest = tl.sort(highest, descending=True)
    # With the mass of these tokens alone, the nucleus ends at this rank or before it.
    mass = tl.cumsum(tl.where(highest == ABSENT, 0.0, tl.exp(height_value(highest) * inverse - log_z)), 0)
    last = tl.where(tl.max(mass, 0) < 0.0625, 3 * COARSE // 5, COARSE // 2)
    return highest, tl.minimum(tl.sum((mass < limit).to(tl.int32), 0) + 1, last)


@triton.jit
def narrower_frontier(keys, count, frontier, N: tl.constexpr):
    """Return a higher frontier for a segment of `count` > N tokens, given the N sorted keys with the lowest ids."""
    # These N are a sample of the segment: about three quarters of a buffer are above this rank of it. Tokens that tie
    # are in the order of their keys, so all N come first. Unless other tokens are above them: then N do not fit.
    rank = tl.maximum(3 * N * N // (4 * count), 3)
    sampled = tl.sum(tl.where(tl.arange(0, N) == rank, keys, 0), 0)
    lowest = tl.min(keys, 0)
    tied = (key_value(tl.max(keys, 0)) == key_value(lowest)) & (lowest - 1 > frontier)
    return tl.where(tied, lowest - 1, sampled)
