"""Gradient checkpointing of decoder layers that read and extend a cache.

Transformers' own drops the cache, and works in training mode only. Here a layer's part of the cache is an input and an
output of the recomputed function, so that a prompt's cache is shared, with gradients, as without checkpointing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from latent_grpo.model import CACHE_ARGUMENTS


@contextmanager
def recomputed(model: Any, enabled: bool = True) -> Iterator[None]:
    """Within, a forward pass with gradients keeps only the inputs of every decoder layer; the backward pass computes
    the rest again. A backward pass may follow later, outside."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)] if enabled else []
    for layer in layers:
        layer.forward = _checkpointed(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _checkpointed(layer: Any) -> Callable[..., Any]:
    """The layer's forward pass through `torch.utils.checkpoint`."""
    original = layer.forward
    index = next((module.layer_idx for module in layer.modules() if hasattr(module, "layer_idx")), 0)

    def forward(*args: Any, **kwargs: Any) -> Any:
        name = next((name for name in CACHE_ARGUMENTS if kwargs.get(name) is not None), None)
        if name is None or not torch.is_grad_enabled():
            return checkpoint(original, *args, use_reentrant=False, **kwargs)
        extended = kwargs.pop(name)
        before = copy.copy(extended.layers[index])
        # The recomputed function holds on to this layer's past alone, not to what later passes append for all.
        empty = copy.copy(extended)
        empty.layers = [None] * len(extended.layers)

        def run(*args: Any) -> tuple[Any, Any]:
            cache = copy.copy(empty)
            cache.layers = [*empty.layers]
            cache.layers[index] = copy.copy(before)
            return original(*args, **{name: cache}, **kwargs), cache.layers[index]

        out, extended.layers[index] = checkpoint(run, *args, use_reentrant=False)
        return out

    return forward
