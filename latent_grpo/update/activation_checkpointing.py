"""Gradient checkpointing of decoder layers that read and extend a key-value cache.

The checkpointing of transformers drops the cache and works in training mode only. Here the layer's part of the cache is
an input and an output of the recomputed function. So responses share the cache of their prompt, with gradients, as they
do without checkpointing.
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
    """Within, let a forward pass keep only the inputs of each decoder layer; the backward pass computes the rest again.

    The backward pass may run after the block. Nothing changes without gradients, or if `enabled` is False.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)] if enabled else []
    for layer in layers:
        layer.forward = _checkpointed(layer)  # hides the method of the class until it is deleted
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _checkpointed(layer: Any) -> Callable[..., Any]:
    """Return the forward pass of a layer through `torch.utils.checkpoint`."""
    original = layer.forward
    index = next((module.layer_idx for module in layer.modules() if hasattr(module, "layer_idx")), 0)

    def forward(*args: Any, **kwargs: Any) -> Any:
        name = next((name for name in CACHE_ARGUMENTS if kwargs.get(name) is not None), None)
        if name is None or not torch.is_grad_enabled():
            return checkpoint(original, *args, use_reentrant=False, **kwargs)
        extended = kwargs.pop(name)
        before = copy.copy(extended.layers[index])
        # The recomputed function must keep only the past of this layer alive. `extended` itself would keep what later
        # passes append to all layers.
        empty = copy.copy(extended)
        empty.layers = [None] * len(extended.layers)

        def run(*args: Any) -> tuple[Any, Any]:
            # Fresh copies: the layer appends to its cache, and the backward pass calls `run` a second time.
            cache = copy.copy(empty)
            cache.layers = [*empty.layers]
            cache.layers[index] = copy.copy(before)
            return original(*args, **{name: cache}, **kwargs), cache.layers[index]

        out, extended.layers[index] = checkpoint(run, *args, use_reentrant=False)
        return out

    return forward
