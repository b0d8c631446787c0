"""The policy loss from hidden states in one pass, without [N, V].

Advantages, old log-probs, masks and the weights of the aggregation are all known before the LM head is applied. So the
gradient is computed in the forward pass. While a chunk of rows is alive it goes hidden -> product with the head ->
log-prob and its gradient in the product, in place -> loss -> dhidden, and the gradients of head and bias if they are
wanted. The backward pass only scales what was saved. An entropy bonus, or one ratio per component of a latent step,
needs the loss before the gradient in the logits; then a chunk is read twice. Masked steps, and steps whose advantage is
zero, never reach the LM head. Deterministic.

A loss without these two stores no logits on some GPUs (`latent_kernels._triton.scaled_exp`) and, with a frozen head, on
a CPU (`latent_kernels._eager.streamed_logprob`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from latent_kernels._chunks import dlogits_dtype
from latent_kernels._dispatch import components_limit, on_input_device, resolve
from latent_kernels._eager.streamed_logprob import streamed_chunks, streamed_logprob
from latent_kernels._linear import add_outer_, add_rows_, back_project
from latent_kernels._loss_types import SUMS, LogprobSpec, LossOptions, LossSpec, ResponseTerms, loss_and_stats
from latent_kernels._operator import once_differentiable, operator
from latent_kernels._scored_chunks import plan_chunks
from latent_kernels._types import HeadOptions, PolicyStats
from latent_kernels._validate import FLOAT32_MAX, check_head, check_range, check_tensor
from latent_kernels.ops.chunk_losses import ChunkLosses, RowKernels, chunk_losses, in_one_pass, row_kernels
from latent_kernels.ops.latent_logprob import check_logprob_options, with_bias
from latent_kernels.ops.policy_loss import RATIOS, check_loss_options, loss_result, loss_shapes
from latent_kernels.reference.latent_step import compute_dtype, is_hard
from latent_kernels.reference.loss import aggregation_weights, response_terms, used_components


def _streamed_losses(
    rows: Tensor, lm_head: Tensor, logprob_spec: LogprobSpec, loss_spec: LossSpec, kernels: RowKernels, wanted: bool
) -> ChunkLosses:
    """Return the weighted loss of hidden states [n, D] and, if wanted, its gradient in them."""
    scores = streamed_logprob(rows, lm_head, logprob_spec, wants_gradient=wanted)
    gradient, sums = kernels.step_losses(scores.logprob, loss_spec, wants_gradient=wanted)
    dhidden = scores.dhidden
    if dhidden is not None and gradient is not None:
        dhidden.mul_(gradient.unsqueeze(-1))
    return ChunkLosses(None, None, sums, scores.crossed, None, dhidden)


def _kept_dtype(leaf: Tensor) -> torch.dtype:
    """Return the dtype in which the gradient of a leaf waits for the backward pass."""
    return torch.float32 if leaf.dtype == torch.float16 else leaf.dtype


class Gradients(NamedTuple):
    """What the chunks of the loss add their gradients to; None where no gradient is wanted."""

    hidden: Tensor | None  # [N, D] in the dtype of `_kept_dtype`
    lm_head: Tensor | None  # [V, D] float32 or float64
    bias: Tensor | None  # [V] float32 or float64

    def add(self, losses: ChunkLosses, index: Tensor, rows: Tensor, lm_head: Tensor, *, first: bool) -> None:
        """Add the gradients of a chunk whose hidden states are `rows` [n, D], at `index` [n] of hidden."""
        dlogits, factor = losses.dlogits, losses.factor
        if self.hidden is not None and losses.dhidden is not None:
            self.hidden[index] = losses.dhidden.to(self.hidden.dtype)
        if dlogits is None:
            return
        # After one pass, dlogits is the gradient of the log-prob. The loss's own factor, one number per row, is
        # multiplied into the smaller [n, D] tensors.
        if self.hidden is not None:
            self.hidden[index] = back_project(dlogits, lm_head, factor).to(self.hidden.dtype)
        if self.lm_head is not None:
            add_outer_(self.lm_head, dlogits, rows, factor, fresh=first)
        if self.bias is not None:
            add_rows_(self.bias, dlogits, factor)


class _Fused(torch.autograd.Function):
    """The fused loss. Saves the gradients in hidden and, if wanted, head and bias, of a loss whose largest weight is 1.

    The backward pass multiplies by `unit`, the largest weight, which is often 1e-5. A float16 gradient would lose its
    bits to such a factor, or overflow before it, so it waits in float32. The options of the head are in `logprob_spec`,
    except the bias.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        lm_head: Tensor,
        bias: Tensor | None,
        active: Tensor,
        unit: Tensor,
        logprob_spec: LogprobSpec,
        loss_spec: LossSpec,
        kernels: RowKernels,
    ) -> tuple[Tensor, ...]:
        dtype, vocab, device = compute_dtype(hidden, lm_head), len(lm_head), hidden.device
        wants_hidden, wants_head, wants_bias = ctx.needs_input_grad[:3]
        gradients = Gradients(
            torch.zeros(hidden.shape, dtype=_kept_dtype(hidden), device=device) if wants_hidden else None,
            # The first chunk writes it without reading it.
            (torch.empty if len(active) else torch.zeros)(lm_head.shape, dtype=dtype, device=device)
            if wants_head
            else None,
            torch.zeros(vocab, dtype=dtype, device=device) if wants_bias else None,
        )
        stored_dtype = dlogits_dtype(hidden, lm_head, dtype) if any(ctx.needs_input_grad) else None
        sums, crossed, entropy = unit.new_zeros(len(SUMS)), unit.new_zeros(()), unit.new_zeros(())
        one_pass, logprob_spec = in_one_pass(logprob_spec, loss_spec), with_bias(logprob_spec, bias)
        plan = None
        if not (kernels.streams and one_pass and not wants_head and not wants_bias):
            scaled_exp = kernels.scaled_exp if one_pass else None
            plan = plan_chunks(
                len(active), hidden, lm_head, stored_dtype, kernels.logprob_rows_, scaled_exp, logprob_spec.head,
                trained_head=wants_head,
            )  # fmt: skip
        for chunk in streamed_chunks(len(active)) if plan is None else plan.slices:
            index = active[chunk]
            rows, specs = hidden[index], (logprob_spec.select(index), loss_spec.select(index))
            if plan is None:
                losses = _streamed_losses(rows, lm_head, *specs, kernels, wants_hidden)
            else:
                losses = chunk_losses(rows, lm_head, *specs, plan, kernels)
            sums += losses.sums
            crossed += losses.crossed.sum()
            # Without a bonus the entropies are not known, and the statistic is NaN.
            entropy += torch.nan if losses.entropy is None else losses.entropy.sum()
            gradients.add(losses, index, rows, lm_head, first=chunk.start == 0)
        leaves = (hidden, lm_head, bias)
        ctx.dtypes = [None if leaf is None else leaf.dtype for leaf in leaves]
        pairs = zip(gradients, leaves, strict=True)
        kept = (None if x is None or leaf is None else x.to(_kept_dtype(leaf)) for x, leaf in pairs)
        ctx.save_for_backward(*kept, unit)
        ids = logprob_spec.ids[active]
        num_text = is_hard(ids).sum()
        # The components of "multiplex" have no margins.
        num_margins = torch.nan if logprob_spec.method == "multiplex" else (len(active) - num_text) * ids.shape[1]
        count = used_components(ids).sum() if logprob_spec.components else len(active)
        loss, *stats = loss_and_stats(sums, count, unit, crossed / num_margins, entropy / num_text)
        ctx.mark_non_differentiable(*stats)
        return loss, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        *saved, unit = ctx.saved_tensors
        factor, pairs = grad * unit, zip(saved, ctx.dtypes, strict=True)
        scaled = (None if x is None else torch.mul(x, factor, out=torch.empty_like(x, dtype=to)) for x, to in pairs)
        return *scaled, None, None, None, None, None


