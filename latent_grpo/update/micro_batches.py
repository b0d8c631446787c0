"""Who computes what, and when: prompts and responses over the ranks, a rank's responses over its micro-batches.

Tokens are what it goes by: ranks get as many of them, and responses of like length are computed together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latent_grpo.rollout.trajectory import Rollout


def micro_batches(rollout: Rollout, rows: Tensor, size: int, tokens: int | None = None) -> list[Tensor]:
    """Parts of `rows` [n] that are replayed together: at most `size` responses or, where given, `tokens` tokens each.

    Tokens are counted with padding: distinct prompts times the longest, and responses times the longest. Where one part
    does not take them all, rows are ordered by length, either by that of the longest response to their prompt, since a
    part computes its prompts once, or each by its own, whichever pads less. A response longer than `tokens` is a part
    of its own.
    """
    if not len(rows):
        return []
    if tokens is None and len(rows) <= size:
        return [rows]
    lengths, prompts = rollout.lengths[rows], rollout.prompt_index[rows]
    many = int(prompts.max()) + 1
    longest = lengths.new_zeros(many).scatter_reduce_(0, prompts, lengths, "amax")[prompts]
    prompt_lengths = rollout.prompt_mask.sum(-1)[prompts]
    figures = torch.stack([lengths, prompts, prompt_lengths], 1).tolist()
    found: list[tuple[int, list[list[int]]]] = []
    for key in (longest, lengths):
        order = (key * many + prompts).argsort(stable=True).tolist()
        parts = _cut([figures[i] for i in order], size, tokens)
        cost = sum(_padded([figures[i] for i in order[part]]) for part in parts)
        found.append((cost, [order[part] for part in parts]))
    _, best = min(found, key=lambda pair: pair[0])
    return [rows[torch.tensor(part, device=rows.device)] for part in best]


def _cut(figures: list[list[int]], size: int, tokens: int | None) -> list[slice]:
    """Parts of rows in their order; figures of each: its length, its prompt, and the prompt's length."""
    if tokens is None:
        return [slice(first, first + size) for first in range(0, len(figures), size)]
    cuts = [0]
    for end in range(1, len(figures) + 1):
        if _padded(figures[cuts[-1] : end]) > tokens and end - cuts[-1] > 1:
            cuts.append(end - 1)
    return [slice(first, end) for first, end in zip(cuts, [*cuts[1:], len(figures)], strict=True)]


def _padded(figures: list[list[int]]) -> int:
    """Tokens of a part, with padding."""
    prompts = {prompt for _, prompt, _ in figures}
    return len(prompts) * max(width for *_, width in figures) + len(figures) * max(length for length, *_ in figures)


def rows_of(groups: Tensor, width: int) -> Tensor:
    """The rows [n * width] of groups [n] of `width` rows each."""
    return (groups.unsqueeze(-1) * width + torch.arange(width, device=groups.device)).flatten()
