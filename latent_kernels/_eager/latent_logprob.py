"""The eager log-probs of text and latent rows, on one chunk of logits, in place (Eq. 15-17).

A chunk [n, V] arrives as the product with the LM head and is turned into logits, then into `exp(z - max z)`, where z is
logits / T on text rows and logits on latent rows. The log-probs follow from it and, in the same buffer, their gradient
in the product. No other tensor of size [n, V] is ever alive: a soft cap, whose slope needs the logits once more, takes
the two passes of the entropy bonus.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latent_kernels._linear import head_logits_, softcap_slope
from latent_kernels._loss_types import SUMS, LogprobSpec, LossSpec, RowForward, RowGradient, RowScores, StepLosses
from latent_kernels.reference.latent_step import has_valid_ids, is_hard
from latent_kernels.reference.loss import (
    MARGIN_MAX,
    component_margins,
    margin_coefficients,
    soft_margins,
    soft_surrogate,
    surrogate,
    token_loss,
    used_components,
)

BLOCK_COLUMNS = 8192  # columns of logits at a time, in steps that need a second tensor of their size


def logprob_rows_(
    logits: Tensor, spec: LogprobSpec, dtype: torch.dtype | None, upstream: Tensor | None = None
) -> RowScores:
    """Return the log-probs of a product [n, V], and overwrite it with their gradient unless `dtype` is None.

    `dtype` is the coarsest dtype in which the gradient may be stored; here it keeps that of the product. `upstream` has
    the shape of the log-probs and scales the gradient. If `dtype` is None, the product is overwritten by intermediate
    values.
    """
    if spec.head.softcap is not None:
        scored = forward_rows(logits, spec, entropy=False)
        gradient = None
        if dtype is not None:
            upstream = torch.ones_like(scored.logprob) if upstream is None else upstream
            gradient = backward_rows_(logits, spec, scored, dtype, upstream, None)
        return RowScores(scored.logprob, scored.crossed, gradient)
    head_logits_(logits, spec.head)
    hard = is_hard(spec.ids)
    inverse_temperature = inverse_temperature_of(logits, spec, hard)
    ids, exist = spec.ids.clamp(0, logits.shape[1] - 1), has_valid_ids(spec.ids, logits.shape[1])
    logits.mul_(inverse_temperature)
    component_logits = logits.gather(-1, ids)
    highest = logits.amax(-1, keepdim=True)
    total = logits.sub_(highest).exp_().sum(-1, keepdim=True)
    log_probs = component_logits - (highest + total.log())
    logprob, crossed = score(log_probs, spec, hard, exist)
    if dtype is None:
        return RowScores(logprob, crossed, None)
    coefficients = coefficients_of(log_probs, spec, hard, exist) * (inverse_temperature * spec.head.logit_scale)
    if upstream is not None:
        coefficients *= _per_component(upstream).to(logits.dtype)
    # sum_k c_k (onehot(id_k) - softmax): `logits` holds the exponentials, whose sum is `total`.
    logits.mul_(-softmax_share(coefficients, spec, hard) / total).scatter_add_(-1, ids, coefficients)
    return RowScores(logprob, crossed, RowGradient(logits, None))


def inverse_temperature_of(logits: Tensor, spec: LogprobSpec, hard: Tensor) -> Tensor:
    """Return 1 / T on text rows and 1 on latent rows, [n, 1]."""
    return logits.new_ones(len(logits), 1).masked_fill_(hard.unsqueeze(-1), 1.0 / spec.temperature)


def _per_component(upstream: Tensor) -> Tensor:
    """Return a gradient in log-probs, [n] or [n, K], in a shape that broadcasts to [n, K]."""
    return upstream.unsqueeze(-1) if upstream.ndim == 1 else upstream


def score(log_probs: Tensor, spec: LogprobSpec, hard: Tensor, exist: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probs and counts of crossed margins [n], from the components' log-probs [n, K].

    The log-prob of a row whose ids do not exist [n] is NaN.
    """
    if spec.method == "multiplex":
        each = torch.where(used_components(spec.ids), log_probs, 0.0)
        each = each.masked_fill(~exist.unsqueeze(-1), torch.nan)
        return each if spec.components else each.sum(-1), torch.zeros_like(hard, dtype=torch.int64)
    scores = spec.scores.to(log_probs.dtype)
    if spec.method == "soft_grpo":
        margin, latent = soft_margins(scores, log_probs)[0], soft_surrogate(scores, log_probs)
    else:
        margin = component_margins(scores, log_probs)
        latent = surrogate(margin)
    logprob = torch.where(hard, log_probs[:, 0], latent).masked_fill_(~exist, torch.nan)
    return logprob, torch.where(hard | ~exist, 0, (margin < 0).sum(-1))


