"""The policy loss of a chunk of logits, by the functions of one implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from latent_kernels._eager import latent_logprob as eager
from latent_kernels._loss_types import LogprobSpec, LossSpec, RowForward, RowGradient, RowScores, StepLosses
from latent_kernels.reference.loss import used_components


class RowKernels(NamedTuple):
    """The functions of one implementation that work on a chunk of logits."""

    logprob_rows_: Callable[..., RowScores]
    forward_rows: Callable[..., RowForward]
    backward_rows_: Callable[..., RowGradient]
    step_losses: Callable[..., StepLosses]
    streams: bool = False  # whether `streamed_logprob` takes their place where it can


def row_kernels(implementation: str, device: torch.device) -> RowKernels:
    """Return the functions of "triton" or "eager" on a device."""
    if implementation == "triton":
        from latent_kernels._triton import latent_logprob as triton
        from latent_kernels._triton.policy_loss import step_losses

        return RowKernels(triton.logprob_rows_, triton.forward_rows, triton.backward_rows_, step_losses)
    functions = (eager.logprob_rows_, eager.forward_rows, eager.backward_rows_, eager.step_losses)
    return RowKernels(*functions, streams=device.type == "cpu")


class ChunkLosses(NamedTuple):
    """The loss of a chunk of n rows. `dlogits` was written over their product with the head."""

    dlogits: Tensor | None  # [n, V]; times `factor` it is the gradient of the weighted loss
    factor: Tensor | None  # [n]; None stands for 1
    sums: Tensor  # [6] in the order of SUMS
    crossed: Tensor  # [n]
    entropy: Tensor | None  # [n], 0 on latent rows
    dhidden: Tensor | None = None  # [n, D], in place of dlogits; `factor` is multiplied in already


def chunk_losses_(
    product: Tensor,
    logprob_spec: LogprobSpec,
    loss_spec: LossSpec,
    stored_dtype: torch.dtype | None,
    kernels: RowKernels,
) -> ChunkLosses:
    """Return the weighted loss of a product with the head [n, V].

    The product is overwritten with the gradient in it, unless `stored_dtype` is None. Without an entropy bonus and
    ratios of components, that is the gradient of the log-prob times one number per row. So one pass over the product
    is enough: it stores the gradient of the log-prob, before the loss is known.
    """
    wants_gradient = stored_dtype is not None
    if loss_spec.bonus is None and not logprob_spec.components:
        scores = kernels.logprob_rows_(product, logprob_spec, stored_dtype)
        gradient, sums = kernels.step_losses(scores.logprob, loss_spec, wants_gradient=wants_gradient)
        found = scores.gradient
        if found is None:
            return ChunkLosses(None, None, sums, scores.crossed, None)
        return ChunkLosses(found.dlogits, found.times(gradient), sums, scores.crossed, None)
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
