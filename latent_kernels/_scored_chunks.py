"""How the log-probs of many hidden states are computed: one chunk of rows at a time, in one buffer.

A chunk goes through a product [n, V] in float32 and a pass over it, or straight to its log-probs and scaled
exponentials (`latent_kernels._triton.scaled_exp`), which are the gradient in the product up to one factor per row.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latent_kernels._chunks import chunk_buffer, exps_chunks, row_chunks
from latent_kernels._linear import project
from latent_kernels._loss_types import LogprobSpec, RowScores
from latent_kernels._types import HeadOptions
from latent_kernels.reference.latent_step import compute_dtype


class Chunks(NamedTuple):
    """Slices of rows, and what scores one of them at a time."""

    slices: list[slice]
    buffer: Tensor | None  # [n, >= V] for the largest slice; None if exponentials are not stored
    stored_dtype: torch.dtype | None  # of the gradient in the product; None if it is not wanted
    logprob_rows_: Callable[..., RowScores]
    scaled_exp: ModuleType | None  # scores the rows if `tile` is given
    tile: Any  # `ExpConfig` or None

    def project(self, rows: Tensor, lm_head: Tensor) -> Tensor:
        """Return the product of rows [n, D] with the head [V, D], in the buffer. There must be no tile."""
        assert self.buffer is not None
        return project(rows, lm_head, self.buffer[: len(rows)])

    def score(self, rows: Tensor, lm_head: Tensor, spec: LogprobSpec) -> RowScores:
        """Return the log-probs of rows [n, D] and, if wanted, their gradient in the product, which is in the buffer."""
        if self.tile is not None and self.scaled_exp is not None:
            scores: RowScores = self.scaled_exp.scaled_exp_rows(rows, lm_head, spec, self.tile, self.buffer)
            return scores
        return self.logprob_rows_(self.project(rows, lm_head), spec, self.stored_dtype)


def plan_chunks(
    count: int,
    hidden: Tensor,
    lm_head: Tensor,
    stored_dtype: torch.dtype | None,
    logprob_rows_: Callable[..., RowScores],
    scaled_exp: ModuleType | None,
    head: HeadOptions,
    *,
    trained_head: bool = False,
) -> Chunks:
    """Cut `count` rows of hidden [N, D] into chunks for a head [V, D], and allocate their buffer.

    `scaled_exp` is None if its log-probs do not serve the caller. With `trained_head` the chunks may be larger.
    """
    vocab, device, dtype = len(lm_head), hidden.device, compute_dtype(hidden, lm_head)
    tile = None if scaled_exp is None else scaled_exp.choose(hidden, lm_head, head)
    if scaled_exp is None or tile is None:
        slices = row_chunks(count, vocab, dtype, device)
        return Chunks(slices, chunk_buffer(slices, vocab, dtype, device), stored_dtype, logprob_rows_, None, None)
    row_bytes = vocab * lm_head.dtype.itemsize
    slices = exps_chunks(count, row_bytes, hidden.shape[1], device, trained_head=trained_head)
    rows = max((chunk.stop - chunk.start for chunk in slices), default=0)
    buffer = None if stored_dtype is None else scaled_exp.exps_buffer(rows, lm_head, tile)
    return Chunks(slices, buffer, stored_dtype, logprob_rows_, scaled_exp, tile)
