"""The clipped policy loss of response steps, its gradient and its statistics in one pass (Eq. 22-23).

Inputs: log-probs, old log-probs, advantages and reference log-probs of N steps, in any dtype up to float32; a mask;
weights [R] float32 of R responses of T steps each. All arithmetic is in float32. Per step, with A the advantage:

    r = exp(clamp(logprob - old_logprob, -20, 20))
    l = max(-A r, -A clip(r, 1 - low, 1 + high)),   dl/dlogprob = -A r where r is not clipped, else 0
    l <- min(l, -A dual_clip) where A < 0,          dl/dlogprob = 0 where the bound holds
    l <- l + kl_coef * kl, or l + kl_coef * r * kl

The other objectives and the sequence ratio are those of `latent_kernels.policy_loss`. Outputs: the gradient of the
weighted loss in the log-probs [N] float32, and one row of partial sums per program. The forward pass computes the
gradient and saves only it; the backward pass scales it.

Bytes: every input once and the gradient once. A program adds its steps up into one row of partial sums, and PyTorch
adds up the rows. There are no atomics, so results repeat bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from latent_kernels._loss_types import SUMS, LossSpec, StepLosses, loss_and_stats
from latent_kernels._operator import once_differentiable
from latent_kernels._types import PolicyStats
from latent_kernels.reference import loss

LOG_RATIO_MAX = tl.constexpr(loss.LOG_RATIO_MAX)
KL_MAX = tl.constexpr(loss.KL_MAX)
BLOCK, NUM_WARPS = 1024, 4
KL_ESTIMATORS = {"k1": 1, "k2": 2, "k3": 3}
OBJECTIVES = {"clip": 0, "cispo": 1, "sapo": 2, "vespo": 3}
N_SUMS = tl.constexpr(len(SUMS))


@triton.jit
def clamped(value, low, high):
    """Clamp a value to [low, high], to `high` if that is below `low`. NaN stays NaN, unlike with minima and maxima."""
    value = tl.where(value < low, low, value)
    return tl.where(value > high, high, value)


@triton.jit
def policy_loss_kernel(
    logprob_ptr, old_ptr, advantages_ptr, ref_ptr, mask_ptr, weights_ptr, sequence_ptr, sequence_kl_ptr,
    gradient_ptr, sums_ptr, N, T, lowest_ratio, highest_ratio, dual_clip, kl_coef, positive_gate, negative_gate,
    HAS_MASK: tl.constexpr, SEQUENCE: tl.constexpr, OBJECTIVE: tl.constexpr, DUAL: tl.constexpr, KL: tl.constexpr,
    CORRECTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program handles BLOCK steps, and stores sums in the order of SUMS."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = at < N
    if HAS_MASK:
        keep = keep & (tl.load(mask_ptr + at, mask=keep, other=0) != 0)
    logprob = tl.load(logprob_ptr + at, mask=keep, other=0.0).to(tl.float32)
    old = tl.load(old_ptr + at, mask=keep, other=0.0).to(tl.float32)
    advantage = tl.load(advantages_ptr + at, mask=keep, other=0.0).to(tl.float32)
    weight = tl.load(weights_ptr + at // T, mask=keep, other=0.0)  # one weight per response

    log_ratio = clamped(logprob - old, -LOG_RATIO_MAX, LOG_RATIO_MAX)
    # Outside the clamp the log-ratio is a constant, so its gradient is 0. `x != x` is true for NaN, which must not turn
    # into a gradient of 0.
    moving = (tl.abs(logprob - old) <= LOG_RATIO_MAX) | (log_ratio != log_ratio)
    ratio = tl.exp(tl.load(sequence_ptr + at // T, mask=keep, other=0.0) if SEQUENCE else log_ratio)
    clipped_ratio = clamped(ratio, lowest_ratio, highest_ratio)
    out = sums_ptr + tl.program_id(0) * N_SUMS
    if OBJECTIVE == 1:  # cispo
        clips = clipped_ratio != ratio
        gradient = -advantage * clipped_ratio  # the clipped ratio is a constant: only the log-prob has a gradient
        loss = gradient * logprob
    elif OBJECTIVE == 2:  # sapo
        clips = keep & False
        temperature = tl.where(advantage > 0, positive_gate, negative_gate)
        gate = 1.0 / (1.0 + tl.exp(temperature * (1.0 - ratio)))
        loss = -advantage * gate * 4.0 / temperature
        gradient = tl.where(moving, -4.0 * advantage * gate * (1.0 - gate) * ratio, 0.0)
    elif OBJECTIVE == 3:  # vespo: the advantages hold the weights of the responses
        clips = keep & False
        gradient = -advantage
        loss = gradient * logprob
    else:
        plain, clipped = -advantage * ratio, -advantage * clipped_ratio
        clips = clipped > plain
        loss = tl.where(clips, clipped, plain)
        gradient = tl.where(moving & (clips == 0), plain, 0.0)
    if DUAL:
        bound = -advantage * dual_clip
        holds = (advantage < 0) & (loss > bound)
        loss = tl.where(holds, bound, loss)
        gradient = tl.where(holds, 0.0, gradient)
        tl.store(out + 2, tl.sum(tl.where(keep & holds, 1.0, 0.0), 0))
    else:
        tl.store(out + 2, 0.0)
    if KL > 0:
        ref = tl.load(ref_ptr + at, mask=keep, other=0.0).to(tl.float32)
        gap = clamped(ref - logprob, -LOG_RATIO_MAX, LOG_RATIO_MAX)
        kl_moving = tl.abs(ref - logprob) <= LOG_RATIO_MAX
        if KL == 1:
            kl = -gap
            kl_gradient = gap * 0.0 + 1.0  # a NaN stays a NaN
        elif KL == 2:
            kl = 0.5 * gap * gap
            kl_gradient = -gap
        else:
            kl = tl.exp(gap) - gap - 1.0
            kl_gradient = 1.0 - tl.exp(gap)
            kl_moving = kl_moving & (kl <= KL_MAX)
        kl_gradient = tl.where(kl_moving | (kl != kl), kl_gradient, 0.0)
        if KL == 3:
            kl = clamped(kl, -KL_MAX, KL_MAX)
        if CORRECTED:
            # The ratio of a response has a gradient at each of its steps, whose KL is in the mean of the response.
            of_ratio = tl.load(sequence_kl_ptr + at // T, mask=keep, other=0.0) if SEQUENCE else kl
            kl_gradient = ratio * (kl_gradient + tl.where(moving, of_ratio, 0.0))
            kl = ratio * kl
        loss += kl_coef * kl
        gradient += kl_coef * kl_gradient
        tl.store(out + 5, tl.sum(tl.where(keep, kl * weight, 0.0), 0))
    else:
        tl.store(out + 5, 0.0)
    tl.store(out, tl.sum(tl.where(keep, loss * weight, 0.0), 0))
    tl.store(out + 1, tl.sum(tl.where(keep & clips, 1.0, 0.0), 0))
    tl.store(out + 3, tl.sum(tl.where(keep, -log_ratio, 0.0), 0))
    tl.store(out + 4, tl.sum(tl.where(keep, tl.abs(log_ratio), 0.0), 0))
    tl.store(gradient_ptr + at, tl.where(keep, gradient * weight, 0.0), mask=at < N)


def constants(spec: LossSpec, *, has_mask: bool) -> dict[str, int | bool]:
    """Return the constants of the kernel."""
    options = spec.options
    return {
        "HAS_MASK": has_mask, "SEQUENCE": spec.sequence_log_ratio is not None,
        "OBJECTIVE": OBJECTIVES[options.objective],
        "DUAL": options.dual_clip is not None and options.objective == "clip",
        "KL": 0 if spec.ref_logprob is None else KL_ESTIMATORS[options.kl_estimator],
        "CORRECTED": options.kl_bias_correction, "BLOCK": BLOCK,
    }  # fmt: skip


def step_losses(
    logprob: Tensor, spec: LossSpec, mask: Tensor | None = None, *, wants_gradient: bool = True
) -> StepLosses:
    """Return the gradient of the weighted loss of response steps, float32, and the sums of loss and statistics.

    The kernel has the gradient in any case; it is returned if it is wanted.

    Log-probs and the tensors of `spec` are [n], or [R, T] with a mask [R, T] (bool) and one weight per row [R]. A row
    is a response of T steps, or a step of T components.
    """
    count, device = logprob.numel(), logprob.device
    gradient = torch.empty(logprob.shape, dtype=torch.float32, device=device)
    partial_sums = torch.empty(triton.cdiv(count, BLOCK), len(SUMS), dtype=torch.float32, device=device)
    if count:
        logprob, options = logprob.contiguous(), spec.options
        unused = logprob  # in the place of a tensor that the kernel does not read
        policy_loss_kernel[(len(partial_sums),)](
            logprob_ptr=logprob, old_ptr=spec.old_logprob.contiguous(), advantages_ptr=spec.advantages.contiguous(),
            ref_ptr=unused if spec.ref_logprob is None else spec.ref_logprob.contiguous(),
            mask_ptr=unused if mask is None else mask.contiguous().view(torch.int8),
            weights_ptr=spec.weights.contiguous(),
            sequence_ptr=spec.weights if spec.sequence_log_ratio is None else spec.sequence_log_ratio.contiguous(),
            sequence_kl_ptr=spec.weights if spec.sequence_kl is None else spec.sequence_kl.contiguous(),
            gradient_ptr=gradient, sums_ptr=partial_sums, N=count, T=count // len(spec.weights),
            lowest_ratio=1.0 - options.clip_low, highest_ratio=1.0 + options.clip_high,
            dual_clip=options.dual_clip or 0.0, kl_coef=options.kl_coef,
            positive_gate=options.sapo_temperatures[0], negative_gate=options.sapo_temperatures[1],
            **constants(spec, has_mask=mask is not None), num_warps=NUM_WARPS,
        )  # fmt: skip
    return StepLosses(gradient if wants_gradient else None, partial_sums.sum(0))


class _PolicyLoss(torch.autograd.Function):
    """The loss of log-probs [R, T]. Saves the gradient itself; the backward pass scales it."""

    @staticmethod
    def forward(ctx: Any, logprob: Tensor, spec: LossSpec, mask: Tensor, count: Tensor) -> tuple[Tensor, ...]:
        gradient, sums = step_losses(logprob, spec, mask)
        ctx.save_for_backward(gradient)
        ctx.dtype = logprob.dtype
        unseen = sums.new_full((), torch.nan)  # log-probs do not tell margins and entropies
        loss, *stats = loss_and_stats(sums, count, 1.0, unseen, unseen)
        ctx.mark_non_differentiable(*stats)
        return loss, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad).to(ctx.dtype), None, None, None


def policy_loss_triton(logprob: Tensor, spec: LossSpec, mask: Tensor, count: Tensor) -> tuple[Tensor, PolicyStats]:
    """Compute `ops.policy_loss` on checked arguments [R, T], with weights [R] and the `count` of active steps."""
    loss, *stats = _PolicyLoss.apply(logprob, spec, mask, count)
    return loss, PolicyStats(*stats)