def _shapes(hidden: Tensor, lm_head: Tensor, **_: Any) -> list[Tensor]:
    return loss_shapes(hidden, lm_head)


@operator(differentiable=("hidden", "lm_head", "bias"), shapes=_shapes, result=loss_result)
@on_input_device
def fused_policy_loss(
    hidden: Tensor,  # [R, T, D]
    lm_head: Tensor,  # [V, D]
    ids: Tensor,  # [R, T, K] int64
    scores: Tensor,  # [R, T, K]
    old_logprob: Tensor,  # [R, T]; [R, T, K] with ratio="component"
    advantages: Tensor,  # [R, T]
    mask: Tensor,  # [R, T] bool or 0/1
    *,
    temperature: float = 1.0,
    margin_gradient: str = "aligned",
    method: str = "latent_grpo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = 3.0,
    aggregation: str = "token-mean",
    ratio: str = "token",
    objective: str = "clip",
    ref_logprob: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_bias_correction: bool = False,
    sapo_temperatures: tuple[float, float] = (1.0, 1.05),
    vespo_k: tuple[float, float] = (2.0, 3.0),
    vespo_lambda: tuple[float, float] = (3.0, 2.0),
    entropy_coef: float | Tensor = 0.0,
    bias: Tensor | None = None,  # [V]
    logit_scale: float = 1.0,
    softcap: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, PolicyStats]:
    """Compute the policy loss, its gradient and its statistics from hidden states, without [N, V] (Eq. 15-17, 22-23).

    Replaces `latent_logprob` of the flattened steps and then `policy_loss`, whose other options it takes.

    Without `ref_logprob`, steps (with ratio="sequence" or objective="vespo": responses) without an advantage are left
    out of the statistics; they change neither loss nor gradient. Those two cost one more product with the head.

    Args:
        ratio: "token" or "sequence", as in `policy_loss`, or "component": with the method "multiplex", each component
            of a latent step has a ratio and a clipped loss of its own (the released code of arXiv 2601.08808). The loss
            of the step is their sum. Statistics are means over components, a text step being one. Old and reference
            log-probs are then `latent_logprob(..., components=True)`, [R, T, K].
        entropy_coef: subtract this much, a number or a 0-d tensor, of the mean entropy of softmax(logits / T) over all
            text steps, whatever the aggregation. Then a chunk of logits is read once more, and every text step counts.

    Differentiable once, in `hidden`, `lm_head` and `bias`. Extra memory: one chunk of logits, dhidden, and [V, D] in
    float32 if `lm_head` requires a gradient. Masked steps may hold anything. Raises ValueError or TypeError naming the
    argument; RuntimeError if `impl` cannot run.
    """
    options = LossOptions(
        clip_low, clip_high, dual_clip, aggregation, ratio, objective, kl_coef, kl_estimator,
        kl_bias_correction, sapo_temperatures, vespo_k, vespo_lambda, entropy_coef,
    )  # fmt: skip
    head = HeadOptions(bias, logit_scale, softcap)
    spec = LogprobSpec(ids, scores, advantages, temperature, margin_gradient, method, ratio == "component", head)
    _check_arguments(hidden, lm_head, spec, old_logprob, advantages, mask, ref_logprob, options)
    chosen = resolve("fused_policy_loss", impl, hidden, lm_head, unsupported=components_limit(ids.shape[2]))
    kernels = row_kernels(chosen, hidden.device)
    return _loss_of_active_steps(hidden, lm_head, spec, old_logprob, mask, ref_logprob, options, kernels)


