"""Row-wise maths of the log-prob of text and latent rows on one chunk of logits, in place.

A chunk [n, V] is turned into `exp(z - max z)`, z = logits / T on text rows and logits on latent rows, from which both
the log-probs and, in the same buffer, their gradient follow. Nothing else of size [n, V] is ever alive.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from latent_kernels.reference import component_margins, is_hard, margin_coefficients, surrogate

CHUNK_BYTES = 96 * 1024 * 1024  # one chunk of logits, 196 rows of 128,256 in float32: fewer are slow to multiply


def row_chunks(rows: int, vocab: int, dtype: torch.dtype) -> list[slice]:
    """Slices of equal length (the last shorter) whose logits take about CHUNK_BYTES."""
    size = max(1, CHUNK_BYTES // (vocab * dtype.itemsize))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def chunk_buffer(chunks: list[slice], vocab: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The one buffer [n, V] that every chunk's logits are written to, so that no two are ever alive."""
    rows = max((part.stop - part.start for part in chunks), default=0)
    return torch.empty(rows, vocab, dtype=dtype, device=like.device)


class LogprobSpec(NamedTuple):
    """What N rows are to be scored for: ids, scores [N, K], advantages [N] or None, and the options of SPEC 4."""

    ids: Tensor
    scores: Tensor
    advantages: Tensor | None
    temperature: float
    margin_gradient: str

    def rows(self, part: slice | Tensor) -> LogprobSpec:
        """The same for a part of the rows."""
        advantages = None if self.advantages is None else self.advantages[part]
        return self._replace(ids=self.ids[part], scores=self.scores[part], advantages=advantages)


class RowState(NamedTuple):
    """Log-probs of a chunk and what their gradient needs."""

    logprob: Tensor  # [n]
    coefficients: Tensor  # [n, K] gradient of logprob in the log-prob of component k
    inverse_sum: Tensor  # [n, 1] of the chunk's exponentials
    inverse_temperature: Tensor  # [n, 1]
    ids: Tensor  # [n, K], -100 replaced by 0 (its coefficient is 0)
    crossed: Tensor  # [n] latent components with a negative margin
    latent: Tensor  # [n] bool


def logprob_rows_(logits: Tensor, spec: LogprobSpec) -> RowState:
    """Log-probs of the rows of logits [n, V], which is overwritten with `exp(z - max z)`."""
    hard = is_hard(spec.ids)
    inverse_temperature = logits.new_ones(len(logits), 1).masked_fill_(hard.unsqueeze(-1), 1.0 / spec.temperature)
    ids = spec.ids.clamp_min(0)
    logits.mul_(inverse_temperature)
    picked = logits.gather(-1, ids)
    highest = logits.amax(-1, keepdim=True)
    total = logits.sub_(highest).exp_().sum(-1, keepdim=True)
    log_probs = picked - (highest + total.log())
    margin = component_margins(spec.scores.to(logits.dtype), log_probs)
    coefficients = margin_coefficients(margin, spec.advantages, spec.margin_gradient) / ids.shape[1]
    first = torch.zeros_like(coefficients)
    first[:, 0] = 1.0
    return RowState(
        logprob=torch.where(hard, log_probs[:, 0], surrogate(margin)),
        coefficients=torch.where(hard.unsqueeze(-1), first, coefficients),
        inverse_sum=total.reciprocal(),
        inverse_temperature=inverse_temperature,
        ids=ids,
        crossed=torch.where(hard, 0, (margin < 0).sum(-1)),
        latent=~hard,
    )


def logits_gradient_(exponentials: Tensor, state: RowState, grad: Tensor) -> Tensor:
    """`d(sum grad * logprob) / d logits` in place of the exponentials [n, V]; grad [n]."""
    upstream = grad.to(exponentials.dtype).unsqueeze(-1) * state.inverse_temperature
    total = state.coefficients.sum(-1, keepdim=True)
    exponentials.mul_(-upstream * total * state.inverse_sum)
    return exponentials.scatter_add_(-1, state.ids, upstream * state.coefficients)
