"""The proof that a model computes what its parts compute."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from latent_grpo.errors import ModelError
from latent_grpo.model.access import body, embedding_table, positions


@torch.no_grad()
def check_compatible(model: Any) -> None:
    """Raise ModelError unless the model's logits are `body(E[ids]) @ W.T`, as a latent step computes them.

    The check fails for models that scale embeddings outside the table, bias the head, or scale or cap the logits.
    """
    head = model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None:
        raise ModelError(f"{type(model).__name__} has no LM-head weight; latent reasoning needs a causal LM")
    table = embedding_table(model)
    ids = torch.arange(min(4, len(table)), device=table.device).unsqueeze(0)
    mask = torch.ones_like(ids)
    was_training = model.training
    model.eval()
    expected = model(input_ids=ids, attention_mask=mask).logits.float()
    actual = F.linear(body(model, table[ids], mask, positions(mask)), head.weight).float()
    model.train(was_training)
    # The tolerance allows for rounding in 16 bits. A scale, a bias or a cap changes the logits by more.
    if not torch.allclose(actual, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max())):
        raise ModelError(
            f"{type(model).__name__} does more than `body(E[ids]) @ W.T` (scaled embeddings, a biased head, scaled or "
            "capped logits); latent steps are not defined for it here, use a Llama- or Qwen-like model"
        )
