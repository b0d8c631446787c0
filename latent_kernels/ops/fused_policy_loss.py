"""Hidden states to policy loss in one pass, without [N, V].

Advantages, old log-probs, masks and the aggregation's weights are all known before the LM head, so the gradient is
taken in the forward pass: each chunk of rows goes hidden -> logits -> log-prob and its slope in the logits, in place ->
loss -> dhidden (and the head's gradient where it is asked for) while it is alive. The backward pass only scales what
was saved. Masked steps, and those whose advantage is zero, never reach the LM head. Deterministic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from latent_kernels._chunks import chunk_buffer, dlogits_dtype, row_chunks
from latent_kernels._dispatch import components_limit, on_input_device, resolve
from latent_kernels._eager import latent_logprob as eager_rows
from latent_kernels._linear import add_outer_, back_project, project
from latent_kernels._loss_types import (
    SUMS,
    LogprobSpec,
    LossOptions,
    LossSpec,
    RowEntropies,
    RowScores,
    StepLosses,
    loss_and_stats,
)
from latent_kernels._types import PolicyStats
from latent_kernels._validate import check_range, check_tensor
from latent_kernels.ops.latent_logprob import check_logprob_options
from latent_kernels.ops.policy_loss import check_loss_options
from latent_kernels.reference import aggregation_weights, compute_dtype, is_hard, sequence_log_ratio


class RowKernels(NamedTuple):
    """One implementation of what is done to a chunk of logits."""

    logprob_rows_: Callable[..., RowScores]
    entropy_rows: Callable[[Tensor, LogprobSpec], RowEntropies]
    entropy_slope_: Callable[..., Tensor]
    step_losses: Callable[[Tensor, LossSpec], StepLosses]


class ChunkLosses(NamedTuple):
    """The loss of a chunk of n rows, over whose logits the slope was written."""

    slope: Tensor | None  # [n, V], times `gradient` the gradient of the weighted loss
    gradient: Tensor | None  # [n]; None where the slope is the gradient
    sums: Tensor  # [6] in the order of SUMS
    crossed: Tensor  # [n]
    entropy: Tensor | None  # [n], 0 on latent rows


def _chunk_losses_(
    logits: Tensor, rows: LogprobSpec, loss: LossSpec, stored: torch.dtype | None, kernels: RowKernels
) -> ChunkLosses:
    """The weighted loss of the rows of logits [n, V], which are overwritten by its slope unless `stored` is None.

    Without an entropy bonus the slope is that of the log-prob, one value a row from the loss's own: one pass does.
    """
    coef = loss.options.entropy_coef
    if not coef:
        found = kernels.logprob_rows_(logits, rows, stored)
        gradient, sums = kernels.step_losses(found.logprob, loss)
        return ChunkLosses(found.slope, gradient, sums, found.crossed, None)
    scored = kernels.entropy_rows(logits, rows)
    gradient, sums = kernels.step_losses(scored.logprob, loss)
    bonus = torch.where(is_hard(rows.ids), -coef * loss.weights, 0.0)
    sums[0] += (bonus * scored.entropy).sum()
    slope = None if stored is None else kernels.entropy_slope_(logits, rows, scored, stored, gradient, bonus)
    return ChunkLosses(slope, None, sums, scored.crossed, scored.entropy)


class _Fused(torch.autograd.Function):
    """Saves the gradients themselves, for a loss whose largest weight is 1: dhidden, and dlm_head where it is wanted.

    The weights' unit, often 1e-5, is multiplied in by the backward pass: a float16 gradient would lose its bits to it.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, lm_head: Tensor, active: Tensor, unit: Tensor, rows: LogprobSpec, loss: LossSpec,
        kernels: RowKernels,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        dtype = compute_dtype(hidden, lm_head)
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        hidden_grad = torch.zeros_like(hidden) if wants_hidden else None
        head_grad = torch.zeros(lm_head.shape, dtype=dtype, device=hidden.device) if wants_head else None
        stored = dlogits_dtype(hidden, lm_head, dtype) if wants_hidden or wants_head else None
        sums, crossed, entropy = unit.new_zeros(len(SUMS)), unit.new_zeros(()), unit.new_zeros(())
        chunks = row_chunks(len(active), len(lm_head), dtype, hidden.device)
        buffer = chunk_buffer(chunks, len(lm_head), dtype, hidden.device)
        for part in chunks:
            index = active[part]
            chunk = hidden[index]
            logits = project(chunk, lm_head, buffer[: len(chunk)])
            found = _chunk_losses_(logits, rows.rows(index), loss.rows(index), stored, kernels)
            sums += found.sums
            crossed += found.crossed.sum()
            entropy += torch.nan if found.entropy is None else found.entropy.sum()
            gradient = 1.0 if found.gradient is None else found.gradient.unsqueeze(-1)
            if hidden_grad is not None and found.slope is not None:
                hidden_grad[index] = (back_project(found.slope, lm_head) * gradient).to(hidden.dtype)
            if head_grad is not None and found.slope is not None:
                add_outer_(head_grad, found.slope, (chunk * gradient).to(found.slope.dtype))
        ctx.save_for_backward(hidden_grad, None if head_grad is None else head_grad.to(lm_head.dtype), unit)
        text = is_hard(rows.ids[active]).sum()
        components = (len(active) - text) * rows.ids.shape[1]
        loss_value, *stats = loss_and_stats(sums, len(active), unit, crossed / components, entropy / text)
        ctx.mark_non_differentiable(*stats)
        return loss_value, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        *saved, unit = ctx.saved_tensors
        scaled = [None if gradient is None else (gradient * (grad * unit)).to(gradient.dtype) for gradient in saved]
        return *scaled, None, None, None, None, None


