"""Text tokens by temperature, top-k and top-p, from one uniform draw per row."""

from __future__ import annotations

import torch
from torch import Tensor

from latent_grpo.config import LatentSampling

# Without top_k, a CPU first looks for the nucleus in this many best tokens, then in GROWTH times as many, and so on.
FIRST_CANDIDATES, GROWTH = 64, 8


def sample_text(logits: Tensor, sampling: LatentSampling, draw: Tensor) -> Tensor:
    """Return one token per row, int64 [B]: temperature, then top-k, then top-p; greedy at temperature 0.

    The token is where the cumulative distribution over the tokens, sorted by logit, passes the draw. So a row's token
    depends on nothing but its logits and its draw.

    Args:
        logits: [B, V] float32 or float64.
        sampling: `temperature`, `top_k` (0: no limit) and `top_p`.
        draw: [B] float64 in (0, 1); not read at temperature 0.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    best, ids, log_z = _candidates(logits / sampling.temperature, sampling)
    probs = (best.double() - log_z).exp()
    mass = probs.cumsum(-1)
    probs = probs.masked_fill(mass - probs >= sampling.top_p, 0.0)
    mass = probs.cumsum(-1)
    index = torch.searchsorted(mass, draw.unsqueeze(-1) * mass[:, -1:], right=True)
    # A draw that rounds up to the whole mass must not select a token that the nucleus has removed.
    index = torch.minimum(index, (probs > 0).sum(-1, keepdim=True) - 1)
    return ids.gather(-1, index).squeeze(-1)


def _candidates(logits: Tensor, sampling: LatentSampling) -> tuple[Tensor, Tensor, Tensor]:
    """Return the C best logits [B, C] in descending order, their ids, and the float64 log-sum-exp [B, 1].

    The log-sum-exp is over the tokens that top-k leaves. C is top_k. Without top_k it is large enough for the nucleus.
    """
    vocab = logits.shape[-1]
    if sampling.top_k:
        best, ids = logits.topk(min(sampling.top_k, vocab), dim=-1)
        return best, ids, best.double().logsumexp(-1, keepdim=True)
    log_z = logits.double().logsumexp(-1, keepdim=True)
    # To know the size of the nucleus, the host would wait for the GPU. So on a GPU all tokens are sorted.
    count = vocab if logits.is_cuda else FIRST_CANDIDATES
    while True:
        best, ids = logits.topk(min(count, vocab), dim=-1)
        if count >= vocab or bool(((best - log_z).exp().sum(-1) >= sampling.top_p).all()):
            return best, ids, log_z
        count *= GROWTH
