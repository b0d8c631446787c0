"""Replay: the hidden states and log-probs of a recorded response, computed again with gradients."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from latent_grpo.model import body, embed, embedding_scale, embedding_table, head_of, positions
from latent_grpo.rollout.trajectory import Rollout
from latent_kernels import latent_logprob, mix_embeddings


def replay(model: Any, rollout: Rollout) -> Tensor:
    """Return the hidden states [R, T, D] that predict every response step, by teacher forcing.

    The input of a latent step is the mixture of its recorded ids and scores, which are constants. So these inputs have
    a gradient only in the embedding table, if that is trained.

    A prompt is computed once. All responses to it share its cache, with gradients, so the cost is P * Lp + R * T tokens
    instead of R * (Lp + T). P prompts of Lp tokens, R responses of T steps, hidden size D.
    """
    prompt_mask = rollout.prompt_mask
    prompt_positions = positions(prompt_mask)
    cache = DynamicCache(config=model.config)
    prompt_embeds = embed(model, rollout.prompt_ids)
    # The last token of a prompt predicts the first step of every response to it.
    prompt_hidden = body(model, prompt_embeds, prompt_mask, prompt_positions, cache)[:, -1]
    first_hidden = prompt_hidden[rollout.prompt_index].unsqueeze(1)
    rows, steps, components = rollout.ids.shape
    if steps == 1:
        return first_hidden
    cache.batch_select_indices(rollout.prompt_index)
    # The last step predicts nothing, so it is not an input.
    inputs = slice(0, steps - 1)
    ids, scores = (values[:, inputs].reshape(-1, components) for values in (rollout.ids, rollout.scores))
    embeds = recorded_inputs(model, ids, scores, rollout.tau).view(rows, steps - 1, -1)
    mask = torch.cat([prompt_mask[rollout.prompt_index], rollout.mask[:, inputs].to(prompt_mask.dtype)], 1)
    # Prompts are padded on the left, so their last token has their last position.
    last_position = prompt_positions[:, -1:][rollout.prompt_index]
    response_positions = last_position + 1 + torch.arange(steps - 1, device=last_position.device)
    return torch.cat([first_hidden, body(model, embeds, mask, response_positions, cache)], 1)


def recorded_inputs(model: Any, ids: Tensor, scores: Tensor, tau: float) -> Tensor:
    """Return what the model was fed for recorded steps [N, D], of ids [N, K] and scores [N, K] (Eq. 1).

    Differentiable in the embedding table.
    """
    embeds, scale = mix_embeddings(ids, scores, input_table(model), tau=tau), embedding_scale(model)
    return embeds if scale == 1.0 else embeds * scale


def input_table(model: Any) -> Tensor:
    """Return the embedding table [V, D], through which the padding token gets no gradient, as in the model itself."""
    table = embedding_table(model)
    padding = getattr(model.get_input_embeddings(), "padding_idx", None)
    if padding is None or not (table.requires_grad and torch.is_grad_enabled()):
        return table

    def without_padding(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[padding] = 0.0
        return gradient

    view = table.view_as(table)
    view.register_hook(without_padding)
    return view


def replay_logprob(
    model: Any,
    rollout: Rollout,
    temperature: float,
    method: str = "latent_grpo",
    components: bool = False,
    hidden: Tensor | None = None,
) -> Tensor:
    """Return the log-probs [R, T] float32 of the steps of a rollout under `model`; 0 on masked steps.

    Differentiable in the model.

    Args:
        temperature: the sampling temperature, which divides the logits of text steps only.
        method: what the log-prob of a latent step is, see `latent_logprob_from_logits`.
        components: with the method "multiplex", return the log-prob of every component [R, T, K] instead of their sum.
        hidden: what `replay` returned for the rollout [R, T, D], if it is known. Default: replay it.
    """
    hidden = replay(model, rollout) if hidden is None else hidden
    active, head = rollout.mask, head_of(model)
    logprob = latent_logprob(
        hidden[active],
        head.weight,
        rollout.ids[active],
        rollout.scores[active],
        temperature=temperature,
        method=method,
        components=components,
        **head.options(),
    )
    out = torch.zeros(rollout.ids.shape if components else active.shape, device=logprob.device)
    return out.masked_scatter(active.unsqueeze(-1) if components else active, logprob.float())


def warn_of_gap(gap: float, limit: float, step: int) -> None:
    """Warn if the log-probs of sampler and trainer differ by more than `limit` nats in the mean."""
    if gap > limit:
        warnings.warn(
            f"step {step}: sampled log-probs are off the trainer's by {gap:.3g} nats, over max_logprob_gap {limit:g}; "
            "use old_logprobs recompute with importance_sampling_cap 2",
            stacklevel=2,
        )
