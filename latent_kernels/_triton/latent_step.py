"""Selection of a latent step from logits and their sidecar, one program per row (Eq. 1, 12-14).

Inputs: logits [B, >= V] in float32 or a 16-bit dtype, and their sidecar (`latent_kernels._triton.lm_head`). Outputs:
ids [B, K] int64, scores and weights [B, K] float32, the mixture [B, D] in the table's dtype, the token of the highest
logit [B] int64, is_latent [B]. Probabilities and scores are in float32, cumulative mass in float64.

    score_v = logit_v - log Z + scale * g_v  for v in the nucleus,  ids = the K highest scores
    weights = softmax(scores / tau),  mixture = sum_k weights_k table[ids_k]

There is no backward pass, nothing is saved, and the result is the same in every run: no atomics.

Tokens are compared by 64-bit keys, (logit, lower id first), so that no two are equal. Noise is bounded: a token can be
among the K best only if its log-prob plus the largest noise reaches the K-th best score. So everything happens in a
prefix of the sorted order:

1. The sidecar gives log Z and a lower bound of the K-th logit, and so a first frontier.
2. The tokens above the frontier are gathered into a buffer of N and sorted. Their exclusive cumulative mass decides the
   nucleus.
3. If the prefix does not settle the result, a lower frontier gives the next segment of the order. The mass and the K
   best so far are carried over.
4. A segment that overflows the buffer is tried again with a higher frontier.

So no row needs a launch of its own, and the last segment is at worst the rest of the vocabulary. Realistic rows settle
in one segment of 30 to 350 tokens. Nearly uniform rows settle after about 20 * top_k tokens, because 4.9% of all
tokens draw the largest noise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from latent_kernels._triton.common import (
    GUMBEL_HIGH,
    GUMBEL_LOW,
    MAX_REGISTERS,
    counter_option,
    exponential_draws,
    gumbel_noise,
    row_option,
)
from latent_kernels._triton.lm_head import GROUP, Sidecar
from latent_kernels._types import LatentStep, LatentStepOptions

BUFFER, BUFFER_PER_K = 512, 32  # tokens of one segment: at least, and per mixture component
NUM_WARPS = 8
GROUPS_AT_ONCE = 16  # 2,048 logits gathered together, 8 per thread
MIX_TILE = 2048  # elements of the table gathered together
# Without fusion, scores are rounded after each operation, as PyTorch rounds them.
BUILD_OPTIONS = {"maxnreg": MAX_REGISTERS, "enable_fp_fusion": False}
LOWEST, HIGHEST = tl.constexpr(-(2**63)), tl.constexpr(2**63 - 1)  # below and above the key of any token
ID_MASK = tl.constexpr(0x7FFFFFFF)


@triton.jit
def sortable(value):
    """Map float32 values to int32 in the same order: 0 and -0 are equal, and every NaN is the highest.

    The maximum of a group may be a NaN with other bits than those of its elements. If the two compared as different,
    a group could lie above the row's highest token.
    """
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    bits = tl.where(value == value, bits, 0x7FFFFFFF)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def token_key(value, ids):
    """Return an int64 key that orders tokens by value, lower id first."""
    return (sortable(value).to(tl.int64) << 32) | (ids ^ ID_MASK).to(tl.int64)


@triton.jit
def key_value(key):
    """Return the value of a key."""
    bits = (key >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def key_id(key):
    """Return the id of a key."""
    return (key & ID_MASK).to(tl.int32) ^ ID_MASK


@triton.jit
def frontier_at(value):
    """Return a key just below the keys of all tokens at `value` or above it, with a margin for rounding."""
    return sortable(value - 1e-3 - 1e-5 * tl.abs(value)).to(tl.int64) << 32


@triton.jit
def frontier_between(group_keys, low, high, least, most):
    """Return `low` if at most `most` groups are above it, else a key with `least` to `most` groups above it."""
    above = tl.sum((group_keys > low).to(tl.int32), 0)
    while (above > most) & (low + 1 < high):  # bisection
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # low + high could overflow int64
        count = tl.sum((group_keys > middle).to(tl.int32), 0)
        if count < least:
            high = middle
        else:
            low, above = middle, count
    return low


@triton.jit
def gather_segment(
    logits_ptr, list_ptr, buffer_ptr, group_keys, group, frontier, ceiling, V, GROUP: tl.constexpr,
    AT_ONCE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Count the keys in (frontier, ceiling], and write as many as fit to the buffer, in any order."""
    above = group_keys > frontier
    tl.debug_barrier()  # all threads have read the list and the buffer of the last segment
    tl.store(list_ptr + tl.cumsum(above.to(tl.int32), 0) - 1, group, mask=above)
    tl.debug_barrier()
    groups = tl.sum(above.to(tl.int32), 0)
    count = 0
    element = tl.arange(0, AT_ONCE * GROUP)
    for start in range(0, groups, AT_ONCE):
        i = start + element // GROUP
        chosen = tl.load(list_ptr + i, mask=i < groups, other=0)
        v = chosen * GROUP + element % GROUP
        inside = (i < groups) & (v < V)
        key = token_key(tl.load(logits_ptr + v, mask=inside, other=0.0).to(tl.float32), v)
        hit = inside & (key > frontier) & (key <= ceiling)
        place = count + tl.cumsum(hit.to(tl.int32), 0) - 1
        tl.store(buffer_ptr + place, key, mask=hit & (place < N))
        count += tl.sum(hit.to(tl.int32), 0)
    tl.debug_barrier()
    return count


