"""Micro-batches: which responses are replayed together in one forward and backward pass.

Padding costs as much time and memory as tokens do, so responses of similar length are replayed together. So are the
responses to one prompt, because a micro-batch computes each of its prompts once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from latent_grpo.rollout.trajectory import Rollout


class _Row(NamedTuple):
    """What decides the cost of a row in a micro-batch."""

    length: int  # steps of the response
    prompt: int  # index of the prompt
    prompt_length: int  # tokens of the prompt


def micro_batches(rollout: Rollout, rows: Tensor, size: int, tokens: int | None = None) -> list[Tensor]:
    """Divide `rows` [n] int64 into micro-batches, each of at most `size` rows or, if given, of at most `tokens` tokens.

    Tokens include padding: a micro-batch has (distinct prompts x longest prompt) + (responses x longest response)
    tokens. A response that exceeds `tokens` is a micro-batch of its own. No rows give no micro-batch.

    If one micro-batch takes all rows, they keep their order. Otherwise they are sorted by length, in the cheaper of two
    ways: by the longest response to their prompt, or each by its own length.
    """
    if not len(rows):
        return []
    if tokens is None and len(rows) <= size:
        return [rows]
    lengths, prompts = rollout.lengths[rows], rollout.prompt_index[rows]
    prompt_count = int(prompts.max()) + 1
    longest_of_prompt = lengths.new_zeros(prompt_count).scatter_reduce_(0, prompts, lengths, "amax")[prompts]
    prompt_lengths = rollout.prompt_mask.sum(-1)[prompts]
    # One transfer from the device for all rows.
    costs = [_Row(*values) for values in torch.stack([lengths, prompts, prompt_lengths], 1).tolist()]
    plans: list[tuple[int, list[list[int]]]] = []
    # The first key keeps the responses to a prompt together, so that no prompt is computed twice. The second key pads
    # less where lengths differ within the groups.
    for key in (longest_of_prompt, lengths):
        order = (key * prompt_count + prompts).argsort(stable=True).tolist()
        ordered = [costs[i] for i in order]
        cuts = _cut(ordered, size, tokens)
        total = sum(_padded_tokens(ordered[cut]) for cut in cuts)
        plans.append((total, [order[cut] for cut in cuts]))
    _, cheapest = min(plans, key=lambda plan: plan[0])
    return [rows[torch.tensor(indices, device=rows.device)] for indices in cheapest]


def _cut(ordered: list[_Row], size: int, tokens: int | None) -> list[slice]:
    """Cut rows, in their order, into the slices of micro-batches of `size` rows or of at most `tokens` tokens."""
    if tokens is None:
        return [slice(start, start + size) for start in range(0, len(ordered), size)]
    starts = [0]
    for end in range(1, len(ordered) + 1):
        if _padded_tokens(ordered[starts[-1] : end]) > tokens and end - starts[-1] > 1:
            starts.append(end - 1)  # the row that was too much begins the next micro-batch
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(ordered)], strict=True)]


def _padded_tokens(rows: list[_Row]) -> int:
    """Return the tokens of one micro-batch, padding included."""
    prompts = {row.prompt for row in rows}
    prompt_tokens = len(prompts) * max(row.prompt_length for row in rows)
    return prompt_tokens + len(rows) * max(row.length for row in rows)
