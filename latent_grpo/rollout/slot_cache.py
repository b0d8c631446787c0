"""The key-value cache of a rollout. Each row has a slot and writes at its own length.

The rows of a batch may have different prompts and ages, so the slot of a finished row can be given to another row at
any step. The keys and values of a prompt are computed once and copied to the slots of its responses. The additive masks
of the slots are kept between steps, because a step uncovers only one token per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, DynamicLayer

from latent_grpo.architecture import SLIDING, attention_kinds
from latent_grpo.errors import ModelError
from latent_grpo.model import body, embedding_table

ALIGNMENT = 8  # elements; attention loads the rows of a mask fast if they start at multiples of this


class Window:
    """The part of the cache that a step works on. All layers share one window."""

    slots: Tensor | slice  # [B] 0, 1, ...
    cache_position: Tensor | int  # [B] where each slot writes, or one position for all
    count: int  # slots of the batch, B
    span: int  # tokens that every slot reads


class SlotLayer(DynamicLayer):
    """Keys and values [slots, heads, capacity, head size] of one layer, in the type and shape of given ones."""

    def __init__(self, window: Window, keys: Tensor, values: Tensor, slots: int, capacity: int) -> None:
        super().__init__()
        self.window, self.dtype, self.device, self.is_initialized = window, keys.dtype, keys.device, True
        # Zeros, because a masked value is still multiplied by its weight of 0, and 0 * NaN is NaN.
        self.keys, self.values = (x.new_zeros(slots, x.shape[1], capacity, x.shape[3]) for x in (keys, values))

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write one token per row [B, heads, 1, head size], and return the window's [B, heads, span, head size]."""
        window = self.window
        self.keys[window.slots, :, window.cache_position] = key_states[:, :, 0]
        self.values[window.slots, :, window.cache_position] = value_states[:, :, 0]
        return self.keys[: window.count, :, : window.span], self.values[: window.count, :, : window.span]

    def get_seq_length(self) -> int:
        """Return 1: there is a past. Rows differ in its length, and models may ask only whether there is one."""
        return 1


class SlotCache:
    """The caches of all layers and their masks. The caches are made when the first prompts are filled in."""

    def __init__(self, config: Any, slots: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self.slots, self.capacity, self.window = slots, capacity, Window()
        self.sliding_window = int(getattr(config, "sliding_window", None) or 0)
        self.layers: list[SlotLayer] = []
        self.cache: Cache | None = None
        # Spare columns behind the last token take writes of `view` that are meant for no token. One would do, but with
        # ALIGNMENT of them every row of the mask stays aligned.
        empty = torch.full((slots, capacity + ALIGNMENT), -torch.inf, dtype=dtype, device=device)
        empty[:, 0] = 0.0  # a batch may contain a slot that was never filled, and a softmax over nothing is NaN
        self.masks = {kind: empty.clone() for kind in attention_kinds(config)}

    def fill(self, prompts: DynamicCache, mask: Tensor, index: Tensor, first: int) -> None:
        """Copy row index[i] of a prompt cache, and of its mask [P, Lp], to the slot first + i."""
        if self.cache is None:
            self.layers = [
                SlotLayer(self.window, layer.keys, layer.values, self.slots, self.capacity) for layer in prompts.layers
            ]
            self.cache = Cache(layers=list(self.layers))
        slots, width = slice(first, first + len(index)), mask.shape[1]
        for layer, prompt_layer in zip(self.layers, prompts.layers, strict=True):
            layer.keys[slots, :, :width] = prompt_layer.keys[index]
            layer.values[slots, :, :width] = prompt_layer.values[index]
        for kind, slot_mask in self.masks.items():
            visible = mask.bool()[index]
            if kind == SLIDING:
                visible[:, : max(0, width - self.sliding_window)] = False
            slot_mask[slots] = -torch.inf  # also what the slot's last row uncovered
            slot_mask[slots, :width].masked_fill_(visible, 0.0)

    def move(self, target: Tensor, source: Tensor, span: int) -> None:
        """Copy the first `span` tokens of the slots `source` to the slots `target`."""
        for layer in self.layers:
            for states in (layer.keys, layer.values):
                states[target, :, :span] = states[source, :, :span]
        for mask in self.masks.values():
            mask[target] = mask[source]

    def view(self, count: int, cache_position: Tensor | int, span: int) -> tuple[Any, Cache]:
        """Return the mask and the cache for a step of the first `count` slots.

        Each slot writes one token at `cache_position` [count], or all at one position, and reads the first `span`. The
        mask is [count, 1, 1, span], or a mapping from the kind of layer to such a mask if the layers differ in kind.
        """
        assert self.cache is not None
        window = self.window
        window.cache_position, window.count, window.span = cache_position, count, span
        if isinstance(cache_position, int):
            window.slots = slice(0, count)
        else:
            window.slots = torch.arange(count, device=cache_position.device)
        for kind, mask in self.masks.items():
            set_column(mask[:count], cache_position, 0.0)
            if kind == SLIDING:
                # Hide the token that has just left the window. While there is none, write to a spare column instead.
                left = cache_position - self.sliding_window
                left = torch.where(left < 0, self.capacity, left) if isinstance(left, Tensor) else max(left, -1)
                set_column(mask[:count], left, -torch.inf)
        views = {kind: mask[:count, None, None, :span] for kind, mask in self.masks.items()}
        return views if len(views) > 1 else next(iter(views.values())), self.cache


def set_column(values: Tensor, column: Tensor | int, value: float) -> None:
    """Set one column of every row of `values` [B, C]. `column` is [B], or one for all rows."""
    if isinstance(column, int):
        values[:, column] = value
    else:
        values.scatter_(1, column.unsqueeze(-1), value)


@torch.no_grad()
def token_bytes(model: Any) -> int:
    """Return the bytes of a token's keys and values in all layers, as the model itself makes them.

    Configurations name the numbers and sizes of heads in many ways, and keys and values may differ in size.
    """
    cache, table = DynamicCache(), embedding_table(model)
    first = torch.zeros(1, 1, dtype=torch.int64, device=table.device)
    body(model, table[:1].unsqueeze(0), torch.ones_like(first), first, cache)
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))


def check_memory(model: Any, lengths: Sequence[int], args: Any) -> None:
    """Raise ModelError if the longest prompt with its response does not fit `args.rollout_memory`.

    lengths: tokens of the prompt of each row. Prompts over `args.max_prompt_length` are not sampled.
    """
    if args.rollout_memory is not None:
        longest = max((n for n in lengths if n <= (args.max_prompt_length or n)), default=0)
        rows_within(args.rollout_memory, model, longest + args.max_completion_length)


def rows_within(memory: float, model: Any, tokens: int) -> int:
    """Return how many rows of `tokens` tokens have a cache, keys and values, of at most `memory` GiB.

    Raises:
        ModelError: not even one row fits.
    """
    row_bytes = token_bytes(model) * tokens
    rows = int(memory * 2**30 // row_bytes)
    if rows < 1:
        raise ModelError(
            f"a response of {tokens} tokens takes {row_bytes / 2**30:.2g} GiB of cache, but rollout_memory is "
            f"{memory:g} GiB; raise rollout_memory or shorten the responses"
        )
    return rows
