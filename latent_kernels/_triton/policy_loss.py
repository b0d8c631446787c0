"""The clipped policy loss of response steps, its gradient and its statistics in one pass (SPEC 6; Eq. 22-23).

Bytes: every input once and the gradient once. A program sums its steps into one row of partial sums, which PyTorch adds
up: no atomics, and the same result in any run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from latent_kernels import reference
from latent_kernels._loss_types import SUMS, LossSpec, StepLosses, loss_and_stats
from latent_kernels._types import PolicyStats

LOG_RATIO_MAX = tl.constexpr(reference.LOG_RATIO_MAX)
KL_MAX = tl.constexpr(reference.KL_MAX)
BLOCK, NUM_WARPS = 1024, 4
KL_ESTIMATORS = {"k1": 1, "k2": 2, "k3": 3}
N_SUMS = tl.constexpr(len(SUMS))


@triton.jit
def held(value, low, high):
    """The value, held in [low, high]; NaN stays NaN, unlike with minima and maxima."""
    return tl.where(value < low, low, tl.where(value > high, high, value))


@triton.jit
def policy_loss_kernel(
    logprob_ptr, old_ptr, advantages_ptr, ref_ptr, mask_ptr, weights_ptr, sequence_ptr, gradient_ptr, sums_ptr,
    N, T, lowest_ratio, highest_ratio, dual_clip, kl_coef,
    HAS_MASK: tl.constexpr, SEQUENCE: tl.constexpr, CISPO: tl.constexpr, DUAL: tl.constexpr, KL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = at < N
    if HAS_MASK:
        keep = keep & (tl.load(mask_ptr + at, mask=keep, other=0) != 0)
    logprob = tl.load(logprob_ptr + at, mask=keep, other=0.0).to(tl.float32)
    old = tl.load(old_ptr + at, mask=keep, other=0.0).to(tl.float32)
    advantage = tl.load(advantages_ptr + at, mask=keep, other=0.0).to(tl.float32)
    weight = tl.load(weights_ptr + at // T, mask=keep, other=0.0)

    log_ratio = held(logprob - old, -LOG_RATIO_MAX, LOG_RATIO_MAX)
    # Beyond its clamp the log-ratio is a constant.
    moving = (tl.abs(logprob - old) <= LOG_RATIO_MAX) | (log_ratio != log_ratio)
    ratio = tl.exp(tl.load(sequence_ptr + at // T, mask=keep, other=0.0) if SEQUENCE else log_ratio)
    clipped_ratio = held(ratio, lowest_ratio, highest_ratio)
    out = sums_ptr + tl.program_id(0) * N_SUMS
    if CISPO:
        clips = clipped_ratio != ratio
        slope = -advantage * clipped_ratio
        loss = slope * logprob
    else:
        plain, clipped = -advantage * ratio, -advantage * clipped_ratio
        clips = clipped > plain
        loss = tl.where(clips, clipped, plain)
        slope = tl.where(moving & (clips == 0), plain, 0.0)
    if DUAL:
        bound = -advantage * dual_clip
        holds = (advantage < 0) & (loss > bound)
        loss = tl.where(holds, bound, loss)
        slope = tl.where(holds, 0.0, slope)
        tl.store(out + 2, tl.sum(tl.where(keep & holds, 1.0, 0.0), 0))
    else:
        tl.store(out + 2, 0.0)
    if KL > 0:
        ref = tl.load(ref_ptr + at, mask=keep, other=0.0).to(tl.float32)
        away = held(ref - logprob, -LOG_RATIO_MAX, LOG_RATIO_MAX)
        moving = tl.abs(ref - logprob) <= LOG_RATIO_MAX
        if KL == 1:
            kl = -away
            kl_slope = away * 0.0 + 1.0  # NaN stays NaN
        elif KL == 2:
            kl = 0.5 * away * away
            kl_slope = -away
        else:
            kl = tl.exp(away) - away - 1.0
            kl_slope = 1.0 - tl.exp(away)
            moving = moving & (kl <= KL_MAX)
        kl_slope = tl.where(moving | (kl != kl), kl_slope, 0.0)
        if KL == 3:
            kl = held(kl, -KL_MAX, KL_MAX)
        loss += kl_coef * kl
        slope += kl_coef * kl_slope
        tl.store(out + 5, tl.sum(tl.where(keep, kl * weight, 0.0), 0))
    else:
        tl.store(out + 5, 0.0)
    tl.store(out, tl.sum(tl.where(keep, loss * weight, 0.0), 0))
    tl.store(out + 1, tl.sum(tl.where(keep & clips, 1.0, 0.0), 0))
    tl.store(out + 3, tl.sum(tl.where(keep, -log_ratio, 0.0), 0))
    tl.store(out + 4, tl.sum(tl.where(keep, tl.abs(log_ratio), 0.0), 0))
    tl.store(gradient_ptr + at, tl.where(keep, slope * weight, 0.0), mask=at < N)


def constants(spec: LossSpec, *, has_mask: bool) -> dict[str, int | bool]:
    """Constants of the kernel."""
    options, cispo = spec.options, spec.options.objective == "cispo"
    return {
        "HAS_MASK": has_mask, "SEQUENCE": spec.sequence_log_ratio is not None, "CISPO": cispo,
        "DUAL": options.dual_clip is not None and not cispo,
        "KL": 0 if spec.ref_logprob is None else KL_ESTIMATORS[options.kl_estimator], "BLOCK": BLOCK,
    }  # fmt: skip


def step_losses(logprob: Tensor, spec: LossSpec, mask: Tensor | None = None) -> StepLosses:
    """The weighted loss of response steps, its gradient [steps] in float32, and the sums of its statistics.

    Log-probs and the tensors of `spec` [n], or [R, T] with a mask [R, T] (bool) and one weight a response [R].
    """
    count, device = logprob.numel(), logprob.device
    gradient = torch.empty(logprob.shape, dtype=torch.float32, device=device)
    partial = torch.empty(triton.cdiv(count, BLOCK), len(SUMS), dtype=torch.float32, device=device)
    if count:
        logprob, options = logprob.contiguous(), spec.options
        # Arguments that are not used are some tensor of the right device.
        policy_loss_kernel[(len(partial),)](
            logprob, spec.old_logprob.contiguous(), spec.advantages.contiguous(),
            logprob if spec.ref_logprob is None else spec.ref_logprob.contiguous(),
            logprob if mask is None else mask.contiguous().view(torch.int8), spec.weights.contiguous(),
            spec.weights if spec.sequence_log_ratio is None else spec.sequence_log_ratio.contiguous(), gradient,
            partial, count, count // len(spec.weights), 1.0 - options.clip_low, 1.0 + options.clip_high,
            options.dual_clip or 0.0, options.kl_coef, **constants(spec, has_mask=mask is not None),
            num_warps=NUM_WARPS,
        )  # fmt: skip
    return StepLosses(gradient, partial.sum(0))


class _PolicyLoss(torch.autograd.Function):
    """Saves the gradient itself; the backward pass scales it."""

    @staticmethod
    def forward(ctx: Any, logprob: Tensor, spec: LossSpec, mask: Tensor, count: Tensor) -> tuple[Tensor, ...]:
        gradient, sums = step_losses(logprob, spec, mask)
        ctx.save_for_backward(gradient)
        ctx.dtype = logprob.dtype
        unseen = sums.new_full((), torch.nan)  # margins and entropies
        loss, *stats = loss_and_stats(sums, count, 1.0, unseen, unseen)
        ctx.mark_non_differentiable(*stats)
        return loss, *stats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad).to(ctx.dtype), None, None, None


def policy_loss(logprob: Tensor, spec: LossSpec, mask: Tensor, count: Tensor) -> tuple[Tensor, PolicyStats]:
    """`ops.policy_loss` on checked arguments [R, T]; weights [R], `count` is that of the active steps."""
    loss, *stats = _PolicyLoss.apply(logprob, spec, mask, count)
    return loss, PolicyStats(*stats)