@triton.jit
def keep_best(best, keys, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return the K highest of two sets of keys, in falling order. LOWEST marks an empty place and may repeat."""
    k = tl.arange(0, BLOCK_K)
    kept = tl.full([BLOCK_K], LOWEST, dtype=tl.int64)
    for i in range(K):
        highest = tl.maximum(tl.max(best, 0), tl.max(keys, 0))
        kept = tl.where(k == i, highest, kept)
        best = tl.where(best == highest, LOWEST, best)
        keys = tl.where(keys == highest, LOWEST, keys)
    return kept


@triton.jit
def read_sidecar(logits_ptr, maxima_ptr, sums_ptr, row, group, V, G, GROUP: tl.constexpr):
    """Return log Z, an upper bound of the keys in each group [BLOCK_G], and the row's highest key."""
    maxima = tl.load(maxima_ptr + row * G + group, mask=group < G, other=-float("inf"))
    sums = tl.load(sums_ptr + row * G + group, mask=group < G, other=0.0)
    peak = tl.max(maxima, 0)
    log_z = peak + tl.log(tl.sum(sums * tl.exp(maxima - peak), 0))
    group_keys = tl.where(group < G, token_key(maxima, group * GROUP), LOWEST)
    v = key_id(tl.max(group_keys, 0)) + tl.arange(0, GROUP)
    first = tl.load(logits_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32)
    return log_z, group_keys, tl.max(tl.where(v < V, token_key(first, v), LOWEST), 0)


@triton.jit
def first_frontier(group_keys, ceiling, span, K: tl.constexpr, N: tl.constexpr):
    """Return a frontier below which nothing matters, or a higher one whose groups fill about half a buffer."""
    # At least K logits reach the K-th largest maximum, and each of their scores gains at least the least noise.
    reached = frontier_between(group_keys, tl.full([], LOWEST, dtype=tl.int64), ceiling, K, 2 * K)
    frontier = tl.where(reached == LOWEST, LOWEST, frontier_at(key_value(reached) - span))
    return frontier_between(group_keys, frontier, ceiling, N // 4 + 1, N // 2)


@triton.jit
def ends_run(first, end_token_id, step, least):
    """Return whether a first id ends a run at this step: it is the end marker, and `least` steps have been taken."""
    return (first == end_token_id) & ((step >= least) | (least <= 0))


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
def conclude(
    best, frontier, log_z, noisy, largest, outside_nucleus, K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
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
def narrower_frontier(keys, count, tries, N: tl.constexpr):
    """Return a higher frontier for a segment of `count` > N tokens, given the N sorted keys that were gathered."""
    # Tied tokens are gathered in their order, so a frontier just below these N may suffice. If it does not, the next
    # try has about half a buffer of the segment above the frontier, and at least an eighth of a buffer.
    rank = tl.where(tries % 2 == 0, N - 1, tl.maximum(N * N // (2 * count), N // 8))
    return tl.sum(tl.where(tl.arange(0, N) == rank, keys, 0), 0)


@triton.jit
def store_mixture(
    ids, scores, tau, row, ids_ptr, scores_ptr, weights_ptr, mixture_ptr, table_ptr, table_stride, V, D,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store ids and scores [BLOCK_K] of a row, their weights, and the mixture of table rows."""
    k = tl.arange(0, BLOCK_K)
    ids = tl.minimum(tl.where(k < K, ids, 0), V - 1).to(tl.int64)
    exponents = tl.where((k < K) & (scores != -float("inf")), scores / tau, -float("inf"))
    weights = tl.exp(exponents - tl.max(exponents, 0))
    weights = weights / tl.sum(weights, 0)
    tl.store(ids_ptr + row * K + k, ids, mask=k < K)
    tl.store(scores_ptr + row * K + k, scores, mask=k < K)
    tl.store(weights_ptr + row * K + k, weights, mask=k < K)
    rows = table_ptr + ids[:, None] * table_stride
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        table = tl.load(rows + d[None, :], mask=(k < K)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        mixed = tl.sum(weights[:, None] * table, 0)
        tl.store(mixture_ptr + row * D + d, mixed.to(mixture_ptr.dtype.element_ty), mask=d < D)


# Pointers into a batch can have any alignment, and the counters any value. Specialisation is disabled so that no
# variant is compiled during a rollout.
@triton.jit(
    do_not_specialize=["noisy_end_id", "end_token_id", "least", "most", "seed", "step", "step_stride"],
    do_not_specialize_on_alignment=["latent_ptr", "row_ids_ptr"],
)
def latent_step_kernel(
    logits_ptr, maxima_ptr, sums_ptr, draws_ptr, row_ids_ptr, latent_ptr, table_ptr, list_ptr, buffer_ptr,
    ids_ptr, scores_ptr, weights_ptr, mixture_ptr, top_ptr, is_latent_ptr,
    top_p, tau, scale, delta, seed, step, step_stride, end_token_id, noisy_end_id, least, most,
    logits_stride, draws_stride, table_stride, V, G, D,
    NOISE: tl.constexpr, INJECTED: tl.constexpr, ONE_SIDED: tl.constexpr, HAS_ROW_IDS: tl.constexpr,
    HAS_MASK: tl.constexpr, TOP_P_PER_ROW: tl.constexpr, TAU_PER_ROW: tl.constexpr, SCALE_PER_ROW: tl.constexpr,
    SEED_TENSOR: tl.constexpr, STEP_TENSOR: tl.constexpr, GROUP: tl.constexpr, AT_ONCE: tl.constexpr,
    K: tl.constexpr, N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program computes the step of one row. list [B, G] and buffer [B, N] are scratch.

    A run ends at a raw argmax of `end_token_id` or a noisy one of `noisy_end_id`, after at least `least` steps, or once
    `most` steps are taken. -1 stands for no such token and no such limit.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    list_ptr += row * G
    buffer_ptr += row * N

    group = tl.arange(0, BLOCK_G)
    log_z, group_keys, ceiling = read_sidecar(logits_ptr, maxima_ptr, sums_ptr, row, group, V, G, GROUP)
    top_token = key_id(ceiling)
    seed, step = counter_option(seed, SEED_TENSOR), counter_option(step, STEP_TENSOR, row * step_stride)
    in_run = top_token >= 0  # always
    if HAS_MASK:
        in_run = tl.load(latent_ptr + row) != 0
    latent = in_run & (ends_run(top_token, end_token_id, step, least) == 0) & ((step < most) | (most < 0))
    noisy = latent if NOISE else latent & False
    limit = row_option(top_p, row, TOP_P_PER_ROW)
    limit = tl.where(limit < 1.0, limit, float("inf"))  # top_p = 1 keeps all tokens, whatever rounding does to the mass
    # A row without noise gets the noise-free mixture: the softmax of its log-probs.
    tau = tl.where(noisy, row_option(tau, row, TAU_PER_ROW), 1.0)
    scale = tl.where(noisy, row_option(scale, row, SCALE_PER_ROW), 0.0)
    noise_row = row
    if HAS_ROW_IDS:
        noise_row = tl.load(row_ids_ptr + row)
    span = scale * (GUMBEL_HIGH - GUMBEL_LOW)
    largest = scale * GUMBEL_HIGH
    if ONE_SIDED:
        largest = scale * (GUMBEL_HIGH - GUMBEL_LOW + delta)

    frontier = first_frontier(group_keys, ceiling, span, K, N)
    n = tl.arange(0, N)
    best = tl.full([BLOCK_K], LOWEST, dtype=tl.int64)
    mass = tl.full([], 0.0, dtype=tl.float64)
    taken = tl.full([], 0, dtype=tl.int32)
    tries = tl.full([], 0, dtype=tl.int32)
    settled = tl.full([], 0, dtype=tl.int32)
    while settled == 0:
        count = gather_segment(
            logits_ptr, list_ptr, buffer_ptr, group_keys, group, frontier, ceiling, V, GROUP, AT_ONCE, N
        )
        inside = n < count
        keys = tl.sort(tl.load(buffer_ptr + n, mask=inside, other=LOWEST), descending=True)
        if count > N:
            frontier = narrower_frontier(keys, count, tries, N)
            tries += 1
        else:
            log_probs = key_value(keys) - log_z
            probs = tl.where(inside, tl.exp(log_probs), 0.0).to(tl.float64)
            before = mass + tl.cumsum(probs, 0) - probs
            candidate = inside & ((before < limit) | (taken + n < K))
            if NOISE:
                keys = score_keys(
                    keys, log_probs, inside, noisy, scale, delta, row, noise_row, draws_ptr, draws_stride, seed, step,
                    INJECTED, ONE_SIDED,
                )  # fmt: skip
            best = keep_best(best, tl.where(candidate, keys, LOWEST), K, BLOCK_K)
            mass += tl.sum(probs, 0)
            taken += count

            done, needed = conclude(best, frontier, log_z, noisy, largest, mass >= limit, K, BLOCK_K)
            settled = done.to(tl.int32)
            ceiling = frontier
            tries = 0
            if settled == 0:
                # Doubling the groups above the frontier keeps the number of segments logarithmic.
                doubled = tl.maximum(N // 2, 2 * tl.sum((group_keys > frontier).to(tl.int32), 0))
                frontier = frontier_between(group_keys, needed, ceiling, doubled // 2 + 1, doubled)

    noisy_end = noisy & ends_run(key_id(tl.max(best, 0)), noisy_end_id, step, least)
    latent = latent & (noisy_end == 0)
    tl.store(top_ptr + row, tl.where(latent | (in_run == 0), top_token, end_token_id).to(tl.int64))
    tl.store(is_latent_ptr + row, latent.to(tl.int8))
    store_mixture(
        key_id(best), tl.where(noisy, key_value(best), key_value(best) - log_z), tau, row, ids_ptr, scores_ptr,
        weights_ptr, mixture_ptr, table_ptr, table_stride, V, D, K, BLOCK_K, BLOCK_D,
    )  # fmt: skip


def constants(vocab: int, options: LatentStepOptions) -> dict[str, int | bool]:
    """Return the constants of the kernel."""
    block_k = triton.next_power_of_2(options.top_k)
    return {
        "NOISE": options.noise != "none", "ONE_SIDED": options.noise == "one_sided",
        "INJECTED": options.exponential is not None, "HAS_ROW_IDS": options.row_ids is not None,
        "HAS_MASK": options.latent_mask is not None,
        "TOP_P_PER_ROW": isinstance(options.top_p, Tensor), "TAU_PER_ROW": isinstance(options.tau, Tensor),
        "SCALE_PER_ROW": isinstance(options.noise_scale, Tensor), "SEED_TENSOR": isinstance(options.seed, Tensor),
        "STEP_TENSOR": isinstance(options.step, Tensor), "GROUP": GROUP, "AT_ONCE": GROUPS_AT_ONCE,
        "K": options.top_k, "N": max(BUFFER, BUFFER_PER_K * block_k), "BLOCK_K": block_k,
        "BLOCK_G": triton.next_power_of_2(triton.cdiv(vocab, GROUP)), "BLOCK_D": min(512, MIX_TILE // block_k),
    }  # fmt: skip


def end_arguments(options: LatentStepOptions) -> dict[str, int]:
    """Return the arguments of the kernel that say when a run ends."""
    end = -1 if options.end_token_id is None else options.end_token_id
    return {
        "end_token_id": end, "noisy_end_id": end if options.end_rule == "noisy" else -1,
        "least": options.min_latent_steps,
        "most": -1 if options.max_latent_steps is None else options.max_latent_steps,
    }  # fmt: skip


def per_row(value: float | Tensor, rows: int) -> float | Tensor:
    """Return a number unchanged, and a tensor with one entry per row."""
    return value.expand(rows).contiguous() if isinstance(value, Tensor) else float(value)


def latent_step_from_sidecar(sidecar: Sidecar, embedding: Tensor, options: LatentStepOptions) -> LatentStep:
    """Compute the latent step from the logits of a sidecar. Arguments are checked; V is `len(embedding)`."""
    logits, rows, (vocab, width) = sidecar.logits, len(sidecar.maxima), embedding.shape
    groups, step = sidecar.maxima.shape[1], options.step
    table = embedding if embedding.stride(1) == 1 else embedding.contiguous()
    unused = logits  # a placeholder pointer for options that were not given; the kernel does not read it
    draws = unused if options.exponential is None else options.exponential
    draws = draws if draws.stride(1) == 1 else draws.contiguous()
    mask = unused if options.latent_mask is None else options.latent_mask.contiguous().view(torch.int8)
    row_ids = unused if options.row_ids is None else options.row_ids.contiguous()
    chosen = constants(vocab, options)

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(rows, *shape, dtype=dtype, device=logits.device)

    result = LatentStep(
        ids=empty(torch.int64, options.top_k),
        scores=empty(torch.float32, options.top_k),
        weights=empty(torch.float32, options.top_k),
        embedding=empty(table.dtype, width),
        top_token=empty(torch.int64),
        is_latent=empty(torch.bool),
    )
    if rows:
        latent_step_kernel[(rows,)](
            logits_ptr=logits, maxima_ptr=sidecar.maxima, sums_ptr=sidecar.sums, draws_ptr=draws, row_ids_ptr=row_ids,
            latent_ptr=mask, table_ptr=table, list_ptr=empty(torch.int32, groups),
            buffer_ptr=empty(torch.int64, chosen["N"]), ids_ptr=result.ids, scores_ptr=result.scores,
            weights_ptr=result.weights, mixture_ptr=result.embedding, top_ptr=result.top_token,
            is_latent_ptr=result.is_latent.view(torch.int8), top_p=per_row(options.top_p, rows),
            tau=per_row(options.tau, rows), scale=per_row(options.noise_scale, rows), delta=float(options.noise_delta),
            seed=0 if options.seed is None else options.seed, step=step,
            step_stride=step.stride(0) if isinstance(step, Tensor) and step.ndim else 0, **end_arguments(options),
            logits_stride=logits.stride(0), draws_stride=draws.stride(0), table_stride=table.stride(0),
            V=vocab, G=groups, D=width, **chosen, num_warps=NUM_WARPS, **BUILD_OPTIONS,
        )  # fmt: skip
    return result
