"""The LM head of a model: the weight, and what the model does with the product before it calls it logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Head:
    """What the logits of a model are, given its last hidden states.

    `z = logit_scale * (hidden @ weight.T + bias / hidden_scale)`, and with a soft cap `softcap * tanh(z / softcap)`.
    The temperature of sampling divides the result.
    """

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    logit_scale: float = 1.0
    softcap: float | None = None
    hidden_scale: float = 1.0  # part of logit_scale that the model applies before it adds the bias

    @property
    def added(self) -> Tensor | None:
        """The bias that is added before the scale [V]. It is computed anew, so it follows a bias that is trained."""
        return self.bias if self.bias is None or self.hidden_scale == 1.0 else self.bias / self.hidden_scale

    def options(self) -> dict[str, Any]:
        """Return what the operators need beside the weight, as their keywords."""
        return {"bias": self.added, "logit_scale": self.logit_scale, "softcap": self.softcap}

    def finish(self, product: Tensor) -> Tensor:
        """Return the logits float32 of the products `hidden @ weight.T` [..., V]. Differentiable."""
        z, bias = product.float(), self.added
        if bias is not None:
            z = z + bias.float()
        if self.logit_scale != 1.0:
            z = z * self.logit_scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def trained_logits(self, hidden: Tensor) -> Tensor:
        """Return the logits float32 [N, V] of hidden [N, D], with a product in the dtype of both. Differentiable."""
        return self.finish(F.linear(hidden, self.weight))


def head_logits(hidden: Tensor, head: Head) -> Tensor:
    """Return the logits of hidden [B, D] in float32 [B, V], without gradients in 16 bits."""
    # `F.linear` would round the product to 16 bits before the cast. On a GPU it can return its float32 sums.
    if hidden.is_cuda and hidden.dtype in HALF and hidden.dtype == head.weight.dtype:
        return head.finish(torch.mm(hidden, head.weight.T, out_dtype=torch.float32))
    return head.trained_logits(hidden)
