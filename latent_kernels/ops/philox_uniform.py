"""One uniform draw per row, for text sampling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latent_kernels._dispatch import on_input_device
from latent_kernels._noise import uniform_draws
from latent_kernels._operator import operator, single
from latent_kernels._validate import INTEGERS, check_counter, check_tensor


def _shapes(row_ids: Tensor, **_: Any) -> list[Tensor]:
    return [row_ids.new_empty(row_ids.shape, dtype=torch.float64)]


@operator(differentiable=(), shapes=_shapes, result=single)
@on_input_device
def philox_uniform(row_ids: Tensor, *, seed: int | Tensor, step: int | Tensor) -> Tensor:
    """Return one uniform draw in (0, 1) per row, [B] float64, from which text sampling picks the row's token.

    The draw is the word of (seed, step, row, id 0). Latent steps use the same word, but a row is either latent or text
    at a step, so no draw is used twice. row_ids is [B] int64. seed and step are an int or a 0-d int64 tensor; step may
    also be [B].
    Raises ValueError or TypeError naming the argument.
    """
    check_tensor("row_ids", row_ids, [None], INTEGERS)
    check_counter("seed", seed, row_ids)
    check_counter("step", step, row_ids, len(row_ids))
    return uniform_draws(1, row_ids, seed, step).squeeze(-1)
