"""Row-wise maths of the log-prob of text and latent rows on one chunk of logits, in place.

A chunk [n, V] is turned into `exp(z - max z)`, z = logits / T on text rows and logits on latent rows, from which both
the log-probs and, in the same buffer, their gradient follow. Nothing else of size [n, V] is ever alive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latent_kernels._rows import SUMS, LogprobSpec, LossSpec, RowScores, StepLosses
from latent_kernels.reference import component_margins, is_hard, margin_coefficients, surrogate, token_loss


def logprob_rows_(
    logits: Tensor, spec: LogprobSpec, slope: torch.dtype | None, upstream: Tensor | None = None
) -> RowScores:
    """Log-probs of the rows of logits [n, V], which is overwritten: by their slope unless `slope` is None.

    `slope` is the coarsest dtype that will do; here it stays the logits' own. `upstream` [n] scales it.
    """
    hard = is_hard(spec.ids)
    inverse_temperature = logits.new_ones(len(logits), 1).masked_fill_(hard.unsqueeze(-1), 1.0 / spec.temperature)
    ids = spec.ids.clamp_min(0)
    logits.mul_(inverse_temperature)
    picked = logits.gather(-1, ids)
    highest = logits.amax(-1, keepdim=True)
    total = logits.sub_(highest).exp_().sum(-1, keepdim=True)
    log_probs = picked - (highest + total.log())
    margin = component_margins(spec.scores.to(logits.dtype), log_probs)
    logprob = torch.where(hard, log_probs[:, 0], surrogate(margin))
    crossed = torch.where(hard, 0, (margin < 0).sum(-1))
    if slope is None:
        return RowScores(logprob, crossed, None)
    coefficients = margin_coefficients(margin, spec.advantages, spec.margin_gradient) / ids.shape[1]
    first = torch.zeros_like(coefficients)
    first[:, 0] = 1.0
    coefficients = torch.where(hard.unsqueeze(-1), first, coefficients) * inverse_temperature
    if upstream is not None:
        coefficients *= upstream.to(logits.dtype).unsqueeze(-1)
    logits.mul_(-coefficients.sum(-1, keepdim=True) / total).scatter_add_(-1, ids, coefficients)
    return RowScores(logprob, crossed, logits)


def step_losses(logprob: Tensor, spec: LossSpec) -> StepLosses:
    """The weighted loss of response steps with log-probs [n], its gradient, and the sums of its statistics."""
    with torch.enable_grad():
        logprob = logprob.detach().requires_grad_()
        loss, terms = token_loss(
            logprob, spec.old_logprob, spec.advantages, clip_low=spec.clip_low, clip_high=spec.clip_high,
            dual_clip=spec.dual_clip, ref_logprob=spec.ref_logprob, kl_coef=spec.kl_coef,
        )  # fmt: skip
        total = (loss * spec.weights).sum()
        (gradient,) = torch.autograd.grad(total, logprob)
    if "kl" in terms:
        terms["kl"] = terms["kl"] * spec.weights
    sums = [terms[name].sum() if name in terms else total.new_zeros(()) for name in SUMS[1:]]
    return StepLosses(gradient, torch.stack([total.detach(), *sums]))
