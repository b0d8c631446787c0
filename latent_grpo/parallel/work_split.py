"""Who computes what: how prompts, responses and micro-batches are divided among the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from latent_grpo.rollout.trajectory import Rollout


def rows_of_groups(groups: Tensor, width: int) -> Tensor:
    """Return the rows [n * width] of groups [n] int64; group g holds the `width` rows that start at row g * width."""
    return (groups.unsqueeze(-1) * width + torch.arange(width, device=groups.device)).flatten()


def snake_draft(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Return the indices of the items that each rank takes. Ranks get equal counts (+-1) and similar total length.

    Snake draft: sort by length, longest first, then deal left to right, then right to left, and so on. The indices of
    each rank are in ascending order.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for dealt, index in enumerate(longest_first):
        turn, place = divmod(dealt, ranks)
        # The rank that was dealt last in one turn is dealt first in the next, which evens out the lengths.
        rank = place if turn % 2 == 0 else ranks - 1 - place
        shares[rank].append(index)
    return [sorted(share) for share in shares]


def share_of_rank(rollout: Rollout, rows: Tensor, rank: int, ranks: int) -> Tensor:
    """Return the part of `rows` [n] int64 that a rank replays. Every rank replays about as many tokens.

    Responses to one prompt stay on one rank, because a replay computes a prompt once. Only the cut between two ranks
    may divide them. A rank may get no row if there are few.
    """
    if ranks == 1:
        return rows
    prompts = rollout.prompt_index[rows]
    order = prompts.argsort(stable=True)  # puts the responses to one prompt side by side
    # A response counts its own tokens and an equal part of the tokens of its prompt.
    tokens = rollout.lengths[rows] + rollout.prompt_mask.sum(-1)[prompts] / prompts.bincount()[prompts]
    tokens = tokens[order].double()
    # Each rank owns an equal interval of the total. A response goes to the rank whose interval holds its middle token.
    middle = tokens.cumsum(0) - tokens / 2
    owner = (middle / tokens.sum() * ranks).long().clamp_max(ranks - 1)
    return rows[order[owner == rank]]


def pad_to_count(batches: list[Any], filler: Any, count: int) -> list[tuple[Any, bool]]:
    """Return `count` pairs (batch, whether it is one of `batches`); `filler` takes the places that are left.

    Every rank needs as many micro-batches as the others: the collectives of a sharded model run in each forward and
    backward pass, so a rank with fewer passes would leave the others waiting. The caller gives a filler no weight.
    """
    return [(batch, True) for batch in batches] + [(filler, False)] * (count - len(batches))
