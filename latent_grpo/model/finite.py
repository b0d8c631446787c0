"""Whether tensors hold only finite numbers: weights that are read, and what is about to be saved."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from latent_grpo.errors import ModelError


@torch.no_grad()
def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor, or this rank's part of one, holds no NaN and no infinity. Integers hold none."""
    local: Any = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    if not local.is_floating_point() or local.is_meta or local.numel() == 0:
        return True
    # The extremes are NaN if any element is, and need no second tensor of this size.
    return all(math.isfinite(float(value)) for value in torch.aminmax(local))


def first_not_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor that is not finite, or None."""
    return next((name for name, tensor in named if not is_finite(tensor)), None)


def check_finite(model: Any) -> None:
    """Raise ModelError that names the first weight of a model with a NaN or an infinity."""
    if (name := first_not_finite(model.named_parameters())) is not None:
        source = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
        raise ModelError(
            f"the weight {name!r} of {source!r} is not finite; give a model whose training did not diverge"
        )