def coefficients_of(log_probs: Tensor, spec: LogprobSpec, hard: Tensor, exist: Tensor) -> Tensor:
    """Return the gradient of the log-prob in the log-probs of the components, [n, K]; 0 where ids do not exist."""
    scores = spec.scores.to(log_probs.dtype)
    if spec.method == "multiplex":
        coefficients = torch.ones_like(log_probs)
    elif spec.method == "soft_grpo":
        with torch.enable_grad():
            leaf = log_probs.detach().requires_grad_()
            (coefficients,) = torch.autograd.grad(soft_surrogate(scores, leaf).sum(), leaf)
    else:
        margin = component_margins(scores, log_probs)
        coefficients = margin_coefficients(margin, spec.advantages, spec.margin_gradient) / margin.shape[1]
    first = torch.zeros_like(coefficients)
    first[:, 0] = 1.0  # the only component of a text row is its token
    return torch.where(hard.unsqueeze(-1), first, coefficients).masked_fill_(~exist.unsqueeze(-1), 0.0)


def softmax_share(coefficients: Tensor, spec: LogprobSpec, hard: Tensor) -> Tensor:
    """Return by how much of the softmax the gradient of a row falls, [n, 1]: the sum of its coefficients [n, K].

    A latent row of SofT-GRPO depends on the differences of its K logits alone, so its sum is exactly 0.
    """
    total = coefficients.sum(-1, keepdim=True)
    return total.masked_fill_(~hard.unsqueeze(-1), 0.0) if spec.method == "soft_grpo" else total


def forward_rows(logits: Tensor, spec: LogprobSpec, *, entropy: bool) -> RowForward:
    """Return the log-probs of a product [n, V] and, if wanted, the entropy of softmax(logits / T) on text rows.

    The product is overwritten by the logits.
    """
    head_logits_(logits, spec.head)
    hard = is_hard(spec.ids)
    inverse_temperature = inverse_temperature_of(logits, spec, hard)
    highest = logits.amax(-1, keepdim=True) * inverse_temperature
    total, spread = torch.zeros_like(highest), torch.zeros_like(highest)
    for block in logits.split(BLOCK_COLUMNS, -1):
        below = (block * inverse_temperature).sub_(highest).clamp_min_(-MARGIN_MAX)  # 0 * -inf would be NaN
        weight = below.exp()
        total += weight.sum(-1, keepdim=True)
        if entropy:
            spread += weight.mul_(below).sum(-1, keepdim=True)
    log_z = highest + total.log()
    ids, exist = spec.ids.clamp(0, logits.shape[1] - 1), has_valid_ids(spec.ids, logits.shape[1])
    log_probs = logits.gather(-1, ids) * inverse_temperature - log_z
    logprob, crossed = score(log_probs, spec, hard, exist)
    nats = torch.where(hard, (total.log() - spread / total).squeeze(-1), 0.0) if entropy else None
    return RowForward(logprob, crossed, log_z.squeeze(-1), nats)


