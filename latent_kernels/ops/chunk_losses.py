"""The policy loss of a chunk of hidden states, by the functions of one implementation."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from latent_kernels._eager import latent_logprob as eager
from latent_kernels._loss_types import LogprobSpec, LossSpec, RowForward, RowGradient, RowScores, StepLosses
from latent_kernels._scored_chunks import Chunks
from latent_kernels.reference.loss import used_components


class RowKernels(NamedTuple):
    """The functions of one implementation that work on a chunk of logits."""

    logprob_rows_: Callable[..., RowScores]
    forward_rows: Callable[..., RowForward]
    backward_rows_: Callable[..., RowGradient]
    step_losses: Callable[..., StepLosses]
    scaled_exp: ModuleType | None  # where log-probs come straight from the product, if they can
    streams: bool = False  # whether `streamed_logprob` takes their place where it can


def row_kernels(implementation: str, device: torch.device) -> RowKernels:
    """Return the functions of "triton" or "eager" on a device."""
    if implementation == "triton":
        from latent_kernels._triton import latent_logprob as triton
        from latent_kernels._triton import scaled_exp
        from latent_kernels._triton.policy_loss import step_losses

        return RowKernels(triton.logprob_rows_, triton.forward_rows, triton.backward_rows_, step_losses, scaled_exp)
    functions = (eager.logprob_rows_, eager.forward_rows, eager.backward_rows_, eager.step_losses)
    return RowKernels(*functions, None, streams=device.type == "cpu")


class ChunkLosses(NamedTuple):
    """The loss of a chunk of n rows. `dlogits` lies in the buffer that all chunks share."""

    dlogits: Tensor | None  # [n, V]; times `factor` it is the gradient of the weighted loss
    factor: Tensor | None  # [n]; None stands for 1
    sums: Tensor  # [6] in the order of SUMS
    crossed: Tensor  # [n]
    entropy: Tensor | None  # [n], 0 on latent rows
    dhidden: Tensor | None = None  # [n, D], in place of dlogits; `factor` is multiplied in already


def in_one_pass(logprob_spec: LogprobSpec, loss_spec: LossSpec) -> bool:
    """Tell whether the gradient in the logits is that of the log-prob times one number per row."""
    return loss_spec.bonus is None and not logprob_spec.components


def chunk_losses(
    rows: Tensor, lm_head: Tensor, logprob_spec: LogprobSpec, loss_spec: LossSpec, chunks: Chunks, kernels: RowKernels
) -> ChunkLosses:
    """Return the weighted loss of hidden states [n, D] and, if wanted, its gradient in their product with the head.

    Without an entropy bonus and ratios of components, that is the gradient of the log-prob times one number per row. So
    it is stored before the loss is known, and the logits are read once or not at all.
    """
    stored_dtype = chunks.stored_dtype
    wants_gradient = stored_dtype is not None
    if in_one_pass(logprob_spec, loss_spec):
        scores = chunks.score(rows, lm_head, logprob_spec)
        gradient, sums = kernels.step_losses(scores.logprob, loss_spec, wants_gradient=wants_gradient)
        found = scores.gradient
        if found is None:
            return ChunkLosses(None, None, sums, scores.crossed, None)
        return ChunkLosses(found.dlogits, found.times(gradient), sums, scores.crossed, None)
    product = chunks.project(rows, lm_head)
    scored = kernels.forward_rows(product, logprob_spec, entropy=loss_spec.bonus is not None)
    used = used_components(logprob_spec.ids) if logprob_spec.components else None
    gradient, sums = kernels.step_losses(scored.logprob, loss_spec, used, wants_gradient=wants_gradient)
    bonus = None
    if scored.entropy is not None and loss_spec.bonus is not None:
        bonus = -loss_spec.bonus
        sums[0] += (bonus * scored.entropy).sum()
    if stored_dtype is None:
        return ChunkLosses(None, None, sums, scored.crossed, scored.entropy)
    found = kernels.backward_rows_(product, logprob_spec, scored, stored_dtype, gradient, bonus)
    return ChunkLosses(found.dlogits, found.scale, sums, scored.crossed, scored.entropy)
