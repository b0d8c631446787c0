"""The key-value cache of a rollout: one slot a row, written at the row's own length.

Rows of one batch may be of different prompts and ages, so a finished row's slot can be given to another row at any
step. Keys of a prompt are computed once and copied to the slots of its rollouts. The additive masks of the slots are
kept and not made anew: a step uncovers one token a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, DynamicLayer

from latent_grpo.model import ModelError

ALIGNMENT = 8  # elements
FULL, SLIDING = "full_attention", "sliding_attention"


def attention_kinds(config: Any) -> set[str]:
    """Kinds of attention layers of a text configuration; ModelError for one that slots cannot serve."""
    default = SLIDING if getattr(config, "sliding_window", None) and not hasattr(config, "layer_types") else FULL
    kinds = set(getattr(config, "layer_types", None) or [default])
    if unknown := sorted(kinds - {FULL, SLIDING}):
        raise ModelError(
            f"layers of kind {unknown[0]!r} keep no key-value cache a token; use a Llama- or Qwen-like model"
        )
    return kinds


class Window:
    """What a step sees of the cache: the slots of the batch, where each writes, and how far all read."""

    rows: Tensor | slice  # [B] 0, 1, ...
    place: Tensor | int  # [B], or one for all
    count: int
    span: int


class SlotLayer(DynamicLayer):
    """Keys and values [slots, heads, capacity, head size] of one layer."""

    def __init__(self, window: Window, keys: Tensor, values: Tensor, slots: int, capacity: int) -> None:
        super().__init__()
        self.window, self.dtype, self.device, self.is_initialized = window, keys.dtype, keys.device, True
        # Zeros, because a masked value still meets its weight of 0 in a product.
        self.keys, self.values = (x.new_zeros(slots, x.shape[1], capacity, x.shape[3]) for x in (keys, values))

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write one token a row [B, heads, 1, head size]; the tokens in view [B, heads, span, head size]."""
        window = self.window
        self.keys[window.rows, :, window.place] = key_states[:, :, 0]
        self.values[window.rows, :, window.place] = value_states[:, :, 0]
        return self.keys[: window.count, :, : window.span], self.values[: window.count, :, : window.span]


class SlotCache:
    """Caches and masks of all layers; the caches are made for prompts like the first that is filled in."""

    def __init__(self, config: Any, slots: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self.slots, self.capacity, self.window = slots, capacity, Window()
        self.sliding_window = int(getattr(config, "sliding_window", None) or 0)
        self.layers: list[SlotLayer] = []
        self.cache: Cache | None = None
        # The columns behind the last take writes that are meant for none; rows stay where attention loads them fast.
        empty = torch.full((slots, capacity + ALIGNMENT), -torch.inf, dtype=dtype, device=device)
        empty[:, 0] = 0.0  # a slot that was never filled may be in the batch, and a softmax over nothing is NaN
        self.masks = {kind: empty.clone() for kind in attention_kinds(config)}

    def fill(self, prompts: DynamicCache, mask: Tensor, index: Tensor, first: int) -> None:
        """Copy row index[i] of a prompt cache, and of its mask [P, Lp], to slot first + i."""
        if self.cache is None:
            self.layers = [
                SlotLayer(self.window, layer.keys, layer.values, self.slots, self.capacity) for layer in prompts.layers
            ]
            self.cache = Cache(layers=list(self.layers))
        slots, width = slice(first, first + len(index)), mask.shape[1]
        for mine, layer in zip(self.layers, prompts.layers, strict=True):
            mine.keys[slots, :, :width] = layer.keys[index]
            mine.values[slots, :, :width] = layer.values[index]
        for kind, ours in self.masks.items():
            seen = mask.bool()[index]
            if kind == SLIDING:
                seen[:, : max(0, width - self.sliding_window)] = False
            ours[slots] = -torch.inf
            ours[slots, :width].masked_fill_(seen, 0.0)

    def move(self, target: Tensor, source: Tensor, span: int) -> None:
        """Copy the first `span` tokens of the slots `source` to the slots `target`."""
        for layer in self.layers:
            for states in (layer.keys, layer.values):
                states[target, :, :span] = states[source, :, :span]
        for mask in self.masks.values():
            mask[target] = mask[source]

    def view(self, count: int, place: Tensor | int, span: int) -> tuple[Any, Cache]:
        """Mask and cache of the first `count` slots, each writing its next token at `place` ([count], or one for all)
        and reading the first `span`. The mask is [count, 1, 1, span], or a mapping where layers differ in kind."""
        assert self.cache is not None
        window = self.window
        window.place, window.count, window.span = place, count, span
        window.rows = slice(0, count) if isinstance(place, int) else torch.arange(count, device=place.device)
        for kind, mask in self.masks.items():
            set_column(mask[:count], place, 0.0)
            if kind == SLIDING:
                left = place - self.sliding_window  # behind the window; the column for nothing where none is
                left = torch.where(left < 0, self.capacity, left) if isinstance(left, Tensor) else max(left, -1)
                set_column(mask[:count], left, -torch.inf)
        views = {kind: mask[:count, None, None, :span] for kind, mask in self.masks.items()}
        return views if len(views) > 1 else next(iter(views.values())), self.cache


def set_column(values: Tensor, place: Tensor | int, value: float) -> None:
    """Sets one column of every row of `values` [B, C]: place [B], or one for all."""
    if isinstance(place, int):
        values[:, place] = value
    else:
        values.scatter_(1, place.unsqueeze(-1), value)


def rows_within(memory: float, config: Any, dtype: torch.dtype, tokens: int) -> int:
    """Rows of `tokens` tokens whose keys and values take at most `memory` GiB; ModelError where not even one fits."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    row = 2 * config.num_hidden_layers * heads * head * dtype.itemsize * tokens
    rows = int(memory * 2**30 // row)
    if rows < 1:
        raise ModelError(
            f"a response of {tokens} tokens takes {row / 2**30:.2g} GiB of cache, over {memory:g}: give more"
        )
    return rows
