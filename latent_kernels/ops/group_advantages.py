"""Group-relative advantages with masking of invalid samples and first-token selection (Eq. 9-11, 18-21)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latent_kernels._dispatch import on_input_device, resolve
from latent_kernels._eager.group_advantages import group_advantages_eager
from latent_kernels._operator import operator
from latent_kernels._types import GroupAdvantages
from latent_kernels._validate import INTEGERS, check_choice, check_flag, check_tensor

INVALID_MODES = ("exclude", "zero", "keep")
FIRST_TOKEN_MODES = ("best_of_correct", "best_of_group", "all")
WINNERS = ("valid", "all")


def _shapes(rewards: Tensor, **_: Any) -> list[Tensor]:
    return [rewards.new_empty(rewards.shape, dtype=torch.float32) for _ in GroupAdvantages._fields]


def _result(outputs: list[Tensor]) -> GroupAdvantages:
    return GroupAdvantages(*outputs)


@operator(differentiable=(), shapes=_shapes, result=_result)
@on_input_device
def group_advantages(
    rewards: Tensor,  # [R]
    group_ids: Tensor,  # [R] int64, any values, any order
    *,
    invalid_mask: Tensor | None = None,  # [R] bool, True where the response hit the length limit
    invalid: str = "exclude",
    normalize_std: bool = True,
    mean_logprob: Tensor | None = None,  # [R]
    first_token: str = "best_of_correct",
    winner_from: str = "valid",
    impl: str = "auto",
) -> GroupAdvantages:
    """Compute the advantages (R - group mean) / (group std + 1e-6) of R responses (Eq. 9-11, 18-21).

    Args:
        invalid: what invalid rows do: "exclude" (not in mean and std, advantage 0), "zero" (in mean and std,
            advantage 0) or "keep" (treated like valid rows).
        normalize_std: False leaves out the division (Dr. GRPO).
        mean_logprob: [R], mean old log-prob over the response. It picks the winner among a group's rows with a positive
            advantage (ties to the first row). Required unless `first_token="all"`.
        first_token: whose advantage is set to 0 at the first response step: "best_of_correct" (every positive row
            except the winner), "best_of_group" (every row except the winner, if there is one) or "all" (no row's).
        winner_from: the rows that can win under `invalid="zero"`: "valid" ones, or "all". The released code picks the
            winner before it sets the advantage of invalid rows to 0 ("all"). If an invalid row wins there, no row keeps
            a positive advantage at the first step. Rows that "exclude" leaves out never win.

    The standard deviation has Bessel's correction. A group with one counted row has mean 0 and std 1. Sums
    are in float64, the result in float32; the kernel divides in float32.
    Raises ValueError or TypeError naming the argument, and RuntimeError if `impl="triton"` cannot run.
    """
    check_tensor("rewards", rewards, [None])
    check_tensor("group_ids", group_ids, list(rewards.shape), INTEGERS, like=rewards)
    check_choice("invalid", invalid, INVALID_MODES)
    check_flag("normalize_std", normalize_std)
    check_choice("first_token", first_token, FIRST_TOKEN_MODES)
    check_choice("winner_from", winner_from, WINNERS)
    if invalid_mask is not None:
        check_tensor("invalid_mask", invalid_mask, list(rewards.shape), None, like=rewards)
    if mean_logprob is not None:
        check_tensor("mean_logprob", mean_logprob, list(rewards.shape), like=rewards)
    elif first_token != "all":
        raise ValueError(f"first_token={first_token!r} needs mean_logprob; give it or use first_token='all'")
    if resolve("group_advantages", impl, rewards) == "triton":
        from latent_kernels._triton.group_advantages import group_advantages_triton

        return group_advantages_triton(
            rewards, group_ids, invalid_mask, invalid, normalize_std, mean_logprob, first_token, winner_from
        )
    return group_advantages_eager(
        rewards, group_ids, invalid_mask, invalid, normalize_std, mean_logprob, first_token, winner_from
    )
