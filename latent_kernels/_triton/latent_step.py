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

1. The sidecar gives log Z. At most 0.6 of the maxima of COARSE sets of ids are above the first frontier.
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

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from latent_kernels._triton.common import (
    GUMBEL_HIGH,
    GUMBEL_LOW,
    MAX_REGISTERS,
    counter_option,
    philox_words,
    row_option,
)
from latent_kernels._triton.latent_logprob_terms import UNUSED_ID, component_terms
from latent_kernels._triton.latent_segment import latent_segment
from latent_kernels._triton.lm_head import GROUP, Sidecar
from latent_kernels._triton.text_token import KEPT, NOTHING, cut_segment, tempered_sum, whole_token
from latent_kernels._triton.token_keys import LOWEST, frontier_at, key_id, key_value
from latent_kernels._triton.token_prefix import (
    coarse_order,
    frontier_of_rank,
    gather_segment,
    narrower_frontier,
    read_sidecar,
)
from latent_kernels._types import DecodingStep, LatentStep, LatentStepOptions, TextOptions

BUFFER = 256  # tokens of one segment
COARSE = 256  # sets of runs whose maxima are sorted
NUM_WARPS = 8
TILE = 1024  # logits gathered together, 4 per thread
RUNS = 2048  # runs of ids whose maxima a program holds, 8 per thread
MIX_TILE = 1024  # elements of the mixture computed together, 4 per thread
# With 128 registers, two blocks of 8 warps run on a multiprocessor. Older releases of Triton need up to 232.
FEW_REGISTERS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
# Without fusion, scores are rounded after each operation, as PyTorch rounds them.
BUILD_OPTIONS = {"maxnreg": 128 if FEW_REGISTERS else MAX_REGISTERS, "enable_fp_fusion": False}
ONE_WAVE = 132  # rows that one block a multiprocessor computes at a time on an H100


@triton.jit
def ends_run(first, end_token_id, step, least):
    """Return whether a first id ends a run at this step: it is the end marker, and `least` steps have been taken."""
    return (first == end_token_id) & ((step >= least) | (least <= 0))


