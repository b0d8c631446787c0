"""Input embeddings of the warm start: mixtures of the targets, perturbed by Gumbel noise if asked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latent_grpo.model import embedding_scale
from latent_grpo.seeds import derive_seed
from latent_grpo.sft.examples import SFTBatch
from latent_kernels import GUMBEL_HIGH, GUMBEL_LOW, philox_uniform

MOST_COMPONENTS = 2**12  # limit of `compression`; gives every component of an element its own noise stream
ATTEMPTS = 100  # draws of a row's noise, until the end marker is on top of none of its latent steps


def input_mixtures(batch: SFTBatch, model: Any, gumbel_scale: float = 0.0, seed: int = 0, step: int = 0) -> Tensor:
    """Return the input embeddings [B, L, D] in the dtype of the model's table: the mixtures of the targets.

    With `gumbel_scale`, the weights of latent elements get Gumbel noise of (seed, step), times the scale.
    """
    weights = batch.weights
    if gumbel_scale > 0:
        noise = gumbel_noise(batch, seed, step) * gumbel_scale
        # Unused components have the logit -inf. An element of padding has only such logits, whose softmax is NaN.
        perturbed = (weights.log() + noise).nan_to_num(neginf=-torch.inf).softmax(-1).nan_to_num(0.0)
        weights = torch.where((weights > 0).sum(-1, keepdim=True) > 1, perturbed, weights)
    return mixtures(model, batch.ids, weights)


def mixtures(model: Any, ids: Tensor, weights: Tensor) -> Tensor:
    """Return what the model is fed for mixtures [..., D], of ids [..., C] with weights [..., C] float32."""
    module, scale = model.get_input_embeddings(), embedding_scale(model)
    # F.embedding instead of indexing: its gradient adds up in one order, whatever the number of threads.
    components = F.embedding(ids, module.weight, getattr(module, "padding_idx", None)).float()
    mixed = (weights.unsqueeze(-1) * components).sum(-2).to(module.weight.dtype)
    return mixed if scale == 1.0 else mixed * scale


def perturbed_labels(batch: SFTBatch, scale: float, seed: int, step: int, end_id: int) -> tuple[SFTBatch, int]:
    """Return a batch whose latent weights are perturbed, as targets and as inputs, and the number of failed rows.

    The weights p of a latent element become softmax(log(p + 1e-10) + clamp(scale * g, -1.5, 3)), with Gumbel noise g
    of (seed, step, attempt). A row is drawn again while `end_id` has the largest weight in any of its latent elements:
    a latent run would end there. A row that fails ATTEMPTS times keeps its last draw.
    """
    weights = batch.weights.clone()
    pending = torch.arange(len(weights), device=weights.device)
    for attempt in range(ATTEMPTS):
        rows = SFTBatch(*(tensor[pending] for tensor in vars(batch).values()))
        noise = (gumbel(rows, derive_seed(seed, step, attempt, ATTEMPTS), 0) * scale).clamp(GUMBEL_LOW, GUMBEL_HIGH)
        drawn = ((rows.weights + 1e-10).log() + noise).softmax(-1)
        weights[pending] = torch.where(rows.latent.unsqueeze(-1), drawn, rows.weights)
        heaviest = rows.ids.gather(-1, drawn.argmax(-1, keepdim=True)).squeeze(-1)
        pending = pending[((heaviest == end_id) & rows.latent).any(-1)]
        if not len(pending):
            break
    return replace(batch, weights=weights), len(pending)


def gumbel_noise(batch: SFTBatch, seed: int, step: int) -> Tensor:
    """Return clamped Gumbel noise [B, L, C] float32, in [-1.5, 3], as for the latent steps of a rollout."""
    return gumbel(batch, seed, step).clamp(GUMBEL_LOW, GUMBEL_HIGH)


def gumbel(batch: SFTBatch, seed: int, step: int) -> Tensor:
    """Return Gumbel noise [B, L, C] float32.

    It is a function of (seed, step, number of the example, position in the response, component), so it does not depend
    on the other examples of the batch.
    """
    _, elements, components = batch.ids.shape
    start = batch.response.int().argmax(-1, keepdim=True)
    position = (torch.arange(elements, device=batch.ids.device) - start).clamp_min(0)
    within_example = position.unsqueeze(-1) * MOST_COMPONENTS + torch.arange(components, device=position.device)
    streams = batch.numbers.view(-1, 1, 1) * 2**32 + within_example
    draws = philox_uniform(streams.flatten(), seed=seed, step=step).view(streams.shape)
    return (-torch.log(-torch.log(draws))).float()
