"""Group-relative advantages in PyTorch operations that never wait for the device (Eq. 9-11, 18-21)."""

from __future__ import annotations

import torch
from torch import Tensor

from latent_kernels._types import GroupAdvantages
from latent_kernels.reference.loss import STD_EPSILON


def group_advantages_eager(
    rewards: Tensor,
    group_ids: Tensor,
    invalid_mask: Tensor | None,
    invalid: str,
    normalize_std: bool,
    mean_logprob: Tensor | None,
    first_token: str,
    winner_from: str,
) -> GroupAdvantages:
    """Compute `latent_kernels.group_advantages` on checked arguments."""
    rewards = rewards.double()
    segment = _segments(group_ids)
    is_invalid = torch.zeros_like(segment, dtype=torch.bool) if invalid_mask is None else invalid_mask.bool()
    counted = ~is_invalid if invalid == "exclude" else torch.ones_like(is_invalid)
    count = _segment_sum(counted.to(rewards.dtype), segment)
    # Rewards are measured from the highest of their group, so that equal ones are exactly 0 from their mean. Rewards
    # that do not count may hold anything, so they are replaced rather than multiplied by 0.
    highest = torch.full_like(rewards, -torch.inf)
    highest = highest.scatter_reduce_(0, segment, torch.where(counted, rewards, -torch.inf), "amax")[segment]
    distance = rewards - torch.where(count > 0, highest, 0.0)
    shift = _segment_sum(torch.where(counted, distance, 0.0), segment) / count.clamp_min(1.0)
    squares = torch.where(counted, (distance - shift).square(), 0.0)
    spread = _segment_sum(squares, segment) / (count - 1.0).clamp_min(1.0)
    mean = torch.where(count > 1, highest + shift, 0.0)
    std = torch.where(count > 1, spread.sqrt(), 1.0)
    centred = torch.where(count > 1, distance - shift, rewards)
    advantages = centred / (std + STD_EPSILON) if normalize_std else centred
    can_win = advantages > 0
    if invalid != "keep":
        advantages = advantages.masked_fill(is_invalid, 0.0)
        can_win &= ~is_invalid | (winner_from == "all" and invalid == "zero")
    first = advantages
    if first_token != "all":
        assert mean_logprob is not None
        first = _first_step(advantages, can_win, mean_logprob, segment, first_token)
    return GroupAdvantages(advantages.float(), first.float(), mean.float(), std.float())


def _segments(group_ids: Tensor) -> Tensor:
    """Return the number of each row's group [R], from 0. The host does not learn how many groups there are."""
    ordered, order = group_ids.sort(stable=True)
    starts = torch.zeros_like(ordered)
    starts[1:] = (ordered[1:] != ordered[:-1]).to(starts.dtype)
    return torch.empty_like(starts).scatter_(0, order, starts.cumsum(0))


def _segment_sum(values: Tensor, segment: Tensor) -> Tensor:
    """Return the sum over each row's group, for every row [R]."""
    return torch.zeros_like(values).index_add_(0, segment, values)[segment]


def _first_step(advantages: Tensor, can_win: Tensor, mean_logprob: Tensor, segment: Tensor, first_token: str) -> Tensor:
    """Return the advantages at the first response step [R]: the winner keeps its own, its rivals get 0."""
    # The mean of a response without steps may be NaN.
    key = torch.where(can_win & ~mean_logprob.isnan(), mean_logprob.to(advantages.dtype), -torch.inf)
    # Rank all rows by log-prob, ties to the first row. A group's winner is its row of `can_win` with the lowest
    # rank.
    rows = torch.arange(len(key), device=key.device)
    rank = torch.empty_like(rows).scatter_(0, key.argsort(descending=True, stable=True), rows)
    rank = torch.where(can_win, rank, len(key))
    best = torch.full_like(rank, len(key)).scatter_reduce_(0, segment, rank, "amin")[segment]
    has_winner = best < len(key)
    rivals = advantages > 0 if first_token == "best_of_correct" else has_winner
    return advantages.masked_fill(rivals & (rank != best), 0.0)
