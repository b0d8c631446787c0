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
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer


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
        # Layers take their cache under several names, some at a position.
        given = dict(enumerate(args)) | kwargs
        place = next((key for key, value in given.items() if isinstance(value, Cache)), None)
        if place is None or not torch.is_grad_enabled():
            return checkpoint(original, *args, use_reentrant=False, **kwargs)
        extended = given[place]
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
            filled = dict(enumerate(args)) | kwargs | {place: cache}
            named = {key: value for key, value in filled.items() if isinstance(key, str)}
            return original(*(filled[key] for key in range(len(args))), **named), cache.layers[index]

        kwargs = {key: value for key, value in kwargs.items() if key != place}
        args = tuple(None if key == place else value for key, value in enumerate(args))
        out, extended.layers[index] = checkpoint(run, *args, use_reentrant=False)
        return out

    return forward
