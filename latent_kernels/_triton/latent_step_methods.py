"""The latent steps of SofT-GRPO and Multiplex Thinking, one program per row.

Both kernels start from the noise-free step of `latent_kernels._triton.latent_step`, which hard rows keep. They replace
ids, scores, weights and mixture of latent rows in place, and apply the noisy end rule.

    soft_grpo  p = softmax of the K highest logits, q = p inside the nucleus, normalised; score = log(q + 1e-6) + noise
    multiplex  id_k = the first id whose cumulative probability is above u_k,  score = log p(id_k)
    both       weights = softmax(scores / tau),  mixture = sum_k weights_k table[ids_k]

A draw of multiplex picks a run of 128 ids from the sidecar, whose masses are summed in float64, then an id in the
run. So it neither sorts nor reads the vocabulary. soft_grpo reads it once, to count the tokens that tie with the
K-th. There is no backward pass, and the results repeat bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from latent_kernels._triton.common import (
    MAX_REGISTERS,
    counter_option,
    exponential_draws,
    gumbel_noise,
    philox_words,
    row_option,
)
from latent_kernels._triton.latent_step import constants as step_constants
from latent_kernels._triton.latent_step import ends_run, latent_step_from_sidecar, per_row, store_mixture
from latent_kernels._triton.lm_head import GROUP, Sidecar
from latent_kernels._triton.text_token import pick
from latent_kernels._triton.token_keys import LOWEST, key_id, key_value, token_key
from latent_kernels._types import LatentStep, LatentStepOptions
from latent_kernels.reference import latent_step as steps

SOFT_GRPO_FLOOR = tl.constexpr(steps.SOFT_GRPO_FLOOR)
SOFT_GRPO_WARPS, MULTIPLEX_WARPS = 4, 8
# Without fusion, scores are rounded after each operation, as PyTorch rounds them.
BUILD_OPTIONS = {"maxnreg": MAX_REGISTERS, "enable_fp_fusion": False}
WIDTH = 128  # ids of a run, whose masses multiplex adds up first
TILE = tl.constexpr(2048)  # logits compared together, 16 per thread
COUNTERS = ["noisy_end_id", "least", "seed", "step", "step_stride"]  # no value of them compiles a variant


@triton.jit
def end_by_first_id(first, noisy_end_id, step, least, row, top_ptr, is_latent_ptr):
    """Mark a row as ended whose mixture starts with the end marker (the noisy end rule)."""
    if ends_run(first, noisy_end_id, step, least):
        tl.store(top_ptr + row, first.to(tl.int64))
        tl.store(is_latent_ptr + row, 0)


@triton.jit(do_not_specialize=COUNTERS, do_not_specialize_on_alignment=["row_ids_ptr"])
def soft_grpo_kernel(
    logits_ptr, draws_ptr, row_ids_ptr, table_ptr, ids_ptr, scores_ptr, weights_ptr, mixture_ptr, top_ptr,
    is_latent_ptr, top_p, tau, scale, delta, seed, step, step_stride, noisy_end_id, least, logits_stride, draws_stride,
    table_stride, V, D,
    NOISE: tl.constexpr, INJECTED: tl.constexpr, ONE_SIDED: tl.constexpr, HAS_ROW_IDS: tl.constexpr,
    TOP_P_PER_ROW: tl.constexpr, TAU_PER_ROW: tl.constexpr, SCALE_PER_ROW: tl.constexpr, SEED_TENSOR: tl.constexpr,
    STEP_TENSOR: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Replace the mixture of a latent row by that of SofT-GRPO: noise on the K most probable ids."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    ids = tl.load(ids_ptr + row * K + k, mask=k < K, other=0).to(tl.int32)
    latent = tl.load(is_latent_ptr + row) != 0
    step = counter_option(step, STEP_TENSOR, row * step_stride)
    tl.debug_barrier()  # every thread has read what some thread overwrites
    if latent:
        logits = tl.load(logits_ptr + row * logits_stride + ids, mask=k < K, other=-float("inf")).to(tl.float32)
        probs = tl.exp(logits - tl.max(logits, 0))
        probs = probs / tl.sum(probs, 0)
        higher = logits[None, :] > logits[:, None]
        before = tl.sum(tl.where(higher, tl.broadcast_to(probs[None, :], [BLOCK_K, BLOCK_K]), 0.0), 1)
        worst = tl.min(tl.where(k < K, logits, float("inf")), 0)
        tied = -tl.sum(((k < K) & (logits == worst)).to(tl.int32), 0)
        for start in range(0, V, TILE):
            v = start + tl.arange(0, TILE)
            inside = tl.load(logits_ptr + row * logits_stride + v, mask=v < V, other=float("nan")).to(tl.float32)
            tied += tl.sum((inside == worst).to(tl.int32), 0)
        # The mass of the nucleus counts all tokens that tie with the K-th, as in the reference.
        before = before / (1.0 + tied * tl.min(tl.where(k < K, probs, 1.0), 0))
        limit = row_option(top_p, row, TOP_P_PER_ROW)
        limit = tl.where(limit < 1.0, limit, float("inf"))  # top_p = 1 keeps all tokens, whatever rounding does
        probs = tl.where((before < limit) | (before == 0.0), probs, 0.0)
        scores = tl.log(probs / tl.sum(probs, 0) + SOFT_GRPO_FLOOR)
        temperature = tl.cast(1.0, tl.float32)
        if NOISE:
            temperature = row_option(tau, row, TAU_PER_ROW)
            if INJECTED:
                draws = tl.load(draws_ptr + row * draws_stride + ids, mask=k < K, other=1.0).to(tl.float32)
            else:
                noise_row = row
                if HAS_ROW_IDS:
                    noise_row = tl.load(row_ids_ptr + row)
                draws = exponential_draws(ids, noise_row, counter_option(seed, SEED_TENSOR), step)
            scores += gumbel_noise(draws, delta, ONE_SIDED) * row_option(scale, row, SCALE_PER_ROW)
        keys = tl.where(k < K, token_key(scores, ids), LOWEST)
        best = keys
        if BLOCK_K > 1:
            best = tl.sort(keys, descending=True)
        store_mixture(
            key_id(best), key_value(best), temperature, False, row, ids_ptr, scores_ptr, weights_ptr, mixture_ptr,
            table_ptr, table_stride, V, D, K, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        end_by_first_id(key_id(tl.max(best, 0)), noisy_end_id, step, least, row, top_ptr, is_latent_ptr)


@triton.jit(do_not_specialize=COUNTERS, do_not_specialize_on_alignment=["row_ids_ptr"])
def multiplex_kernel(
    logits_ptr, maxima_ptr, sums_ptr, draws_ptr, row_ids_ptr, table_ptr, ids_ptr, scores_ptr, weights_ptr, mixture_ptr,
    top_ptr, is_latent_ptr, tau, seed, step, step_stride, noisy_end_id, least, logits_stride, draws_stride,
    table_stride, V, G, D,
    INJECTED: tl.constexpr, HAS_ROW_IDS: tl.constexpr, TAU_PER_ROW: tl.constexpr, SEED_TENSOR: tl.constexpr,
    STEP_TENSOR: tl.constexpr, RUN: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Replace the mixture of a latent row by K independent draws from the row's distribution."""
    row = tl.program_id(0).to(tl.int64)
    latent = tl.load(is_latent_ptr + row) != 0
    step = counter_option(step, STEP_TENSOR, row * step_stride)
    tl.debug_barrier()  # every thread has read what some thread overwrites
    if latent:
        k, group, member = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_G * RUN), tl.arange(0, WIDTH)
        if INJECTED:
            draws = tl.exp(-tl.load(draws_ptr + row * draws_stride + k, mask=k < K, other=1.0).to(tl.float64))
        else:
            noise_row = row
            if HAS_ROW_IDS:
                noise_row = tl.load(row_ids_ptr + row)
            words = philox_words(k, noise_row, counter_option(seed, SEED_TENSOR), step)
            draws = (words.to(tl.float64) + 0.5) * 2.0**-32
        maxima = tl.load(maxima_ptr + row * G + group, mask=group < G, other=-float("inf"))
        sums = tl.load(sums_ptr + row * G + group, mask=group < G, other=0.0)
        peak = tl.max(maxima, 0)
        masses = sums.to(tl.float64) * tl.exp((maxima - peak).to(tl.float64))
        masses, run = tl.sum(tl.reshape(masses, [BLOCK_G, RUN]), 1), tl.arange(0, BLOCK_G)
        ends = tl.cumsum(masses, 0)
        log_z = peak + tl.log(tl.sum(sums * tl.exp(maxima - peak), 0))
        ids = tl.zeros([BLOCK_K], dtype=tl.int32)
        scores = tl.full([BLOCK_K], -float("inf"), dtype=tl.float32)
        for i in range(K):
            picked, share = pick(masses, ends, run, tl.sum(tl.where(k == i, draws, 0.0), 0))
            v = picked * WIDTH + member
            logits = tl.load(logits_ptr + row * logits_stride + v, mask=v < V, other=-float("inf")).to(tl.float32)
            inner = tl.exp((logits - tl.max(logits, 0)).to(tl.float64))
            index, _ = pick(inner, tl.cumsum(inner, 0), member, share)
            ids = tl.where(k == i, picked * WIDTH + index, ids)
            scores = tl.where(k == i, tl.sum(tl.where(member == index, logits, 0.0), 0) - log_z, scores)
        store_mixture(
            ids, scores, row_option(tau, row, TAU_PER_ROW), False, row, ids_ptr, scores_ptr, weights_ptr, mixture_ptr,
            table_ptr, table_stride, V, D, K, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        first = tl.sum(tl.where(k == 0, ids, 0), 0)
        end_by_first_id(first, noisy_end_id, step, least, row, top_ptr, is_latent_ptr)


def constants(vocab: int, options: LatentStepOptions) -> dict[str, int | bool]:
    """Return the constants of the kernel of `options.method`."""
    chosen = {**step_constants(vocab, options), "RUN": WIDTH // GROUP, "WIDTH": WIDTH}
    chosen["BLOCK_G"] = triton.next_power_of_2(triton.cdiv(vocab, WIDTH))
    shared = ["INJECTED", "HAS_ROW_IDS", "TAU_PER_ROW", "SEED_TENSOR", "STEP_TENSOR", "K", "BLOCK_K", "BLOCK_D"]
    soft_grpo, multiplex = ["NOISE", "ONE_SIDED", "TOP_P_PER_ROW", "SCALE_PER_ROW"], ["RUN", "WIDTH", "BLOCK_G"]
    return {name: chosen[name] for name in shared + (soft_grpo if options.method == "soft_grpo" else multiplex)}


def latent_step_with_method(sidecar: Sidecar, embedding: Tensor, options: LatentStepOptions) -> LatentStep:
    """Compute the step of any method from the logits of a sidecar. Arguments are checked; V is `len(embedding)`."""
    if options.method == "latent_grpo" or (options.method == "multiplex" and options.noise == "none"):
        return latent_step_from_sidecar(sidecar, embedding, options)
    table = embedding if embedding.stride(1) == 1 else embedding.contiguous()
    result = latent_step_from_sidecar(sidecar, table, steps.clean_options(options))
    rows, (vocab, width) = len(result.ids), table.shape
    if not rows:
        return result
    unused = sidecar.logits  # a placeholder pointer for options that were not given; the kernel does not read it
    draws = unused if options.exponential is None else options.exponential
    draws = draws if draws.stride(1) == 1 else draws.contiguous()
    step, end = options.step, options.end_token_id
    arguments = dict(
        logits_ptr=sidecar.logits, draws_ptr=draws,
        row_ids_ptr=unused if options.row_ids is None else options.row_ids.contiguous(), table_ptr=table,
        ids_ptr=result.ids, scores_ptr=result.scores, weights_ptr=result.weights, mixture_ptr=result.embedding,
        top_ptr=result.top_token, is_latent_ptr=result.is_latent.view(torch.int8), tau=per_row(options.tau, rows),
        seed=0 if options.seed is None else options.seed, step=step,
        step_stride=step.stride(0) if isinstance(step, Tensor) and step.ndim else 0,
        noisy_end_id=end if options.end_rule == "noisy" and end is not None else -1, least=options.min_latent_steps,
        logits_stride=sidecar.logits.stride(0), draws_stride=draws.stride(0), table_stride=table.stride(0),
        V=vocab, D=width, **constants(vocab, options), **BUILD_OPTIONS,
    )  # fmt: skip
    if options.method == "soft_grpo":
        soft_grpo_kernel[(rows,)](
            **arguments, top_p=per_row(options.top_p, rows), scale=per_row(options.noise_scale, rows),
            delta=float(options.noise_delta), num_warps=SOFT_GRPO_WARPS,
        )  # fmt: skip
    else:
        multiplex_kernel[(rows,)](
            **arguments, maxima_ptr=sidecar.maxima, sums_ptr=sidecar.sums, G=sidecar.maxima.shape[1],
            num_warps=MULTIPLEX_WARPS,
        )  # fmt: skip
    return result
