"""Who computes what, and when: prompts and responses over the ranks, a rank's responses over its micro-batches.

Tokens are what it goes by: ranks get as many of them, and responses of like length are computed together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from latent_grpo.rollout import Rollout


def micro_batches(rollout: Rollout, rows: Tensor, size: int, tokens: int | None = None) -> list[Tensor]:
    """Parts of `rows` [n] that are replayed together: at most `size` responses or, where given, `tokens` tokens each.

    Where one part does not take them all, the responses to a prompt stay together, since a part computes its prompts
    once, and prompts are ordered by their longest response. Tokens are counted with padding: distinct prompts times the
    longest, and responses times the longest. A response longer than `tokens` is a part of its own.
    """
    if tokens is None and len(rows) <= size:
        return [rows]
    lengths, prompts = rollout.lengths[rows], rollout.prompt_index[rows]
    longest = lengths.new_zeros(int(prompts.max()) + 1).scatter_reduce_(0, prompts, lengths, "amax")[prompts]
    order = (longest * (len(longest) + int(prompts.max()) + 1) + prompts).argsort(stable=True)
    if tokens is None:
        return list(rows[order].split(size))
    prompt_lengths = rollout.prompt_mask.sum(-1)[prompts]
    figures = torch.stack([lengths, prompts, prompt_lengths], 1)[order].tolist()
    cuts, first = [0], 0
    for end in range(1, len(figures) + 1):
        part = figures[first:end]
        padded = len({p for _, p, _ in part}) * max(w for _, _, w in part) + len(part) * max(n for n, _, _ in part)
        if padded > tokens and end - first > 1:
            first = end - 1
            cuts.append(first)
    return [rows[order[a:b]] for a, b in zip(cuts, [*cuts[1:], len(figures)], strict=True)]


def deal(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Numbers of items for each rank: as many to each (or one more), and about as much length, by dealing the longest
    first and turning round at the end of a row. Each rank's are in order."""
    hands: list[list[int]] = [[] for _ in range(ranks)]
    for i, number in enumerate(sorted(range(len(lengths)), key=lambda n: -lengths[n])):
        row, place = divmod(i, ranks)
        hands[place if row % 2 == 0 else ranks - 1 - place].append(number)
    return [sorted(hand) for hand in hands]


def share_of_rank(rollout: Rollout, rows: Tensor, rank: int, ranks: int) -> Tensor:
    """The part of `rows` [n] that a rank replays: about as many tokens for each, and responses to a prompt together but
    where a cut between two ranks falls. A rank may get none where there are few.

    A response counts its own tokens and its part of its prompt's.
    """
    if ranks == 1:
        return rows
    prompts = rollout.prompt_index[rows]
    order = prompts.argsort(stable=True)
    cost = rollout.lengths[rows] + rollout.prompt_mask.sum(-1)[prompts] / prompts.bincount()[prompts]
    cost = cost[order].double()
    middle = cost.cumsum(0) - cost / 2
    owner = (middle / cost.sum() * ranks).long().clamp_max(ranks - 1)
    return rows[order[owner == rank]]