def _check_arguments(
    hidden: Tensor,
    lm_head: Tensor,
    spec: LogprobSpec,
    old_logprob: Tensor,
    advantages: Tensor,
    mask: Tensor,
    ref_logprob: Tensor | None,
    options: LossOptions,
) -> None:
    """Check the arguments of `fused_policy_loss`; `spec` holds [R, T, K] and [R, T]."""
    check_tensor("hidden", hidden, [None, None, None])
    steps = list(hidden.shape[:2])
    check_tensor("lm_head", lm_head, [None, hidden.shape[2]], like=hidden)
    check_head(spec.head, len(lm_head), hidden)
    check_tensor("ids", spec.ids, [*steps, None], (torch.int64,), like=hidden)
    check_tensor("scores", spec.scores, list(spec.ids.shape), like=hidden)
    ratios, components = (*RATIOS, "component"), spec.ids.shape[2]
    check_loss_options(steps, hidden, old_logprob, advantages, mask, ref_logprob, options, ratios, components)
    ids, scores = spec.ids.flatten(0, 1), spec.scores.flatten(0, 1)
    check_logprob_options(
        ids, scores, len(ids), hidden, spec.temperature, None, spec.margin_gradient, spec.method, spec.components
    )
    if isinstance(options.entropy_coef, Tensor):
        check_tensor("entropy_coef", options.entropy_coef, [], like=hidden)
    else:
        check_range("entropy_coef", options.entropy_coef, 0.0, FLOAT32_MAX)


