"""The eager latent steps of SofT-GRPO and Multiplex Thinking.

Both start from the noise-free step, which hard rows keep, and replace the mixtures of latent rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from latent_kernels._eager.latent_step import latent_step_from_logits_eager, mixture
from latent_kernels._types import LatentStep, LatentStepOptions
from latent_kernels.reference.latent_step import (
    Mixture,
    clean_options,
    multiplex_draws,
    soft_grpo_mixture,
    weighed,
    with_ended_rows,
)

GROUP = 128  # neighbouring ids whose mass is summed before the others', as in the kernel


def multiplex_mixture_grouped(logits: Tensor, options: LatentStepOptions) -> Mixture:
    """Compute the reference's `multiplex_mixture` from logits [B, V], in a float64 sum over groups of the vocabulary.

    A draw picks a group by the mass of the groups, then an id inside the group.
    """
    rows, vocab = logits.shape
    groups = F.pad(logits, (0, -vocab % GROUP), value=-torch.inf).view(rows, -1, GROUP)
    peak = groups.amax((1, 2), keepdim=True)
    masses = (groups - peak).exp_().sum(-1, dtype=torch.float64)
    group, share = pick(masses, multiplex_draws(rows, options, logits.device))
    chosen = groups.gather(1, group.unsqueeze(-1).expand(-1, -1, GROUP)).double()  # [B, K, GROUP]
    inner = (chosen - chosen.amax(-1, keepdim=True)).exp()
    place, _ = pick(inner.flatten(0, 1), share.reshape(-1, 1))
    ids = group * GROUP + place.view_as(group)
    return weighed(ids, logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True), options)


def pick(masses: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Return what draws in [0, 1] pick [R, K] from masses [R, M], and where in its mass each draw lies, in [0, 1]."""
    ends = masses.cumsum(-1)
    targets = draws * ends[:, -1:]
    last = (ends < ends[:, -1:]).sum(-1, keepdim=True)  # a draw of 1 picks the last positive mass
    index = torch.minimum(torch.searchsorted(ends, targets, right=True), last)
    before = F.pad(ends, (1, 0)).gather(-1, index)
    return index, ((targets - before) / masses.gather(-1, index)).clamp(0.0, 1.0)


def latent_step_with_method_eager(logits: Tensor, embedding: Tensor, options: LatentStepOptions) -> LatentStep:
    """Compute the step of any method on checked arguments and float32 or float64 logits [B, V]."""
    if options.method == "latent_grpo" or (options.method == "multiplex" and options.noise == "none"):
        return latent_step_from_logits_eager(logits, embedding, options)
    clean = latent_step_from_logits_eager(logits, embedding, clean_options(options))
    if not len(logits):
        return clean
    if options.method == "soft_grpo":
        chosen = soft_grpo_mixture(logits, clean.ids, options)
    else:
        chosen = multiplex_mixture_grouped(logits, options)
    latent = clean.is_latent.unsqueeze(-1)
    step = clean._replace(
        ids=torch.where(latent, chosen.ids, clean.ids),
        scores=torch.where(latent, chosen.scores.float(), clean.scores),
        weights=torch.where(latent, chosen.weights.float(), clean.weights),
        embedding=torch.where(latent, mixture(chosen.ids, chosen.weights, embedding), clean.embedding),
    )
    return with_ended_rows(step, options)
