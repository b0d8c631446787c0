"""The terms of a row's log-prob and of its gradient in the logits, for the kernel of `latent_logprob` (Eq. 15-17).

All arithmetic is in float32. A row of V products with the LM head is read in tiles of BLOCK_V and turned into logits on
the way (`latent_kernels._triton.head`). Its K components are held in registers. "Logits / T" stands for what the head's
`capped` gives times `inverse_temperature`, which is 1 / T times the head's `outer`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from latent_kernels._triton.head import read_capped
from latent_kernels.reference import latent_step as steps
from latent_kernels.reference import loss

UNUSED_ID = tl.constexpr(steps.UNUSED_ID)
MARGINS = {"none": 0, "aligned": 1, "released": 2}
METHODS = {"latent_grpo": 0, "soft_grpo": 1, "multiplex": 2}
SOFT_GRPO, MULTIPLEX = tl.constexpr(METHODS["soft_grpo"]), tl.constexpr(METHODS["multiplex"])

EXPONENT_MAX = tl.constexpr(loss.EXPONENT_MAX)
MARGIN_MAX = tl.constexpr(loss.MARGIN_MAX)  # exp(-MARGIN_MAX) is 0
SOFT_EPSILON = tl.constexpr(loss.SOFT_EPSILON)
SOFT_MARGIN_MIN, SOFT_MARGIN_MAX = tl.constexpr(loss.SOFT_MARGIN_MIN), tl.constexpr(loss.SOFT_MARGIN_MAX)
SOFT_LOGPROB_MIN = tl.constexpr(loss.SOFT_LOGPROB_MIN)
LOWEST = tl.constexpr(-3.0e38)  # below any logit that matters, and finite: differences from it are numbers


@triton.jit
def row_components(ids_ptr, row, V, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return the ids of a row's components, which are used, which of those are valid, and whether it is a text row.

    The last result is whether all ids exist. A row with an id outside the vocabulary is NaN, without a gradient: an
    error would have to wait for the device.
    """
    k = tl.arange(0, BLOCK_K)
    ids = tl.load(ids_ptr + row * K + k, mask=k < K, other=0)
    hard = tl.sum(((ids == UNUSED_ID) & (k > 0)).to(tl.int32), 0) > 0
    used = k < tl.where(hard, 1, K)  # the only component of a text row is its token
    exist = tl.sum((used & ((ids < 0) | (ids >= V))).to(tl.int32), 0) == 0
    valid = k < tl.where(exist, tl.where(hard, 1, K), 0)
    return tl.where(valid, ids, 0), used, valid, hard, exist


@triton.jit
def row_scores(
    scores_ptr, advantages_ptr, row, log_probs, used, K: tl.constexpr, BLOCK_K: tl.constexpr, MARGIN: tl.constexpr,
    METHOD: tl.constexpr,
):  # fmt: skip
    """Return the log-prob of a latent row, its gradient in the log-probs of the components, and the margins."""
    k = tl.arange(0, BLOCK_K)
    if METHOD == MULTIPLEX:
        latent = tl.sum(tl.where(used, log_probs, 0.0), 0)
        coefficients = tl.full([BLOCK_K], 1.0, dtype=tl.float32)
        margins = tl.zeros([BLOCK_K], dtype=tl.float32)  # there are none
    else:
        scores = tl.load(scores_ptr + row * K + k, mask=used, other=0.0).to(tl.float32)
        if METHOD == SOFT_GRPO:
            latent, coefficients, margins = soft_terms(log_probs, scores, used)
        else:
            replaced = -float("inf")
            if MARGIN > 0:
                replaced = tl.where(tl.load(advantages_ptr + row).to(tl.float32) <= 0, 0.0, -float("inf"))
            terms, coefficients, margins = component_terms(log_probs, scores, replaced, MARGIN)
            latent = tl.sum(tl.where(used, terms, 0.0), 0) / K
            coefficients = coefficients / K
    return latent, coefficients, margins


@triton.jit
def store_scores(
    logprob_ptr, crossed_ptr, row, log_probs, latent, margins, used, valid, hard, exist, K: tl.constexpr,
    BLOCK_K: tl.constexpr, COMPONENTS: tl.constexpr,
):  # fmt: skip
    """Store the log-prob of a row, or of each of its components, and the number of its crossed margins."""
    k = tl.arange(0, BLOCK_K)
    if COMPONENTS:
        each = tl.where(exist, tl.where(used, log_probs, 0.0), float("nan"))
        tl.store(logprob_ptr + row * K + k, each, mask=k < K)
    else:
        text = tl.sum(tl.where(k == 0, log_probs, 0.0), 0)
        tl.store(logprob_ptr + row, tl.where(exist, tl.where(hard, text, latent), float("nan")))
    tl.store(crossed_ptr + row, tl.where(hard, 0, tl.sum((valid & (margins < 0)).to(tl.int32), 0)))


