"""Input embeddings of the warm start: mixtures of the targets, perturbed by Gumbel noise if asked."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from latent_grpo.sft.examples import SFTBatch
from latent_kernels import GUMBEL_HIGH, GUMBEL_LOW, philox_uniform

MOST_COMPONENTS = 2**12  # limit of `compression`; gives every component of an element its own noise stream


def input_mixtures(batch: SFTBatch, table: Tensor, gumbel_scale: float = 0.0, seed: int = 0, step: int = 0) -> Tensor:
    """Return the input embeddings [B, L, D] in the dtype of `table` [V, D]: the mixtures of the targets.

    With `gumbel_scale`, the weights of latent elements get Gumbel noise of (seed, step), times the scale.
    """
    weights = batch.weights
    if gumbel_scale > 0:
        noise = gumbel_noise(batch, seed, step) * gumbel_scale
        # Unused components have the logit -inf. An element of padding has only such logits, whose softmax is NaN.
        perturbed = (weights.log() + noise).nan_to_num(neginf=-torch.inf).softmax(-1).nan_to_num(0.0)
        weights = torch.where((weights > 0).sum(-1, keepdim=True) > 1, perturbed, weights)
    # F.embedding instead of indexing: its gradient adds up in one order, whatever the number of threads.
    return (weights.unsqueeze(-1) * F.embedding(batch.ids, table).float()).sum(2).to(table.dtype)


def gumbel_noise(batch: SFTBatch, seed: int, step: int) -> Tensor:
    """Return clamped Gumbel noise [B, L, C] float32, in [-1.5, 3], as for the latent steps of a rollout.

    It is a function of (seed, step, number of the example, position in the response, component), so it does not depend
    on the other examples of the batch.
    """
    _, elements, components = batch.ids.shape
    # All responses of a batch start at one position; the longest one reaches the end.
    start = elements - int(batch.response.sum(-1).max())
    position = (torch.arange(elements, device=batch.ids.device) - start).clamp_min(0)
    within_example = position.unsqueeze(-1) * MOST_COMPONENTS + torch.arange(components, device=position.device)
    streams = batch.numbers.view(-1, 1, 1) * 2**32 + within_example
    draws = philox_uniform(streams.flatten(), seed=seed, step=step).view(streams.shape)
    return (-torch.log(-torch.log(draws))).clamp(GUMBEL_LOW, GUMBEL_HIGH).float()
