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

1. The sidecar gives log Z. At most half of the maxima of COARSE sets of ids are above the first frontier.
2. The tokens above the frontier are gathered into a buffer of N and sorted. Their exclusive cumulative mass decides the
   nucleus.
3. If the prefix does not settle the result, a lower frontier gives the next segment of the order. The mass and the K
   best so far are carried over.
4. A segment that overflows the buffer is tried again with a higher frontier.

So no row needs a launch of its own, and the last segment is at worst the rest of the vocabulary. Half of the rows of
real text settle within 16 tokens. A nearly uniform row settles after about 20 * top_k tokens, because 4.9% of all
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
from latent_kernels._triton.token_keys import (
    ABSENT,
    HIGHEST,
    LOWEST,
    frontier_at,
    height_value,
    key_id,
    key_value,
    sortable,
    token_key,
)
from latent_kernels._types import LatentStep, LatentStepOptions

BUFFER = 256  # tokens of one segment
COARSE = 256  # sets of runs whose maxima are sorted
NUM_WARPS = 8
TILE = 1024  # logits gathered together, 4 per thread
RUNS = 2048  # runs of ids whose maxima a program holds, 8 per thread
MIX_TILE = 1024  # elements of the mixture computed together, 4 per thread
# With 128 registers, two blocks run on a multiprocessor. Older releases of Triton need up to 212.
REGISTERS = 128 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else MAX_REGISTERS
# Without fusion, scores are rounded after each operation, as PyTorch rounds them.
BUILD_OPTIONS = {"maxnreg": REGISTERS, "enable_fp_fusion": False}


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
def keep_best(best, keys, BLOCK_K: tl.constexpr):
    """Return the BLOCK_K highest of two sets of keys, in falling order. LOWEST marks an empty place and may repeat."""
    if BLOCK_K == 1:
        return tl.maximum(best, tl.max(keys, 0))
    return tl.topk(tl.interleave(best, tl.topk(keys, BLOCK_K)), BLOCK_K)


@triton.jit
def read_sidecar(logits_ptr, maxima_ptr, sums_ptr, V, G, BLOCK_G: tl.constexpr, RUN: tl.constexpr, WIDTH: tl.constexpr):
    """Return log Z, the sortable maxima of runs of WIDTH ids, RUN groups each [BLOCK_G], and the row's highest key."""
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
        total += tl.load(sums_ptr + group, mask=group < G, other=0.0) * tl.exp(maxima - peak)
    log_z = peak + tl.log(tl.sum(total, 0))
    first = tl.min(tl.where(heights == tl.max(heights, 0), run, BLOCK_G), 0)
    v = first * WIDTH + tl.arange(0, WIDTH)
    logits = tl.load(logits_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32)
    return log_z, heights, tl.max(tl.where(v < V, token_key(logits, v), LOWEST), 0)


@triton.jit
def frontier_of_rank(highest, rank, COARSE: tl.constexpr):
    """Return a key just below the `rank`-th of the sorted maxima [COARSE], or LOWEST beyond them."""
    height = tl.min(tl.where(tl.arange(0, COARSE) < rank, highest, 0x7FFFFFFF), 0)
    return tl.where((rank > COARSE) | (height == ABSENT), LOWEST, (height.to(tl.int64) << 32) - 1)


