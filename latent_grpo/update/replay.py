"""Replay: the hidden states and log-probs of a recorded response, with gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from latent_grpo.model import body, embedding_table, lm_head, positions
from latent_grpo.rollout.trajectory import Rollout
from latent_kernels import latent_logprob, mix_embeddings


def replay(model: Any, rollout: Rollout) -> Tensor:
    """Hidden states [R, T, D] that predict every response step, by teacher forcing.

    A prompt is computed once and its cache shared, with gradients, by the responses to it, so that cost follows
    P * Lp + R * T tokens and not R * (Lp + T).
    """
    table, mask = embedding_table(model), rollout.prompt_mask
    where = positions(mask)
    cache = DynamicCache(config=model.config)
    prompt = body(model, F.embedding(rollout.prompt_ids, table), mask, where, cache)[:, -1]
    first = prompt[rollout.prompt_index].unsqueeze(1)
    rows, steps, components = rollout.ids.shape
    if steps == 1:
        return first
    cache.batch_select_indices(rollout.prompt_index)
    fed = slice(0, steps - 1)
    embeds = mix_embeddings(
        rollout.ids[:, fed].reshape(-1, components),
        rollout.scores[:, fed].reshape(-1, components),
        table.detach(),
        tau=rollout.tau,
    ).view(rows, steps - 1, -1)
    full_mask = torch.cat([mask[rollout.prompt_index], rollout.mask[:, fed].to(mask.dtype)], 1)
    last = where[:, -1:][rollout.prompt_index]
    following = last + 1 + torch.arange(steps - 1, device=last.device)
    return torch.cat([first, body(model, embeds, full_mask, following, cache)], 1)


def replay_logprob(model: Any, rollout: Rollout, temperature: float) -> Tensor:
    """Log-probs [R, T] of a rollout under `model`; 0 where masked."""
    hidden = replay(model, rollout)
    active = rollout.mask
    logprob = latent_logprob(
        hidden[active], lm_head(model), rollout.ids[active], rollout.scores[active], temperature=temperature
    )
    return torch.zeros_like(rollout.logprob).masked_scatter(active, logprob.float())