def _loss_of_active_steps(
    hidden: Tensor,
    lm_head: Tensor,
    spec: LogprobSpec,
    old_logprob: Tensor,
    mask: Tensor,
    ref_logprob: Tensor | None,
    options: LossOptions,
    kernels: RowKernels,
) -> tuple[Tensor, PolicyStats]:
    """Compute the fused loss on checked arguments; `spec` holds [R, T, K] and [R, T]."""
    # Under no_grad, inputs that require a gradient would still make the forward pass compute it.
    bias = spec.head.bias
    if not torch.is_grad_enabled():
        hidden, lm_head, bias = hidden.detach(), lm_head.detach(), None if bias is None else bias.detach()
    assert spec.advantages is not None
    dtype, hidden = compute_dtype(hidden, lm_head), hidden.flatten(0, 1)
    keep = mask.bool()
    weights = aggregation_weights(keep.to(dtype), options.aggregation).flatten()
    unit = weights.max() if weights.numel() else weights.new_zeros(())
    bonus = _entropy_weights(keep, spec, options, dtype)
    if bonus is not None and bonus.numel():
        unit = torch.maximum(unit, bonus.max())
    if ref_logprob is None:  # with a reference, a step without an advantage still has a KL term
        keep = _steps_that_count(keep, spec, options)
    # The only wait for the device: the host must know how many rows there are to multiply.
    active = keep.flatten().nonzero().squeeze(-1)
    advantages = spec.advantages.to(dtype).flatten()
    spec = spec._replace(ids=spec.ids.flatten(0, 1), scores=spec.scores.flatten(0, 1), advantages=advantages)
    spec = with_bias(spec, None if bias is None else bias.detach())
    old, ref = (None if x is None else x.to(dtype).flatten(0, 1) for x in (old_logprob, ref_logprob))
    assert old is not None
    response = ResponseTerms(advantages, None, None)
    if options.reads_responses:
        logprob = torch.zeros(keep.shape, dtype=dtype, device=hidden.device)
        logprob.view(-1)[active] = _logprobs(hidden.detach(), lm_head.detach(), active, spec, kernels, dtype)
        references = None if ref is None else ref.view_as(keep)
        response = response_terms(logprob, old.view_as(keep), advantages.view_as(keep), references, keep, options)
    advantages = response.advantages.flatten()
    log_ratio, kl = (None if x is None else x.unsqueeze(-1).expand_as(keep).flatten() for x in response[1:])
    if spec.components:
        advantages = advantages.unsqueeze(-1).expand_as(old)
    bonus = None if bonus is None else bonus / unit
    loss_spec = LossSpec(old, advantages, ref, weights / unit, log_ratio, kl, options, bonus)
    loss, *stats = _Fused.apply(hidden, lm_head, bias, active, unit, spec, loss_spec, kernels)
    return loss, PolicyStats(*stats)


def _entropy_weights(keep: Tensor, spec: LogprobSpec, options: LossOptions, dtype: torch.dtype) -> Tensor | None:
    """Return the weight of the entropy of every step [R * T]: entropy_coef over the number of active text steps.

    It is 0 on other steps. The result is None without a coefficient.
    """
    coefficient = options.entropy_coef
    if not isinstance(coefficient, Tensor) and not coefficient:
        return None
    text = (keep & is_hard(spec.ids.flatten(0, 1)).view_as(keep)).flatten().to(dtype)
    return text * (coefficient / text.sum().clamp_min(1.0))


def _steps_that_count(keep: Tensor, spec: LogprobSpec, options: LossOptions) -> Tensor:
    """Return the active steps [R, T] on which the loss without a KL, or its gradient, depends."""
    counts = keep & (spec.advantages != 0)
    if isinstance(options.entropy_coef, Tensor) or options.entropy_coef:
        counts |= keep & is_hard(spec.ids.flatten(0, 1)).view_as(keep)
    # Last, because the ratio of a response is that of all its steps.
    return keep & counts.any(-1, keepdim=True) if options.reads_responses else counts


def _logprobs(
    hidden: Tensor, lm_head: Tensor, active: Tensor, spec: LogprobSpec, kernels: RowKernels, dtype: torch.dtype
) -> Tensor:
    """Return the log-probs of the active rows, without gradients."""
    if kernels.streams:
        indices = [active[chunk] for chunk in streamed_chunks(len(active))]
        streamed = [streamed_logprob(hidden[i], lm_head, spec.select(i), wants_gradient=False) for i in indices]
        return torch.cat([scores.logprob for scores in streamed] or [active.new_empty(0, dtype=dtype)])
    chunks = plan_chunks(len(active), hidden, lm_head, None, kernels.logprob_rows_, kernels.scaled_exp, spec.head)
    logprob = torch.empty(len(active), dtype=dtype, device=hidden.device)
    for chunk in chunks.slices:
        index = active[chunk]
        logprob[chunk] = chunks.score(hidden[index], lm_head, spec.select(index)).logprob
    return logprob