@triton.jit
def first_frontier(
    heights, log_z, limit, span, noisy, K: tl.constexpr, COARSE: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Return sorted maxima [COARSE], the rank among them of the first frontier, and that frontier.

    At least K tokens are above the frontier, and about 0.7 COARSE at most. Or nothing below it matters.
    """
    highest = tl.max(tl.reshape(heights, [BLOCK_G // COARSE, COARSE]), 0)
    if COARSE > 1:
        highest = tl.sort(highest, descending=True)
    # With the mass of these tokens alone, the nucleus ends at this rank or before it.
    mass = tl.cumsum(tl.where(highest == ABSENT, 0.0, tl.exp(height_value(highest) - log_z)), 0)
    nucleus = tl.minimum(tl.sum((mass < limit).to(tl.int32), 0) + 1, COARSE // 2)
    rank = tl.maximum(tl.where(noisy, nucleus, 0), K)
    # At least K scores reach the K-th of these tokens and the least noise.
    kth = frontier_of_rank(highest, K, COARSE)
    reach = tl.where(kth == LOWEST, LOWEST, frontier_at(key_value(kth) - span))
    return highest, rank, tl.maximum(reach, frontier_of_rank(highest, rank, COARSE))


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
def narrower_frontier(keys, count, frontier, N: tl.constexpr):
    """Return a higher frontier for a segment of `count` > N tokens, given the N sorted keys with the lowest ids."""
    # These N are a sample of the segment: about three quarters of a buffer are above this rank of it. Tokens that tie
    # are in the order of their keys, so all N come first. Unless other tokens are above them: then N do not fit.
    rank = tl.maximum(3 * N * N // (4 * count), 3)
    sampled = tl.sum(tl.where(tl.arange(0, N) == rank, keys, 0), 0)
    lowest = tl.min(keys, 0)
    tied = (key_value(tl.max(keys, 0)) == key_value(lowest)) & (lowest - 1 > frontier)
    return tl.where(tied, lowest - 1, sampled)


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
    tl.debug_barrier()  # every thread reads what some threads have stored
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mixed = tl.zeros([BLOCK_D], dtype=tl.float32)
        for i in tl.range(0, K, loop_unroll_factor=4):  # the loads overlap
            table = tl.load(table_ptr + tl.load(ids_ptr + row * K + i) * table_stride + d, mask=d < D, other=0.0)
            mixed += tl.load(weights_ptr + row * K + i) * table.to(tl.float32)
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
    SEED_TENSOR: tl.constexpr, STEP_TENSOR: tl.constexpr, RUN: tl.constexpr, WIDTH: tl.constexpr,
    TILE: tl.constexpr, COARSE: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program computes the step of one row. list [B, G] and buffer [B, N] are scratch.

    A run ends at a raw argmax of `end_token_id` or a noisy one of `noisy_end_id`, after at least `least` steps, or once
    `most` steps are taken. -1 stands for no such token and no such limit.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    list_ptr += row * G
    buffer_ptr += row * N

    log_z, heights, ceiling = read_sidecar(
        logits_ptr, maxima_ptr + row * G, sums_ptr + row * G, V, G, BLOCK_G, RUN, WIDTH
    )  # fmt: skip
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

    highest, rank, frontier = first_frontier(heights, log_z, limit, span, noisy, K, COARSE, BLOCK_G)
    n = tl.arange(0, N)
    best = tl.full([BLOCK_K], LOWEST, dtype=tl.int64)
    mass = tl.full([], 0.0, dtype=tl.float64)
    taken = tl.full([], 0, dtype=tl.int32)
    settled = tl.full([], 0, dtype=tl.int32)
    while settled == 0:
        count = gather_segment(logits_ptr, list_ptr, buffer_ptr, heights, frontier, ceiling, V, WIDTH, BLOCK_G, TILE, N)
        inside = n < count
        keys = tl.sort(tl.load(buffer_ptr + n, mask=inside, other=LOWEST), descending=True)
        if count > N:
            frontier = narrower_frontier(keys, count, frontier, N)
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
            best = keep_best(best, tl.where(candidate, keys, LOWEST), BLOCK_K)
            mass += tl.sum(probs, 0)
            taken += count

            done, needed = conclude(best, frontier, log_z, noisy, largest, mass >= limit, K, BLOCK_K)
            settled = done.to(tl.int32)
            ceiling = frontier
            # About 0.7 COARSE tokens are between this rank and the last.
            rank += (COARSE - rank) // 2 + 1
            frontier = tl.maximum(needed, frontier_of_rank(highest, rank, COARSE))

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
    block_k, groups = (triton.next_power_of_2(size) for size in (options.top_k, triton.cdiv(vocab, GROUP)))
    block_g = min(groups, RUNS)
    run = groups // block_g
    return {
        "NOISE": options.noise != "none", "ONE_SIDED": options.noise == "one_sided",
        "INJECTED": options.exponential is not None, "HAS_ROW_IDS": options.row_ids is not None,
        "HAS_MASK": options.latent_mask is not None,
        "TOP_P_PER_ROW": isinstance(options.top_p, Tensor), "TAU_PER_ROW": isinstance(options.tau, Tensor),
        "SCALE_PER_ROW": isinstance(options.noise_scale, Tensor), "SEED_TENSOR": isinstance(options.seed, Tensor),
        "STEP_TENSOR": isinstance(options.step, Tensor), "RUN": run, "WIDTH": run * GROUP, "TILE": TILE,
        "COARSE": min(COARSE, block_g), "K": options.top_k, "N": BUFFER, "BLOCK_K": block_k, "BLOCK_G": block_g,
        "BLOCK_D": MIX_TILE,
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