@triton.jit
def sum_of_coefficients(coefficients, hard, METHOD: tl.constexpr):
    """Return by how much of its softmax the gradient of a row falls."""
    total = tl.sum(coefficients, 0)
    if METHOD == SOFT_GRPO:
        total = tl.where(hard, total, 0.0)  # what is left of it on a latent row is a rounding
    return total


@triton.jit
def over_equal_ids(ids, coefficients):
    """Return, for each component of a row, the sum of the coefficients of all components with its id."""
    narrow = ids.to(tl.int32)  # half the registers of a K x K comparison
    return tl.sum(tl.where(narrow[:, None] == narrow[None, :], coefficients[None, :], 0.0), 1)


@triton.jit
def row_log_z(
    row_ptr, bias_ptr, V, inverse_temperature, inner, BLOCK_V: tl.constexpr, HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Return log sum exp(logits / T) of a row in one pass. Every lane keeps a maximum and a sum, merged at the end."""
    v = tl.arange(0, BLOCK_V)
    highest = tl.full([BLOCK_V], LOWEST, dtype=tl.float32)
    total = tl.zeros([BLOCK_V], dtype=tl.float32)
    for start in range(0, V, BLOCK_V):
        at = start + v
        z = read_capped(row_ptr, bias_ptr, at, at < V, inner, -float("inf"), HAS_BIAS, SOFTCAP) * inverse_temperature
        # Of the two exponentials of an online log-sum-exp, one is always exp(0) = 1.
        smaller = tl.exp(-tl.abs(z - highest))
        total = tl.where(z > highest, total * smaller + 1.0, total + smaller)
        highest = tl.maximum(highest, z)
    peak = tl.max(highest, 0)
    return peak + tl.log(tl.sum(total * tl.exp(highest - peak), 0))


@triton.jit
def row_log_z_and_entropy(
    row_ptr, bias_ptr, V, inverse_temperature, inner, BLOCK_V: tl.constexpr, HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Return log sum exp(logits / T) of a row and the entropy of its softmax, in one pass.

    Every lane keeps a maximum, a sum of exponentials, and the same sum weighted by the distances below the maximum. The
    distances are clamped where their exponentials are 0, because 0 * -inf is NaN.
    """
    v = tl.arange(0, BLOCK_V)
    highest = tl.full([BLOCK_V], LOWEST, dtype=tl.float32)
    total = tl.zeros([BLOCK_V], dtype=tl.float32)
    spread = tl.zeros([BLOCK_V], dtype=tl.float32)
    for start in range(0, V, BLOCK_V):
        at = start + v
        z = read_capped(row_ptr, bias_ptr, at, at < V, inner, -float("inf"), HAS_BIAS, SOFTCAP) * inverse_temperature
        below = -tl.abs(z - highest)
        below = tl.where(below < -MARGIN_MAX, -MARGIN_MAX, below)
        smaller = tl.exp(below)
        spread = tl.where(z > highest, (spread + below * total) * smaller, spread + below * smaller)
        total = tl.where(z > highest, total * smaller + 1.0, total + smaller)
        highest = tl.maximum(highest, z)
    peak = tl.max(highest, 0)
    below = highest - peak
    below = tl.where(below < -MARGIN_MAX, -MARGIN_MAX, below)
    smaller = tl.exp(below)
    mass = tl.sum(total * smaller, 0)
    return peak + tl.log(mass), tl.log(mass) - tl.sum((spread + below * total) * smaller, 0) / mass


@triton.jit
def component_terms(log_probs, scores, replaced, MARGIN: tl.constexpr):
    """Return the terms of the surrogate, their coefficients c_k and the margins of a row's components (Eq. 15-17).

    Coefficients of margins below `replaced`, which is 0 or -inf, are replaced as `margin_gradient` says. Comparisons
    rather than minima clamp the margins, because a minimum would drop a NaN.
    """
    margin = scores - log_probs
    margin = tl.where(scores == -float("inf"), 0.0, tl.where(margin > MARGIN_MAX, MARGIN_MAX, margin))
    pull = tl.exp(tl.where(margin < -EXPONENT_MAX, EXPONENT_MAX, -margin))
    coefficients = 1.0 - pull
    if MARGIN > 0:
        flipped = 1.0 - tl.exp(-tl.abs(margin))
        coefficients = tl.where(margin < replaced, flipped if MARGIN == 1 else -flipped, coefficients)
    return -margin - pull, coefficients, margin


@triton.jit
def soft_terms(log_probs, scores, used):
    """Return the log-prob of a latent row of SofT-GRPO, its gradient in the K picked logits, and the margins.

    q = softmax over the K components, l_k = log(q_k + 1e-6), d_k = score_k - l_k clamped to [-1.5, 3]. The log-prob is
    the mean of -d_k - exp(-d_k) over the components with l_k > -3. Products rather than masks keep a NaN.
    """
    share = tl.where(used, tl.exp(log_probs - tl.max(tl.where(used, log_probs, -float("inf")), 0)), 0.0)
    share = share / tl.sum(share, 0)
    target = tl.log(share + SOFT_EPSILON)
    margin = scores - target
    below, above = margin < SOFT_MARGIN_MIN, margin > SOFT_MARGIN_MAX
    clamped = tl.where(below, SOFT_MARGIN_MIN, tl.where(above, SOFT_MARGIN_MAX, margin))
    pull = tl.exp(-clamped)
    counts = tl.where(used & (target > SOFT_LOGPROB_MIN), 1.0, 0.0)
    weight = counts / tl.maximum(tl.sum(counts, 0), 1.0)
    logprob = tl.sum(tl.where(used, (-clamped - pull) * weight, 0.0), 0)
    pulled = tl.where(below | above, 0.0, (1.0 - pull) * weight) * share / (share + SOFT_EPSILON)
    return logprob, pulled - share * tl.sum(pulled, 0), margin


@triton.jit
def range_scale(bound):
    """Return a power of two by which values of at most `bound` are divided so that float16 holds them with all bits.

    The largest is then below 2^14, and a value has all bits down to 2^-28 of it.
    """
    bound = tl.maximum(bound, 1e-30)
    return (bound.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True) * 2.0**-13


@triton.jit
def store_dlogits(
    row_ptr, bias_ptr, dlogits_ptr, V, ids, valid, picked, log_probs, coefficients, total, log_z, inverse_temperature,
    inner, factor, entropy, bonus, shrink, ENTROPY: tl.constexpr, BLOCK_V: tl.constexpr, HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr, RELATIVE: tl.constexpr,
):  # fmt: skip
    """Store factor * (sum_k c_k onehot(id_k) - total * p) of a row, which may overwrite the row's products.

    With ENTROPY, add bonus * -p (log p + entropy), the gradient of bonus times the entropy of p. With SOFTCAP, multiply
    by the slope of the cap, 1 - tanh^2. With RELATIVE, multiply by `shrink`.
    If dlogits is half as wide as the products, it lies in the second half of their bytes, and a tile is written over
    itself and over tiles above it. So tiles go from the end to the start, and all threads read a tile before any thread
    writes it.
    """
    # An id that occurs twice stores the same value twice: the sum of what all its occurrences contribute. Of the picked
    # components only this value is alive during the tiles.
    last = factor * (over_equal_ids(ids, coefficients) - total * tl.exp(log_probs))
    if ENTROPY:
        finite = tl.where(log_probs < -MARGIN_MAX, -MARGIN_MAX, log_probs)
        last -= bonus * tl.exp(finite) * (finite + entropy)
    if SOFTCAP:
        last *= 1.0 - picked * picked
    if RELATIVE:
        last *= shrink
    v = tl.arange(0, BLOCK_V)
    tiles = tl.cdiv(V, BLOCK_V)
    for tile in range(0, tiles):
        at = (tiles - 1 - tile) * BLOCK_V + v
        capped = read_capped(row_ptr, bias_ptr, at, at < V, inner, 0.0, HAS_BIAS, SOFTCAP)
        z = capped * inverse_temperature
        tl.debug_barrier()
        value = -factor * total * tl.exp(z - log_z)
        if ENTROPY:
            log_p = tl.where(z - log_z < -MARGIN_MAX, -MARGIN_MAX, z - log_z)
            value -= bonus * tl.exp(log_p) * (log_p + entropy)
        if SOFTCAP:
            value *= 1.0 - capped * capped
        if RELATIVE:
            value *= shrink
        tl.store(dlogits_ptr + at, value.to(dlogits_ptr.dtype.element_ty), mask=at < V)
    tl.debug_barrier()
    tl.store(dlogits_ptr + ids, last.to(dlogits_ptr.dtype.element_ty), mask=valid)
