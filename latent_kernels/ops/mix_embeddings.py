"""Replay of a trajectory's input embeddings (Eq. 1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latent_kernels._dispatch import on_input_device, resolve
from latent_kernels._operator import operator, single
from latent_kernels._validate import check_components, check_row_range, check_tensor
from latent_kernels.reference.latent_step import mix_embeddings_ref


def _shapes(ids: Tensor, embedding: Tensor, **_: Any) -> list[Tensor]:
    return [embedding.new_empty(ids.shape[0], embedding.shape[1])]


@operator(differentiable=("scores", "embedding"), shapes=_shapes, result=single)
@on_input_device
def mix_embeddings(
    ids: Tensor,  # [N, K] int64
    scores: Tensor,  # [N, K]
    embedding: Tensor,  # [V, D]
    *,
    tau: float | Tensor = 1.0,
    impl: str = "auto",
) -> Tensor:
    """Return the mixtures `sum_k softmax(scores / tau)_k embedding[id_k]` [N, D] (Eq. 1).

    They are in the dtype of `embedding`, summed in float32. A row with -100 in `ids[:, 1:]` is a text step: its result
    is exactly `embedding[ids[:, 0]]`, whatever its scores are. A row with another id outside the table is NaN, without
    a gradient. tau is a float or [N]; at inf, all components weigh alike except those whose score is -inf.
    Differentiable in `scores` and `embedding`.
    Raises ValueError or TypeError naming the argument, and RuntimeError if `impl="triton"` cannot run.
    """
    check_tensor("ids", ids, [None, None], (torch.int64,))
    check_tensor("embedding", embedding, [None, None], like=ids)
    check_components(ids, scores, len(ids), embedding)
    check_row_range("tau", tau, len(ids), embedding, 0.0, open_low=True)
    if resolve("mix_embeddings", impl, embedding) == "triton":
        from latent_kernels._triton.mix_embeddings import mix_embeddings_triton

        return mix_embeddings_triton(ids, scores, embedding, tau)
    return mix_embeddings_ref(ids, scores, embedding, tau=tau)