@triton.jit
def store_mixture(
    ids, scores, tau, hard, row, ids_ptr, scores_ptr, weights_ptr, mixture_ptr, table_ptr, table_stride, V, D,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store ids and scores [BLOCK_K] of a row, their weights, and the mixture of table rows.

    A hard row has one component, the first, and the others are marked as unused.
    """
    k = tl.arange(0, BLOCK_K)
    ids = tl.minimum(tl.where(k < K, ids, 0), V - 1).to(tl.int64)
    components = tl.where(hard, 1, K)
    used = k < components
    exponents = tl.where(used & (scores != -float("inf")), scores / tau, -float("inf"))
    weights = tl.exp(exponents - tl.max(exponents, 0))
    weights = weights / tl.sum(weights, 0)
    tl.store(ids_ptr + row * K + k, tl.where(used, ids, UNUSED_ID), mask=k < K)
    tl.store(scores_ptr + row * K + k, scores, mask=k < K)
    tl.store(weights_ptr + row * K + k, weights, mask=k < K)
    tl.debug_barrier()  # every thread reads what some threads have stored
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mixed = tl.zeros([BLOCK_D], dtype=tl.float32)
        for i in tl.range(0, K, loop_unroll_factor=4):  # the loads overlap
            inside = d < tl.where(i < components, D, 0)
            table = tl.load(table_ptr + tl.load(ids_ptr + row * K + i) * table_stride + d, mask=inside, other=0.0)
            mixed += tl.load(weights_ptr + row * K + i) * table.to(tl.float32)
        tl.store(mixture_ptr + row * D + d, mixed.to(mixture_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def store_logprob(
    logits_ptr, ids, scores, hard, token, peak, inverse, total, log_z, row, logprob_ptr, K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store the log-prob of the token of a hard row, or of a latent step (Eq. 15).

    total: the sum of exp((logit - peak) * inverse) over the row.
    """
    k = tl.arange(0, BLOCK_K)
    logits = tl.load(logits_ptr + ids, mask=k < K, other=0.0).to(tl.float32)
    terms, _, _ = component_terms(logits - log_z, scores, -float("inf"), 0)
    latent = tl.sum(tl.where(k < K, terms, 0.0), 0) / K
    of_token = (tl.load(logits_ptr + token).to(tl.float32) - peak) * inverse - tl.log(total)
    tl.store(logprob_ptr + row, tl.where(hard, of_token, latent))


# Pointers into a batch can have any alignment, and the counters any value. Specialisation is disabled so that no
# variant is compiled during a rollout.
@triton.jit(
    do_not_specialize=["noisy_end_id", "end_token_id", "least", "most", "seed", "step", "step_stride", "text_top_k"],
    do_not_specialize_on_alignment=["latent_ptr", "row_ids_ptr", "uniform_ptr"],
)
def latent_step_kernel(
    logits_ptr, maxima_ptr, sums_ptr, draws_ptr, uniform_ptr, row_ids_ptr, latent_ptr, table_ptr, list_ptr, buffer_ptr,
    ids_ptr, scores_ptr, weights_ptr, mixture_ptr, top_ptr, is_latent_ptr, logprob_ptr,
    top_p, tau, scale, delta, seed, step, step_stride, end_token_id, noisy_end_id, least, most,
    temperature, text_top_k, text_top_p, logits_stride, draws_stride, table_stride, V, G, D,
    NOISE: tl.constexpr, INJECTED: tl.constexpr, ONE_SIDED: tl.constexpr, HAS_ROW_IDS: tl.constexpr,
    HAS_MASK: tl.constexpr, TOP_P_PER_ROW: tl.constexpr, TAU_PER_ROW: tl.constexpr, SCALE_PER_ROW: tl.constexpr,
    SEED_TENSOR: tl.constexpr, STEP_TENSOR: tl.constexpr, TEXT: tl.constexpr, HAS_UNIFORM: tl.constexpr,
    RUN: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, COARSE: tl.constexpr, K: tl.constexpr,
    N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program computes the step of one row. list [B, G] and buffer [B, N] are scratch.

    A run ends at a raw argmax of `end_token_id` or a noisy one of `noisy_end_id`, after at least `least` steps, or once
    `most` steps are taken. -1 stands for no such token and no such limit. TEXT says what a row outside a run gets: the
    noise-free mixture ("none"), or a token of its own, "greedy", from the "whole" distribution or from a "cut" one.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    maxima_ptr += row * G
    sums_ptr += row * G
    list_ptr += row * G
    buffer_ptr += row * N

    in_run = row >= 0  # always
    if HAS_MASK:
        in_run = tl.load(latent_ptr + row) != 0
    noise_row = row
    if HAS_ROW_IDS:
        noise_row = tl.load(row_ids_ptr + row)
    inverse = 1.0
    temperature, text_top_p = tl.cast(temperature, tl.float32), tl.cast(text_top_p, tl.float32)
    if TEXT == "whole" or TEXT == "cut":
        inverse = tl.where(in_run, 1.0, 1.0 / temperature)
    total, heights, highest_key = read_sidecar(logits_ptr, maxima_ptr, sums_ptr, inverse, V, G, BLOCK_G, RUN, WIDTH)
    peak, top_token = key_value(highest_key), key_id(highest_key)
    log_z = peak * inverse + tl.log(total)
    seed, step = counter_option(seed, SEED_TENSOR), counter_option(step, STEP_TENSOR, row * step_stride)
    latent = in_run & (ends_run(top_token, end_token_id, step, least) == 0) & ((step < most) | (most < 0))
    noisy = latent if NOISE else latent & False
    limit = row_option(top_p, row, TOP_P_PER_ROW)
    limit = tl.where(limit < 1.0, limit, float("inf"))  # top_p = 1 keeps all tokens, whatever rounding does to the mass
    # A row without noise gets the noise-free mixture: the softmax of its log-probs.
    tau = tl.where(noisy, row_option(tau, row, TAU_PER_ROW), 1.0)
    scale = tl.where(noisy, row_option(scale, row, SCALE_PER_ROW), 0.0)
    span = scale * (GUMBEL_HIGH - GUMBEL_LOW)
    largest = scale * GUMBEL_HIGH
    if ONE_SIDED:
        largest = scale * (GUMBEL_HIGH - GUMBEL_LOW + delta)

    highest, nucleus = coarse_order(
        heights, log_z, inverse, tl.where(in_run, limit, text_top_p), COARSE, BLOCK_G
    )  # fmt: skip
    first_rank = tl.maximum(tl.where(noisy, nucleus, 0), K)
    # At least K scores reach the K-th of these tokens and the least noise.
    kth = frontier_of_rank(highest, K, COARSE)
    reach = tl.where(kth == LOWEST, LOWEST, frontier_at(key_value(kth) - span))
    # How a text row is cut. Of other kinds of text, nothing of this is left in the machine code.
    cut = row < 0  # never
    draw = tl.full([], 0.0, dtype=tl.float64)
    known = tl.where(text_top_k < V, NOTHING, KEPT)
    kept = total.to(tl.float64)
    nucleus_mass = kept
    chosen = highest_key
    settled = tl.full([], 0, dtype=tl.int32)
    if TEXT == "whole" or TEXT == "cut":
        if HAS_UNIFORM:
            draw = tl.load(uniform_ptr + row)
        else:
            draw = (philox_words(row * 0, noise_row, seed, step).to(tl.float64) + 0.5) * 2.0**-32
    if TEXT == "cut":
        cut = in_run == 0
        first_rank = tl.where(cut, tl.minimum(nucleus, text_top_k), first_rank)
        reach = tl.where(cut, LOWEST, reach)
    elif TEXT != "none":
        settled = tl.where(in_run, 0, 1)

    rank = first_rank
    frontier = tl.maximum(reach, frontier_of_rank(highest, rank, COARSE))
    ceiling = highest_key
    n = tl.arange(0, N)
    best = tl.full([BLOCK_K], LOWEST, dtype=tl.int64)
    mass = tl.full([], 0.0, dtype=tl.float64)
    taken = tl.full([], 0, dtype=tl.int32)
    while settled == 0:
        count = gather_segment(logits_ptr, list_ptr, buffer_ptr, heights, frontier, ceiling, V, WIDTH, BLOCK_G, TILE, N)
        keys = tl.sort(tl.load(buffer_ptr + n, mask=n < count, other=LOWEST), descending=True)
        if count > N:
            frontier = narrower_frontier(keys, count, frontier, N)
        else:
            if cut:
                known, kept, nucleus_mass, chosen, done, again, segment = cut_segment(
                    keys, count, mass, taken, frontier == LOWEST, peak, temperature, text_top_k, text_top_p, draw,
                    known, kept, nucleus_mass, chosen, N,
                )  # fmt: skip
                needed = tl.full([], LOWEST, dtype=tl.int64)
            else:
                best, segment, done, needed = latent_segment(
                    keys, count, frontier, best, mass, taken, log_z, limit, noisy, scale, delta, largest, row,
                    noise_row, draws_ptr, draws_stride, seed, step, NOISE, INJECTED, ONE_SIDED, K, BLOCK_K, N,
                )  # fmt: skip
                again = done & False
            settled = done.to(tl.int32)
            mass = tl.where(again, 0.0, mass + segment)
            taken = tl.where(again, 0, taken + count)
            ceiling = tl.where(again, highest_key, frontier)
            # About 0.7 COARSE tokens are between this rank and the last.
            rank = tl.where(again, first_rank, rank + (COARSE - rank) // 2 + 1)
            frontier = tl.maximum(needed, frontier_of_rank(highest, rank, COARSE))

    noisy_end = noisy & ends_run(key_id(tl.max(best, 0)), noisy_end_id, step, least)
    latent = latent & (noisy_end == 0)
    token = key_id(chosen)
    if TEXT == "whole":  # noqa: SIM102 - one condition at compile time, the other at run time
        if in_run == 0:
            token = whole_token(
                logits_ptr, maxima_ptr, sums_ptr, peak, temperature, draw, V, G, COARSE, BLOCK_G // COARSE * RUN,
                BLOCK_G // COARSE * WIDTH,
            )  # fmt: skip
    token = tl.where(latent | (in_run == 0), token, end_token_id)
    tl.store(top_ptr + row, token.to(tl.int64))
    tl.store(is_latent_ptr + row, latent.to(tl.int8))
    ids, scores = key_id(best), tl.where(noisy, key_value(best), key_value(best) - log_z)
    hard = False
    if TEXT != "none":
        hard = latent == 0
        ids, scores = tl.where(hard, token, ids), tl.where(hard, 0.0, scores)
        if TEXT == "whole" or TEXT == "cut":
            inverse = 1.0 / temperature
            if in_run & hard & (temperature != 1.0):  # the sums of a row that ends are those of its latent run
                total = tempered_sum(logits_ptr, peak, inverse, V, 4 * TILE)
        store_logprob(logits_ptr, ids, scores, hard, token, peak, inverse, total, log_z, row, logprob_ptr, K, BLOCK_K)
    store_mixture(
        ids, scores, tau, hard, row, ids_ptr, scores_ptr, weights_ptr, mixture_ptr, table_ptr, table_stride, V, D,
        K, BLOCK_K, BLOCK_D,
    )  # fmt: skip


def constants(vocab: int, options: LatentStepOptions, text: TextOptions | None = None) -> dict[str, Any]:
    """Return the constants of the kernel. Without `text`, rows outside a latent run get no token of their own."""
    block_k, groups = (triton.next_power_of_2(size) for size in (options.top_k, triton.cdiv(vocab, GROUP)))
    block_g = min(groups, RUNS)
    run = groups // block_g
    return {
        "NOISE": options.noise != "none", "ONE_SIDED": options.noise == "one_sided",
        "INJECTED": options.exponential is not None, "HAS_ROW_IDS": options.row_ids is not None,
        "HAS_MASK": options.latent_mask is not None,
        "TOP_P_PER_ROW": isinstance(options.top_p, Tensor), "TAU_PER_ROW": isinstance(options.tau, Tensor),
        "SCALE_PER_ROW": isinstance(options.noise_scale, Tensor), "SEED_TENSOR": isinstance(options.seed, Tensor),
        "STEP_TENSOR": isinstance(options.step, Tensor), "TEXT": "none" if text is None else text.kind(vocab),
        "HAS_UNIFORM": text is not None and text.uniform is not None, "RUN": run, "WIDTH": run * GROUP, "TILE": TILE,
        "COARSE": min(COARSE, block_g), "K": options.top_k, "N": BUFFER, "BLOCK_K": block_k, "BLOCK_G": block_g,
        "BLOCK_D": MIX_TILE,
    }  # fmt: skip


def launch_options(rows: int) -> dict[str, int | bool]:
    """Return the launch options of the kernel: with so many registers that one block fits, more rows take 4 warps."""
    return {"num_warps": NUM_WARPS if FEW_REGISTERS or rows <= ONE_WAVE else NUM_WARPS // 2, **BUILD_OPTIONS}


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
    return _launch(sidecar, embedding, options, None)[0]


def decoding_step_from_sidecar(
    sidecar: Sidecar, embedding: Tensor, options: LatentStepOptions, text: TextOptions
) -> DecodingStep:  # fmt: skip
    """Compute the step of latent and text rows from a sidecar whose sums are those of `text` on text rows."""
    step, logprob = _launch(sidecar, embedding, options, text)
    return DecodingStep(step.ids, step.scores, step.embedding, step.top_token, step.is_latent, logprob)


def _launch(
    sidecar: Sidecar, embedding: Tensor, options: LatentStepOptions, text: TextOptions | None
) -> tuple[LatentStep, Tensor]:  # fmt: skip
    """Run the kernel. Return its step, and log-probs [B] that it writes for decoding only."""
    logits, rows, (vocab, width) = sidecar.logits, len(sidecar.maxima), embedding.shape
    groups, step = sidecar.maxima.shape[1], options.step
    table = embedding if embedding.stride(1) == 1 else embedding.contiguous()
    unused = logits  # a placeholder pointer for options that were not given; the kernel does not read it
    draws = unused if options.exponential is None else options.exponential
    draws = draws if draws.stride(1) == 1 else draws.contiguous()
    mask = unused if options.latent_mask is None else options.latent_mask.contiguous().view(torch.int8)
    row_ids = unused if options.row_ids is None else options.row_ids.contiguous()
    chosen = constants(vocab, options, text)
    text = TextOptions() if text is None else text

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
    logprob = empty(torch.float32)
    if rows:
        latent_step_kernel[(rows,)](
            logits_ptr=logits, maxima_ptr=sidecar.maxima, sums_ptr=sidecar.sums, draws_ptr=draws,
            uniform_ptr=unused if text.uniform is None else text.uniform.contiguous(), row_ids_ptr=row_ids,
            latent_ptr=mask, table_ptr=table, list_ptr=empty(torch.int32, groups),
            buffer_ptr=empty(torch.int64, chosen["N"]), ids_ptr=result.ids, scores_ptr=result.scores,
            weights_ptr=result.weights, mixture_ptr=result.embedding, top_ptr=result.top_token,
            is_latent_ptr=result.is_latent.view(torch.int8), logprob_ptr=logprob, top_p=per_row(options.top_p, rows),
            tau=per_row(options.tau, rows), scale=per_row(options.noise_scale, rows), delta=float(options.noise_delta),
            seed=0 if options.seed is None else options.seed, step=step,
            step_stride=step.stride(0) if isinstance(step, Tensor) and step.ndim else 0, **end_arguments(options),
            temperature=text.temperature or 1.0, text_top_k=text.top_k or vocab, text_top_p=text.top_p,
            logits_stride=logits.stride(0), draws_stride=draws.stride(0), table_stride=table.stride(0),
            V=vocab, G=groups, D=width, **chosen, **launch_options(rows),
        )  # fmt: skip
    return result, logprob
