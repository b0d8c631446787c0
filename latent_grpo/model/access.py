"""What a Hugging Face causal LM computes, in parts: its embedding table, its body and its LM head."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

CACHE_ARGUMENTS = ("cache", "past_key_values")  # of a forward pass, the newer name first


def embedding_table(model: Any) -> Tensor:
    """Return the input embedding weight E [V, D]."""
    weight: Tensor = model.get_input_embeddings().weight
    return weight


def freeze_table(model: Any) -> None:
    """Freeze the embedding table, and an LM head that is tied to it, with the bias of that head."""
    embedding_table(model).requires_grad_(False)
    if lm_head(model) is embedding_table(model):
        freeze_head(model)


def freeze_head(model: Any) -> None:
    """Freeze the weight and the bias of the LM head."""
    model.get_output_embeddings().requires_grad_(False)


def lm_head(model: Any) -> Tensor:
    """Return the LM-head weight W [V, D]."""
    weight: Tensor = model.get_output_embeddings().weight
    return weight


def backbone(model: Any) -> Any:
    """Return the module between embeddings and LM head: the `base_model`, or the model itself if it has none."""
    base = model.base_model
    if base is not model:
        return base
    # Some classes name their body otherwise than transformers looks for it (Llama 4).
    parts = [part for part in model.children() if isinstance(part, PreTrainedModel)]
    return parts[0] if len(parts) == 1 else model


def body(model: Any, embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Any = None) -> Tensor:
    """Return the last hidden states [B, L, D], after the final norm, of input embeddings [B, L, D].

    Args:
        model: a causal LM. Its body is its `backbone`.
        embeds: [B, L, D], of the L tokens behind the cached ones.
        attention_mask: [B, past + L], or whatever mask the body accepts in its place.
        position_ids: [B, L].
        cache: a key-value cache, which is extended in place; None computes without one.
    """
    base = backbone(model)
    out = base(
        inputs_embeds=embeds,
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=cache is not None,
        **{cache_argument(type(base)): cache},  # type: ignore[arg-type]
    )
    hidden: Tensor = out.last_hidden_state
    return hidden


@functools.cache
def cache_argument(kind: Any) -> str:
    """Return the name under which the forward pass of a class of models takes its key-value cache.

    Transformers 5.24 renamed `past_key_values` to `cache`; models with code of their own may keep the old name.
    """
    parameters = inspect.signature(kind.forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in parameters), CACHE_ARGUMENTS[-1])


def positions(attention_mask: Tensor) -> Tensor:
    """Return the position of every token [B, L] of a left-padded batch; padding has position 0."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
