"""The sorted rule of text sampling, in float64."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def text_token(logits: Tensor, temperature: float, top_k: int, top_p: float, draw: float) -> int:
    """Return the token that a draw picks from logits [V]: temperature, then top-k, then top-p, ties to the lower id.

    Options are numbers of float32, as a kernel takes them.
    """
    row = logits.double().numpy()
    if temperature == 0:
        return int(row.argmax())
    temperature, top_p = (float(np.float32(value)) for value in (temperature, top_p))
    weights = np.exp((row - row.max()) / temperature)
    order = np.arange(len(row))
    if 0 < top_k < len(row) or top_p < 1:
        order = np.lexsort((order, -row))[: top_k or len(row)]
        sorted_weights = weights[order]
        before = np.cumsum(sorted_weights) - sorted_weights
        order = order[before < top_p * sorted_weights.sum()] if top_p < 1 else order
    ends = np.cumsum(weights[order])
    return int(order[min((ends <= draw * ends[-1]).sum(), (ends < ends[-1]).sum())])
