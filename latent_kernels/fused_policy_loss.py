"""Hidden states to policy loss in one pass, without [N, V].

Advantages, old log-probs, masks and the aggregation's weights are all known before the LM head, so the gradient is
taken in the forward pass: each chunk of rows goes hidden -> logits -> log-prob -> loss -> dlogits (in place) -> dhidden
(and the head's gradient where it is asked for) while it is alive. The backward pass only scales what was saved. Masked
rows never reach the LM head. Deterministic.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from latent_kernels._backend import resolve
from latent_kernels._eager.linear import back_project, project
from latent_kernels._eager.rows import LogprobSpec, chunk_buffer, logits_gradient_, logprob_rows_, row_chunks
from latent_kernels._types import PolicyStats
from latent_kernels._validate import check_tensor
from latent_kernels.latent_logprob import check_logprob_options
from latent_kernels.policy_loss import check_loss_options
from latent_kernels.reference import aggregation_weights, compute_dtype, token_loss


class LossSpec(NamedTuple):
    """What the loss of N flattened rows needs besides their log-probs; tensors are [N]."""

    old_logprob: Tensor
    advantages: Tensor
    ref_logprob: Tensor | None
    weights: Tensor
    clip_low: float
    clip_high: float
    dual_clip: float | None
    kl_coef: float

    def rows(self, part: slice | Tensor) -> LossSpec:
        """The same for a part of the rows."""
        return self._replace(
            old_logprob=self.old_logprob[part],
            advantages=self.advantages[part],
            ref_logprob=None if self.ref_logprob is None else self.ref_logprob[part],
            weights=self.weights[part],
        )


def _chunk_loss(logprob: Tensor, spec: LossSpec) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Weighted loss (0-d), its gradient in logprob [n], and the terms of the statistics."""
    with torch.enable_grad():
        logprob = logprob.requires_grad_()
        loss, terms = token_loss(
            logprob, spec.old_logprob, spec.advantages, clip_low=spec.clip_low, clip_high=spec.clip_high,
            dual_clip=spec.dual_clip, ref_logprob=spec.ref_logprob, kl_coef=spec.kl_coef,
        )  # fmt: skip
        total = (loss * spec.weights).sum()
        (grad,) = torch.autograd.grad(total, logprob)
    return total.detach(), grad, terms


class _Fused(torch.autograd.Function):
    """Saves the gradients themselves: dhidden of the active rows, and dlm_head where it is wanted."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, lm_head: Tensor, active: Tensor, rows: LogprobSpec, loss_spec: LossSpec
    ) -> tuple[Tensor, ...]:
        dtype = loss_spec.weights.dtype
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        hidden_grad = torch.zeros_like(hidden) if wants_hidden else None
        head_grad = torch.zeros(lm_head.shape, dtype=dtype, device=hidden.device) if wants_head else None
        loss = torch.zeros((), dtype=dtype, device=hidden.device)
        sums: dict[str, Tensor] = {}
        crossed, components = loss.new_zeros(()), loss.new_zeros(())
        chunks = row_chunks(len(active), len(lm_head), dtype)
        buffer = chunk_buffer(chunks, len(lm_head), hidden, dtype)
        for part in chunks:
            index = active[part]
            chunk = hidden[index]
            logits = project(chunk, lm_head, buffer[: len(chunk)])
            state = logprob_rows_(logits, rows.rows(index))
            spec = loss_spec.rows(index)
            value, grad, terms = _chunk_loss(state.logprob, spec)
            loss += value
            crossed += state.crossed.sum()
            components += state.latent.sum() * state.ids.shape[1]
            for name, term in terms.items():
                sums[name] = sums.get(name, 0.0) + ((term * spec.weights) if name == "kl" else term).sum()
            if hidden_grad is not None or head_grad is not None:
                slope = logits_gradient_(logits, state, grad)
                if hidden_grad is not None:
                    hidden_grad[index] = back_project(slope, lm_head).to(hidden.dtype)
                if head_grad is not None:
                    head_grad.addmm_(slope.T, chunk.to(dtype))
        ctx.save_for_backward(hidden_grad, None if head_grad is None else head_grad.to(lm_head.dtype))
        stats = _stats(sums, len(active), crossed / components)
        ctx.mark_non_differentiable(*stats)
        return loss, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        scaled = [None if saved is None else (saved * grad).to(saved.dtype) for saved in ctx.saved_tensors]
        return scaled[0], scaled[1], None, None, None


def _stats(sums: dict[str, Tensor], count: int, margin_crossed: Tensor) -> PolicyStats:
    """Statistics from sums over the active steps (the k3 term comes weighted already)."""
    zero = torch.zeros((), dtype=torch.float32, device=margin_crossed.device)
    means = {name: (total if name == "kl" else total / max(count, 1)).float() for name, total in sums.items()}
    values = {name: means.get(name, zero.clone()) for name in PolicyStats._fields}
    return PolicyStats(**{**values, "margin_crossed": margin_crossed.float()})


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
    ref_logprob: Tensor | None = None,
    kl_coef: float = 0.0,
    impl: str = "auto",
) -> tuple[Tensor, PolicyStats]:
    """`policy_loss(latent_logprob(hidden, lm_head, ...), ...)` in one pass, gradient included, without [N, V].

    Replaces::

        logprob = latent_logprob(hidden.flatten(0, 1), lm_head, ids.flatten(0, 1), scores.flatten(0, 1),
                                 temperature=temperature, advantages=advantages.flatten(), ...)
        loss, stats = policy_loss(logprob.view_as(mask), old_logprob, advantages, mask, ...)

    Differentiable in `hidden` and `lm_head` (once); extra memory is one chunk of logits plus dhidden, and [V, D] in
    float32 where `lm_head` requires a gradient. Options as in `latent_logprob` and `policy_loss`; masked steps may hold
    anything. Raises ValueError or TypeError naming the argument; RuntimeError where `impl="triton"` cannot run.
    """
    check_tensor("hidden", hidden, [None, None, None])
    steps = list(hidden.shape[:2])
    check_tensor("lm_head", lm_head, [None, hidden.shape[2]], like=hidden)
    check_tensor("ids", ids, [*steps, None], (torch.int64,), like=hidden)
    check_tensor("scores", scores, list(ids.shape), like=hidden)
    check_loss_options(
        steps, hidden, old_logprob, advantages, mask, clip_low, clip_high, dual_clip, aggregation, ref_logprob, kl_coef
    )
    flat_ids, flat_scores = ids.flatten(0, 1), scores.flatten(0, 1)
    check_logprob_options(flat_ids, flat_scores, len(flat_ids), hidden, temperature, None, margin_gradient)
    resolve("fused_policy_loss", impl, hidden)
    if not torch.is_grad_enabled():  # else the forward pass takes gradients that no backward pass will ask for
        hidden, lm_head = hidden.detach(), lm_head.detach()
    dtype = compute_dtype(hidden, lm_head)
    keep = mask.bool()
    weights = aggregation_weights(keep.to(dtype), aggregation).flatten()
    ref = None if ref_logprob is None else ref_logprob.to(dtype).flatten()
    flat_advantages = advantages.to(dtype).flatten()
    rows = LogprobSpec(flat_ids, flat_scores, flat_advantages, temperature, margin_gradient)
    loss_spec = LossSpec(
        old_logprob.to(dtype).flatten(), flat_advantages, ref, weights, clip_low, clip_high, dual_clip, kl_coef
    )
    active = keep.flatten().nonzero().squeeze(-1)
    loss, *stats = _Fused.apply(hidden.flatten(0, 1), lm_head, active, rows, loss_spec)
    return loss, PolicyStats(*stats)
