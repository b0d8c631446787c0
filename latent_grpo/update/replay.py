"""Replay: the hidden states and log-probs of a recorded response, computed again with gradients."""

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
    """Return the hidden states [R, T, D] that predict every response step, by teacher forcing.

    The input of a latent step is the mixture of its recorded ids and scores. No gradient flows through these inputs.

    A prompt is computed once. All responses to it share its cache, with gradients, so the cost is P * Lp + R * T tokens
    instead of R * (Lp + T). P prompts of Lp tokens, R responses of T steps, hidden size D.
    """
    table, prompt_mask = embedding_table(model), rollout.prompt_mask
    prompt_positions = positions(prompt_mask)
    cache = DynamicCache(config=model.config)
    prompt_embeds = F.embedding(rollout.prompt_ids, table)
    # The last token of a prompt predicts the first step of every response to it.
    prompt_hidden = body(model, prompt_embeds, prompt_mask, prompt_positions, cache)[:, -1]
    first_hidden = prompt_hidden[rollout.prompt_index].unsqueeze(1)
    rows, steps, components = rollout.ids.shape
    if steps == 1:
        return first_hidden
    cache.batch_select_indices(rollout.prompt_index)
    # The last step predicts nothing, so it is not an input.
    inputs = slice(0, steps - 1)
    embeds = mix_embeddings(
        rollout.ids[:, inputs].reshape(-1, components),
        rollout.scores[:, inputs].reshape(-1, components),
        table.detach(),
        tau=rollout.tau,
    ).view(rows, steps - 1, -1)
    mask = torch.cat([prompt_mask[rollout.prompt_index], rollout.mask[:, inputs].to(prompt_mask.dtype)], 1)
    # Prompts are padded on the left, so their last token has their last position.
    last_position = prompt_positions[:, -1:][rollout.prompt_index]
    response_positions = last_position + 1 + torch.arange(steps - 1, device=last_position.device)
    return torch.cat([first_hidden, body(model, embeds, mask, response_positions, cache)], 1)


def replay_logprob(
    model: Any, rollout: Rollout, temperature: float, method: str = "latent_grpo", components: bool = False
) -> Tensor:
    """Return the log-probs [R, T] float32 of the steps of a rollout under `model`; 0 on masked steps.

    Differentiable in the model.

    Args:
        temperature: the sampling temperature, which divides the logits of text steps only.
        method: what the log-prob of a latent step is, see `latent_logprob_from_logits`.
        components: with the method "multiplex", return the log-prob of every component [R, T, K] instead of their sum.
    """
    hidden = replay(model, rollout)
    active = rollout.mask
    logprob = latent_logprob(
        hidden[active],
        lm_head(model),
        rollout.ids[active],
        rollout.scores[active],
        temperature=temperature,
        method=method,
        components=components,
    )
    out = torch.zeros(rollout.ids.shape if components else active.shape, device=logprob.device)
    return out.masked_scatter(active.unsqueeze(-1) if components else active, logprob.float())
