"""Group-relative advantages with invalid-sample masking and first-token selection (SPEC 5; Eq. 9-11, 18-21)."""

from __future__ import annotations

import torch
from torch import Tensor

from latent_kernels._backend import on_its_device, resolve
from latent_kernels._types import GroupAdvantages
from latent_kernels._validate import INTEGERS, check_choice, check_tensor
from latent_kernels.reference import STD_EPSILON

INVALID_MODES = ("exclude", "zero", "keep")
FIRST_TOKEN_MODES = ("best_of_correct", "best_of_group", "all")


@on_its_device
def group_advantages(
    rewards: Tensor,  # [R]
    group_ids: Tensor,  # [R] int64, any values, any order
    *,
    invalid_mask: Tensor | None = None,  # [R] bool, True where the response hit the length limit
    invalid: str = "exclude",
    normalize_std: bool = True,
    mean_logprob: Tensor | None = None,  # [R]
    first_token: str = "best_of_correct",
    impl: str = "auto",
) -> GroupAdvantages:
    """Advantages of R responses, (R - group mean) / (group std + 1e-6), std with Bessel's correction (Eq. 9-11, 18-21).

    Args:
        invalid: "exclude" (invalid rows out of mean and std, advantage 0), "zero" (in mean and std, advantage 0) or
            "keep" (no masking).
        normalize_std: False leaves the division out (Dr. GRPO).
        mean_logprob: [R], mean old log-prob over the response; it picks the winner among a group's rows with a positive
            advantage (ties to the first row). Required unless `first_token="all"`.
        first_token: whose advantage is 0 at the first response step: "best_of_correct" (every positive row but the
            winner), "best_of_group" (every row but the winner, where there is one), "all" (nobody's).

    A group with one counted row has mean 0 and std 1. Computed in float64, returned in float32.
    Raises ValueError or TypeError naming the argument; RuntimeError where `impl="triton"` cannot run.
    """
    check_tensor("rewards", rewards, [None])
    check_tensor("group_ids", group_ids, list(rewards.shape), INTEGERS, like=rewards)
    check_choice("invalid", invalid, INVALID_MODES)
    check_choice("first_token", first_token, FIRST_TOKEN_MODES)
    if invalid_mask is not None:
        check_tensor("invalid_mask", invalid_mask, list(rewards.shape), None, like=rewards)
    if mean_logprob is not None:
        check_tensor("mean_logprob", mean_logprob, list(rewards.shape), like=rewards)
    elif first_token != "all":
        raise ValueError(f"first_token={first_token!r} needs mean_logprob; give it or use first_token='all'")
    if resolve("group_advantages", impl, rewards) == "triton":
        from latent_kernels._triton.group_advantages import group_advantages as triton_group_advantages

        return triton_group_advantages(
            rewards, group_ids, invalid_mask, invalid, normalize_std, mean_logprob, first_token
        )

    rewards = rewards.double()  # so that a group of equal float32 rewards has exactly its own mean
    segment = _segments(group_ids)
    broken = torch.zeros_like(segment, dtype=torch.bool) if invalid_mask is None else invalid_mask.bool()
    counted = (~broken if invalid == "exclude" else torch.ones_like(broken)).to(rewards.dtype)
    count = _segment_sum(counted, segment)
    mean = _segment_sum(rewards * counted, segment) / count.clamp_min(1.0)
    spread = _segment_sum((rewards - mean).square() * counted, segment) / (count - 1.0).clamp_min(1.0)
    mean = torch.where(count > 1, mean, 0.0)
    std = torch.where(count > 1, spread.sqrt(), 1.0)
    centred = rewards - mean
    advantages = centred / (std + STD_EPSILON) if normalize_std else centred
    if invalid != "keep":
        advantages = advantages.masked_fill(broken, 0.0)
    first = advantages
    if first_token != "all":
        assert mean_logprob is not None
        first = _first_step(advantages, mean_logprob, segment, first_token)
    return GroupAdvantages(advantages.float(), first.float(), mean.float(), std.float())


def _segments(group_ids: Tensor) -> Tensor:
    """Number of each row's group [R], 0 to groups - 1, without asking the device how many there are."""
    ordered, order = group_ids.sort(stable=True)
    starts = torch.zeros_like(ordered)
    starts[1:] = (ordered[1:] != ordered[:-1]).to(starts.dtype)
    return torch.empty_like(starts).scatter_(0, order, starts.cumsum(0))


def _segment_sum(values: Tensor, segment: Tensor) -> Tensor:
    """Sum over each row's group, given back to every row [R]."""
    return torch.zeros_like(values).index_add_(0, segment, values)[segment]


def _first_step(advantages: Tensor, mean_logprob: Tensor, segment: Tensor, first_token: str) -> Tensor:
    """Advantages at the first response step [R]: the winner keeps its own, its rivals get 0."""
    correct = advantages > 0
    place = torch.where(correct, mean_logprob.to(advantages.dtype), -torch.inf)
    # Rank rows by log-prob, ties to the first row; a group's winner is its correct row of lowest rank.
    rows = torch.arange(len(place), device=place.device)
    rank = torch.empty_like(rows).scatter_(0, place.argsort(descending=True, stable=True), rows)
    rank = torch.where(correct, rank, len(place))
    best = torch.full_like(rank, len(place)).scatter_reduce_(0, segment, rank, "amin")[segment]
    has_winner = best < len(place)
    rivals = correct if first_token == "best_of_correct" else has_winner
    return advantages.masked_fill(rivals & (rank != best), 0.0)
