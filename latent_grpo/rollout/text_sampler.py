"""Text tokens by temperature, top-k and top-p, one uniform draw a row."""

from __future__ import annotations

import torch
from torch import Tensor

from latent_grpo.config import LatentSampling

FIRST_CANDIDATES, GROWTH = 64, 8  # of a nucleus without top_k, on a CPU


def sample_text(logits: Tensor, sampling: LatentSampling, draw: Tensor) -> Tensor:
    """One token a row [B] from float32 logits [B, V]: temperature, then top-k, then top-p; greedy at temperature 0.

    By inverting the distribution function, tokens in the order of their logits, at draw [B], float64 in (0, 1).
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    best, ids, log_z = _candidates(logits / sampling.temperature, sampling)
    probs = (best.double() - log_z).exp()
    mass = probs.cumsum(-1)
    probs = probs.masked_fill(mass - probs >= sampling.top_p, 0.0)
    mass = probs.cumsum(-1)
    place = torch.searchsorted(mass, draw.unsqueeze(-1) * mass[:, -1:], right=True)
    # A draw that rounds onto the last candidate's mass must not fall on one that the nucleus removed.
    place = torch.minimum(place, (probs > 0).sum(-1, keepdim=True) - 1)
    return ids.gather(-1, place).squeeze(-1)


def _candidates(logits: Tensor, sampling: LatentSampling) -> tuple[Tensor, Tensor, Tensor]:
    """The highest logits [B, C] downwards, their ids, and the log-sum-exp [B, 1] of those that top-k leaves, float64.

    Without top_k they are as many as the nucleus needs, which only a CPU can ask for without a wait: a GPU gets all.
    """
    vocab = logits.shape[-1]
    if sampling.top_k:
        best, ids = logits.topk(min(sampling.top_k, vocab), dim=-1)
        return best, ids, best.double().logsumexp(-1, keepdim=True)
    log_z = logits.double().logsumexp(-1, keepdim=True)
    count = vocab if logits.is_cuda else FIRST_CANDIDATES
    while True:
        best, ids = logits.topk(min(count, vocab), dim=-1)
        if count >= vocab or bool(((best - log_z).exp().sum(-1) >= sampling.top_p).all()):
            return best, ids, log_z
        count *= GROWTH
