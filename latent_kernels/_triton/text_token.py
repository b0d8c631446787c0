"""The token of a text row, from one uniform draw: temperature, then top-k, then top-p.

    w_v = exp((logit_v - peak) / T),  the tokens in falling order of their logits, the lower id first among equals
    total = the mass of the nucleus: of the top_k first tokens, those whose mass before them is below top_p of the k's
    token = the first whose cumulative mass is above draw * total

Weights and masses are in float64. A row is cut in segments of its sorted order (`cut_segment`), as a latent step is.
Where nothing is cut off, the order is that of the vocabulary, and the sidecar gives the masses of runs of ids
(`whole_token`): a draw from the far tail reads no more than another.
"""

from __future__ import annotations

import triton
import triton.language as tl

from latent_kernels._triton.token_keys import key_value

# What is known of a row: nothing, the mass of its top_k tokens, the mass of its nucleus.
NOTHING, KEPT, TOTAL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def cut_segment(
    keys, count, mass, taken, last, peak, temperature, top_k, top_p, draw, known, kept, total, token, N: tl.constexpr,
):  # fmt: skip
    """Look for the token in a segment of the sorted order: `count` keys, with `taken` tokens of `mass` before them.

    last: no token comes after the segment. Return what is known now, the mass of the top_k tokens, that of the nucleus,
    the key of the token, whether it is found, whether it is in a segment before this one, and the mass of the segment.
    """
    n = tl.arange(0, N)
    inside = n < count
    weights = tl.where(inside, tl.exp((key_value(keys) - peak).to(tl.float64) / temperature.to(tl.float64)), 0.0)
    ends = mass + tl.cumsum(weights, 0)
    mass_of_segment = tl.sum(weights, 0)
    ranked = inside & (taken + n < top_k)
    last = last | (taken + count >= top_k)
    learns = (known == NOTHING) & last
    kept = tl.where(learns, mass + tl.sum(tl.where(ranked, weights, 0.0), 0), kept)
    known = tl.where(learns, KEPT, known)
    limit = tl.where(top_p < 1.0, top_p.to(tl.float64) * kept, float("inf"))
    nucleus = ranked & (ends - weights < limit)
    earlier = learns & (taken > 0) & (mass >= limit)
    closed = last | (mass + mass_of_segment >= limit)
    learns = (known == KEPT) & closed & (earlier == 0)
    total = tl.where(learns, mass + tl.sum(tl.where(nucleus, weights, 0.0), 0), total)
    known = tl.where(learns, TOTAL, known)
    target = draw * total
    earlier = earlier | ((known == TOTAL) & (taken > 0) & (mass > target))
    # A draw that rounds up to the whole mass takes the last token of the nucleus.
    place = tl.minimum(tl.sum((nucleus & (ends <= target)).to(tl.int32), 0), tl.sum(nucleus.to(tl.int32), 0) - 1)
    found = (known == TOTAL) & (earlier == 0) & (closed | (mass + mass_of_segment > target))
    token = tl.where(found, tl.sum(tl.where(n == tl.maximum(place, 0), keys, 0), 0), token)
    return known, kept, total, token, found, earlier, mass_of_segment


@triton.jit
def pick(masses, ends, place, draw):
    """Return what a draw in [0, 1] picks from masses [N] with the cumulative sums `ends`, and where in it it lies."""
    total = tl.max(ends, 0)
    target = draw * total
    last = tl.sum((ends < total).to(tl.int32), 0)  # a draw of 1 picks the last positive mass
    index = tl.minimum(tl.sum((ends <= target).to(tl.int32), 0), last)
    before = tl.max(tl.where(place < index, ends, 0.0), 0)
    share = (target - before) / tl.sum(tl.where(place == index, masses, 0.0), 0)
    return index, tl.minimum(tl.maximum(share, 0.0), 1.0)


@triton.jit
def whole_token(
    logits_ptr, maxima_ptr, sums_ptr, peak, temperature, draw, V, G, COARSE: tl.constexpr, GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Return the id that a draw picks from the whole vocabulary, in the order of ids.

    The draw picks one of COARSE sets of GROUPS groups, then one of the WIDTH ids of the set.
    """
    coarse, member = tl.arange(0, COARSE), tl.arange(0, WIDTH)
    masses = tl.zeros([COARSE], dtype=tl.float64)
    for j in range(GROUPS):
        group = coarse * GROUPS + j
        maxima = tl.load(maxima_ptr + group, mask=group < G, other=-float("inf"))
        sums = tl.load(sums_ptr + group, mask=group < G, other=0.0)
        masses += (sums * tl.exp((maxima - peak) / temperature)).to(tl.float64)
    picked, share = pick(masses, tl.cumsum(masses, 0), coarse, draw)
    v = picked * WIDTH + member
    logits = tl.load(logits_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32)
    weights = tl.exp((logits - tl.max(logits, 0)).to(tl.float64) / temperature.to(tl.float64))
    index, _ = pick(weights, tl.cumsum(weights, 0), member, share)
    return picked * WIDTH + index


@triton.jit
def tempered_sum(logits_ptr, peak, inverse, V, TILE: tl.constexpr):
    """Return the sum of exp((logit - peak) * inverse) over a row of logits, which it reads once."""
    total = tl.zeros([TILE], dtype=tl.float32)
    for start in range(0, V, TILE):
        v = start + tl.arange(0, TILE)
        logits = tl.load(logits_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32)
        total += tl.exp((logits - peak) * inverse)
    return tl.sum(total, 0)
