"""The loss of the warm start: the divergence of every response element's target from the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from latent_grpo.config import LatentSFTConfig
from latent_grpo.model import Head, body, head_of, positions
from latent_grpo.sft.examples import SFTBatch
from latent_grpo.sft.inputs import input_mixtures
from latent_grpo.update.activation_checkpointing import recomputed

LOSS_CHUNK = 1024  # rows of logits that exist at a time


def target_loss(hidden: Tensor, head: Head, ids: Tensor, weights: Tensor, factors: Tensor | None = None) -> Tensor:
    """Return the sum over rows of KL(target || model), 0-d float32. For a target of one token it is the cross-entropy.

    hidden [N, D], ids [N, C] int64, weights [N, C] float32. factors [N] float32: what each row's term is
    multiplied with; the default is 1. LOSS_CHUNK rows of logits exist at a time; the backward pass computes them again.
    """

    def chunk_loss(hidden: Tensor, ids: Tensor, weights: Tensor, factors: Tensor) -> Tensor:
        log_probs = head.trained_logits(hidden).log_softmax(-1).gather(-1, ids)
        # The clamp keeps 0 * log(0) at 0.
        return (factors * weights * (weights.clamp_min(1e-30).log() - log_probs)).sum()

    # Equal ids in one target are one component with their summed weight; it stays at the first of them.
    same = ids.unsqueeze(-1) == ids.unsqueeze(-2)
    repeated = torch.tril(same, -1).logical_and(weights.unsqueeze(-2) > 0).any(-1)
    weights = torch.where(repeated, 0.0, (same * weights.unsqueeze(-2)).sum(-1)) * (weights > 0)
    factors = torch.ones(len(ids), device=ids.device) if factors is None else factors
    chunks = zip(*(x.split(LOSS_CHUNK) for x in (hidden, ids, weights, factors.unsqueeze(-1))), strict=True)
    return torch.stack([checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks]).sum()


def predicted_response(model: Any, batch: SFTBatch, embeds: Tensor, args: LatentSFTConfig) -> Tensor:
    """Return the hidden states [B, L - 1, D] of the inputs `embeds` [B, L, D]; each predicts the next element."""
    with recomputed(model, args.gradient_checkpointing):
        return body(model, embeds[:, :-1], batch.mask[:, :-1], positions(batch.mask[:, :-1]))


def batch_loss(model: Any, batch: SFTBatch, args: LatentSFTConfig, step: int) -> Tensor:
    """Return the sum of the losses of a batch's response elements, each predicted by the one before it. 0-d float32."""
    embeds = input_mixtures(batch, model, args.gumbel_scale, args.seed, step)
    hidden = predicted_response(model, batch, embeds, args)
    response = batch.response[:, 1:]
    ids, weights = batch.ids[:, 1:][response], batch.weights[:, 1:][response]
    return target_loss(hidden[response], head_of(model), ids, weights)


def soft_label_losses(model: Any, batch: SFTBatch, args: LatentSFTConfig) -> tuple[Tensor, Tensor]:
    """Return two sums over a batch of soft labels, 0-d float32: text elements' cross-entropies, and rows' divergences.

    The divergence of a row is the mean of KL(soft label || model) over its latent elements. Inputs and targets are the
    weights of the batch, so perturbed labels are both (arXiv 2510.15522).
    """
    hidden = predicted_response(model, batch, input_mixtures(batch, model), args)
    latent, head = batch.latent[:, 1:], head_of(model)
    text = batch.response[:, 1:] & ~latent
    steps = latent.sum(-1, keepdim=True).expand_as(latent)[latent]

    def loss(chosen: Tensor, factors: Tensor | None = None) -> Tensor:
        return target_loss(hidden[chosen], head, batch.ids[:, 1:][chosen], batch.weights[:, 1:][chosen], factors)

    return loss(text), loss(latent, 1.0 / steps)
