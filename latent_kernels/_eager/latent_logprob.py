"""Row-wise maths of the log-prob of text and latent rows on one chunk of logits, in place.

A chunk [n, V] is turned into `exp(z - max z)`, z = logits / T on text rows and logits on latent rows, from which both
the log-probs and, in the same buffer, their gradient follow. Nothing else of size [n, V] is ever alive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latent_kernels._loss_types import SUMS, LogprobSpec, LossSpec, RowEntropies, RowScores, StepLosses
from latent_kernels.reference import (
    MARGIN_MAX,
    component_margins,
    is_hard,
    margin_coefficients,
    surrogate,
    token_loss,
)

BLOCK_COLUMNS = 8192  # logits of a row at a time, where a second tensor of their size is needed


def logprob_rows_(
    logits: Tensor, spec: LogprobSpec, slope: torch.dtype | None, upstream: Tensor | None = None
) -> RowScores:
    """Log-probs of the rows of logits [n, V], which is overwritten: by their slope unless `slope` is None.

    `slope` is the coarsest dtype that will do; here it stays the logits' own. `upstream` [n] scales it.
    """
    hard = is_hard(spec.ids)
    inverse_temperature = _inverse_temperature(logits, spec, hard)
    ids = spec.ids.clamp_min(0)
    logits.mul_(inverse_temperature)
    picked = logits.gather(-1, ids)
    highest = logits.amax(-1, keepdim=True)
    total = logits.sub_(highest).exp_().sum(-1, keepdim=True)
    log_probs = picked - (highest + total.log())
    logprob, crossed, margin = _score(log_probs, spec, hard)
    if slope is None:
        return RowScores(logprob, crossed, None)
    coefficients = _coefficients(margin, spec, hard) * inverse_temperature
    if upstream is not None:
        coefficients *= upstream.to(logits.dtype).unsqueeze(-1)
    logits.mul_(-coefficients.sum(-1, keepdim=True) / total).scatter_add_(-1, ids, coefficients)
    return RowScores(logprob, crossed, logits)


def _inverse_temperature(logits: Tensor, spec: LogprobSpec, hard: Tensor) -> Tensor:
    """1 / T on text rows, 1 on latent ones [n, 1]."""
    return logits.new_ones(len(logits), 1).masked_fill_(hard.unsqueeze(-1), 1.0 / spec.temperature)


def _score(log_probs: Tensor, spec: LogprobSpec, hard: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs [n], counts of crossed margins [n] and margins [n, K] from the components' log-probs [n, K]."""
    margin = component_margins(spec.scores.to(log_probs.dtype), log_probs)
    logprob = torch.where(hard, log_probs[:, 0], surrogate(margin))
    return logprob, torch.where(hard, 0, (margin < 0).sum(-1)), margin


def _coefficients(margin: Tensor, spec: LogprobSpec, hard: Tensor) -> Tensor:
    """d logprob / d component log-prob [n, K]."""
    coefficients = margin_coefficients(margin, spec.advantages, spec.margin_gradient) / margin.shape[1]
    first = torch.zeros_like(coefficients)
    first[:, 0] = 1.0
    return torch.where(hard.unsqueeze(-1), first, coefficients)


def entropy_rows(logits: Tensor, spec: LogprobSpec) -> RowEntropies:
    """Log-probs of the rows of logits [n, V], and the entropy of softmax(logits / T) on text rows. Logits stay."""
    hard = is_hard(spec.ids)
    inverse_temperature = _inverse_temperature(logits, spec, hard)
    highest = logits.amax(-1, keepdim=True) * inverse_temperature
    total, spread = torch.zeros_like(highest), torch.zeros_like(highest)
    for block in logits.split(BLOCK_COLUMNS, -1):
        below = (block * inverse_temperature).sub_(highest).clamp_min_(-MARGIN_MAX)  # 0 * -inf is not a number
        weight = below.exp()
        total += weight.sum(-1, keepdim=True)
        spread += weight.mul_(below).sum(-1, keepdim=True)
    log_z = highest + total.log()
    log_probs = logits.gather(-1, spec.ids.clamp_min(0)) * inverse_temperature - log_z
    logprob, crossed, _ = _score(log_probs, spec, hard)
    entropy = torch.where(hard, (total.log() - spread / total).squeeze(-1), 0.0)
    return RowEntropies(logprob, crossed, log_z.squeeze(-1), entropy)


def entropy_slope_(
    logits: Tensor, spec: LogprobSpec, found: RowEntropies, slope: torch.dtype, upstream: Tensor, bonus: Tensor
) -> Tensor:
    """Slope of `upstream * logprob + bonus * entropy` over the rows' logits [n, V], which it overwrites.

    d entropy / dz_v = -p_v (log p_v + entropy), z = logits / T; `bonus` [n] is 0 on latent rows.
    """
    hard, ids = is_hard(spec.ids), spec.ids.clamp_min(0)
    inverse_temperature = _inverse_temperature(logits, spec, hard)
    log_z, bonus = found.log_z.unsqueeze(-1), bonus.unsqueeze(-1) * inverse_temperature
    margin = _score(logits.gather(-1, ids) * inverse_temperature - log_z, spec, hard)[2]
    coefficients = _coefficients(margin, spec, hard) * (inverse_temperature * upstream.unsqueeze(-1))
    constant = coefficients.sum(-1, keepdim=True) + bonus * found.entropy.unsqueeze(-1)
    for block in logits.split(BLOCK_COLUMNS, -1):
        log_probs = block.mul_(inverse_temperature).sub_(log_z).clamp_min_(-MARGIN_MAX)
        weight = log_probs.exp()
        block.mul_(bonus).add_(constant).mul_(weight.neg_())
    return logits.scatter_add_(-1, ids, coefficients)


def score_rows(logits: Tensor, spec: LogprobSpec) -> Tensor:
    """Log-probs [n] of the rows of logits [n, V] where no gradient will be asked for."""
    hard = is_hard(spec.ids)
    if spec.temperature != 1.0 and (logits.is_cuda or bool(hard.any())):  # a GPU is not asked
        logits = logits * _inverse_temperature(logits, spec, hard)
    return _score(logits.log_softmax(-1).gather(-1, spec.ids.clamp_min(0)), spec, hard)[0]


def step_losses(logprob: Tensor, spec: LossSpec) -> StepLosses:
    """The weighted loss of response steps with log-probs [n], its gradient, and the sums of its statistics."""
    with torch.enable_grad():
        logprob = logprob.detach().requires_grad_()
        loss, terms = token_loss(
            logprob, spec.old_logprob, spec.advantages, spec.ref_logprob, spec.sequence_log_ratio, spec.options
        )
        total = (loss * spec.weights).sum()
        (gradient,) = torch.autograd.grad(total, logprob)
    if "kl" in terms:
        terms["kl"] = terms["kl"] * spec.weights
    sums = [terms[name].sum() if name in terms else total.new_zeros(()) for name in SUMS[1:]]
    return StepLosses(gradient, torch.stack([total.detach(), *sums]))
