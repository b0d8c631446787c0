"""Who computes what: prompts and responses over the ranks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from latent_grpo.rollout.trajectory import Rollout


def snake_draft(lengths: Sequence[int], ranks: int) -> list[list[int]]:
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