@on_input_device
def fused_policy_loss(
    hidden: Tensor,  # [R, T, D]
    lm_head: Tensor,  # [V, D]
    ids: Tensor,  # [R, T, K] int64
    scores: Tensor,  # [R, T, K]
    old_logprob: Tensor,  # [R, T]
    advantages: Tensor,  # [R, T]
    mask: Tensor,  # [R, T] bool or 0/1
    *,
    temperature: float = 1.0,
    margin_gradient: str = "aligned",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = 3.0,
    aggregation: str = "token-mean",
    ratio: str = "token",
    objective: str = "clip",
    ref_logprob: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
    impl: str = "auto",
) -> tuple[Tensor, PolicyStats]:
    """`policy_loss(latent_logprob(hidden, lm_head, ...), ...)` in one pass, gradient included, without [N, V].

    Replaces::

        logprob = latent_logprob(hidden.flatten(0, 1), lm_head, ids.flatten(0, 1), scores.flatten(0, 1),
                                 temperature=temperature, advantages=advantages.flatten(), ...)
        loss, stats = policy_loss(logprob.view_as(mask), old_logprob, advantages, mask, ...)

    Steps whose advantage is zero are left out (unless there is a `ref_logprob`): they change neither the loss nor its
    gradient, but the statistics are means over the others. With ratio="sequence" whole responses without an advantage
    are left out, and the others' log-probs are computed once before: one product with the head more.

    entropy_coef: this much of the entropy of softmax(logits / T) at text steps, aggregated as the loss is, is taken off
    the loss; it holds for text steps without an advantage too. A chunk of logits is then read once more.

    Differentiable in `hidden` and `lm_head` (once); extra memory is one chunk of logits plus dhidden, and [V, D] in
    float32 where `lm_head` requires a gradient. Options as in `latent_logprob` and `policy_loss`; masked steps may hold
    anything. Raises ValueError or TypeError naming the argument; RuntimeError where `impl="triton"` cannot run.
    """
    check_tensor("hidden", hidden, [None, None, None])
    steps = list(hidden.shape[:2])
    check_tensor("lm_head", lm_head, [None, hidden.shape[2]], like=hidden)
    check_tensor("ids", ids, [*steps, None], (torch.int64,), like=hidden)
    check_tensor("scores", scores, list(ids.shape), like=hidden)
    options = LossOptions(
        clip_low, clip_high, dual_clip, aggregation, ratio, objective, kl_coef, kl_estimator, entropy_coef
    )
    check_loss_options(steps, hidden, old_logprob, advantages, mask, ref_logprob, options)
    flat_ids, flat_scores = ids.flatten(0, 1), scores.flatten(0, 1)
    check_logprob_options(flat_ids, flat_scores, len(flat_ids), hidden, temperature, None, margin_gradient)
    check_range("entropy_coef", entropy_coef, 0.0)
    kernels = RowKernels(*(getattr(eager_rows, name) for name in RowKernels._fields))
    if resolve("fused_policy_loss", impl, hidden, lm_head, unsupported=components_limit(ids.shape[2])) == "triton":
        from latent_kernels._triton import latent_logprob as logprob
        from latent_kernels._triton import policy_loss

        kernels = RowKernels(
            logprob.logprob_rows_, logprob.entropy_rows, logprob.entropy_slope_, policy_loss.step_losses
        )
    if not torch.is_grad_enabled():  # else the forward pass takes gradients that no backward pass will ask for
        hidden, lm_head = hidden.detach(), lm_head.detach()
    dtype = compute_dtype(hidden, lm_head)
    keep = mask.bool()
    weights = aggregation_weights(keep.to(dtype), aggregation).flatten()
    unit = weights.max() if weights.numel() else weights.new_zeros(())
    ref = None if ref_logprob is None else ref_logprob.to(dtype).flatten()
    flat_advantages = advantages.to(dtype).flatten()
    rows = LogprobSpec(flat_ids, flat_scores, flat_advantages, temperature, margin_gradient)
    if ref is None:  # else a step without an advantage still has a KL term
        keep = _steps_that_count(keep, advantages, is_hard(flat_ids).view(steps), options)
    # The one wait for the device: how many rows there are to multiply.
    active = keep.flatten().nonzero().squeeze(-1)
    old, flat_hidden = old_logprob.to(dtype).flatten(), hidden.flatten(0, 1)
    of_step = None
    if ratio == "sequence":
        policy = torch.zeros_like(old)
        policy[active] = _logprobs(flat_hidden.detach(), lm_head.detach(), active, rows, kernels, dtype)
        of_response = sequence_log_ratio(policy.view(steps), old.view(steps), keep)
        of_step = of_response.unsqueeze(-1).expand(steps).flatten()
    loss_spec = LossSpec(old, flat_advantages, ref, weights / unit, of_step, options)
    loss, *stats = _Fused.apply(flat_hidden, lm_head, active, unit, rows, loss_spec, kernels)
    return loss, PolicyStats(*stats)


def _steps_that_count(keep: Tensor, advantages: Tensor, text: Tensor, options: LossOptions) -> Tensor:
    """The active steps [R, T] that the loss without a KL, or its gradient, depends on."""
    counts = keep & (advantages != 0)
    if options.ratio == "sequence":
        counts = keep & counts.any(-1, keepdim=True)
    return counts | (keep & text) if options.entropy_coef else counts


def _logprobs(
    hidden: Tensor, lm_head: Tensor, active: Tensor, rows: LogprobSpec, kernels: RowKernels, dtype: torch.dtype
) -> Tensor:
    """Log-probs of the active rows, without gradients."""
    chunks = row_chunks(len(active), len(lm_head), dtype, hidden.device)
    buffer = chunk_buffer(chunks, len(lm_head), dtype, hidden.device)
    out = torch.empty(len(active), dtype=dtype, device=hidden.device)
    for part in chunks:
        index = active[part]
        logits = project(hidden[index], lm_head, buffer[: len(index)])
        out[part] = kernels.logprob_rows_(logits, rows.rows(index), None).logprob
    return out