def backward_rows_(
    logits: Tensor, spec: LogprobSpec, scored: RowForward, dtype: torch.dtype, upstream: Tensor, bonus: Tensor | None
) -> RowGradient:
    """Overwrite the logits [n, V] of `forward_rows` with a gradient in the product with the head, and return it.

    It is the gradient of `upstream * logprob + bonus * entropy`.
    The gradient of the entropy is d entropy / dz_v = -p_v (log p_v + entropy), with z = logits / T. `bonus` [n] is 0 on
    latent rows. It is None without entropies. `dtype` is the coarsest dtype in which the gradient may be stored; here
    it keeps that of the logits.
    """
    hard, ids, softcap = is_hard(spec.ids), spec.ids.clamp(0, logits.shape[1] - 1), spec.head.softcap
    exist = has_valid_ids(spec.ids, logits.shape[1])
    inverse_temperature = inverse_temperature_of(logits, spec, hard)
    log_z = scored.log_z.unsqueeze(-1)
    picked = logits.gather(-1, ids)
    slope = inverse_temperature * spec.head.logit_scale
    coefficients = coefficients_of(picked * inverse_temperature - log_z, spec, hard, exist)
    coefficients = coefficients * (slope * _per_component(upstream))
    constant = softmax_share(coefficients, spec, hard)
    bonus = torch.zeros_like(log_z) if bonus is None else bonus.unsqueeze(-1) * slope
    if scored.entropy is not None:
        constant = constant + bonus * scored.entropy.unsqueeze(-1)
    for block in logits.split(BLOCK_COLUMNS, -1):
        slope_of_cap = None if softcap is None else softcap_slope(block, softcap)
        log_probs = block.mul_(inverse_temperature).sub_(log_z).clamp_min_(-MARGIN_MAX)
        weight = log_probs.exp()
        block.mul_(bonus).add_(constant).mul_(weight.neg_())
        if slope_of_cap is not None:
            block.mul_(slope_of_cap)
    if softcap is not None:
        coefficients = coefficients * softcap_slope(picked, softcap)
    return RowGradient(logits.scatter_add_(-1, ids, coefficients), None)


def score_rows(logits: Tensor, spec: LogprobSpec) -> Tensor:
    """Return the log-probs [n] of logits [n, V]; for calls that need no gradient."""
    hard = is_hard(spec.ids)
    # On a CPU, latent rows save the product with 1. A GPU is not asked, because the host would wait for the answer.
    if spec.temperature != 1.0 and (logits.is_cuda or bool(hard.any())):
        logits = logits * inverse_temperature_of(logits, spec, hard)
    ids, exist = spec.ids.clamp(0, logits.shape[1] - 1), has_valid_ids(spec.ids, logits.shape[1])
    return score(logits.log_softmax(-1).gather(-1, ids), spec, hard, exist)[0]


def step_losses(logprob: Tensor, spec: LossSpec, used: Tensor | None = None, *, wants_gradient: bool) -> StepLosses:
    """Return the weighted loss of response steps with log-probs [n], its gradient, and the sums of its statistics.

    Autograd computes the gradient, if it is wanted; the inference mode has no autograd. With `used` [n, K] bool,
    log-probs are [n, K], and the components that are used each have a loss of their own.
    """
    weights = spec.weights
    if used is not None:
        weights = weights.unsqueeze(-1) * used
        ref = None if spec.ref_logprob is None else torch.where(used, spec.ref_logprob, 0.0)
        spec = spec._replace(old_logprob=torch.where(used, spec.old_logprob, 0.0), ref_logprob=ref)
    with torch.set_grad_enabled(wants_gradient):
        logprob = logprob.detach().requires_grad_(wants_gradient)
        loss, terms = token_loss(
            logprob,
            spec.old_logprob,
            spec.advantages,
            spec.ref_logprob,
            spec.sequence_log_ratio,
            spec.sequence_kl,
            spec.options,
        )
        total = (loss * weights).sum()
        gradient = torch.autograd.grad(total, logprob)[0] if wants_gradient else None
    if "kl" in terms:
        terms["kl"] = terms["kl"] * weights
    if used is not None:
        # The ratio of an unused component is 1, which "cispo" may clip too.
        terms = {name: term * used for name, term in terms.items()}
    sums = [terms[name].sum() if name in terms else total.new_zeros(()) for name in SUMS[1:]]
    return StepLosses(gradient, torch.stack([total.detach(), *sums]))
