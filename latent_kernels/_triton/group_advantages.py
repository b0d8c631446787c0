"""Group-relative advantages in one launch (Eq. 9-11, 18-21), whatever the number, size and order of the groups.

Inputs: rewards [R], group_ids [R] int64, an optional mask of invalid rows [R], mean log-probs [R]. Outputs, all [R]
float32: advantages, advantages at the first step, group mean and group std.

    advantage = (reward - mean) / (std + 1e-6),  std with Bessel's correction, over the counted rows of the group

A program owns BLOCK_R rows and goes over all R rows for them three times: to count and add up their groups, for the
spread around the mean, and to find the groups' winners. These are O(R^2) comparisons of values that stay in cache, some
10^8 per pass at R = 8192. In return there is no sort, no atomic and no intermediate tensor, and each row's result is
the same in every run. Sums are in float64. There is no backward pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from latent_kernels._types import GroupAdvantages
from latent_kernels.reference.loss import STD_EPSILON

BLOCK_R, BLOCK_J = 32, 32  # with 64 columns, threads spill
NUM_WARPS = 4
SELECTIONS = {"all": 0, "best_of_correct": 1, "best_of_group": 2}


@triton.jit
def members(rewards_ptr, groups_ptr, invalid_ptr, group, j, R, VALID_ONLY: tl.constexpr):
    """Return which rows j are in the group of which own row [BLOCK_R, BLOCK_J], and the rewards of the rows j."""
    other = tl.load(groups_ptr + j, mask=j < R, other=0)
    same = (group[:, None] == other[None, :]) & (j < R)[None, :]
    if VALID_ONLY:
        same = same & (tl.load(invalid_ptr + j, mask=j < R, other=1) == 0)[None, :]
    return same, tl.load(rewards_ptr + j, mask=j < R, other=0.0).to(tl.float64)


@triton.jit
def group_advantages_kernel(
    rewards_ptr, groups_ptr, invalid_ptr, logprob_ptr, advantage_ptr, first_ptr, mean_ptr, std_ptr, R, epsilon,
    HAS_INVALID: tl.constexpr, EXCLUDE: tl.constexpr, KEEP: tl.constexpr, NORMALIZE: tl.constexpr,
    VALID_WINNER: tl.constexpr,
    SELECTION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = rows < R
    group = tl.load(groups_ptr + rows, mask=inside, other=0)
    reward = tl.load(rewards_ptr + rows, mask=inside, other=0.0).to(tl.float64)

    # Rewards are measured from one that counts, so that equal ones are exactly 0 from their mean: the row's own, or the
    # highest of the group if the own may not count and be NaN.
    origin = reward
    if HAS_INVALID and EXCLUDE:
        origin = tl.full([BLOCK_R], -float("inf"), dtype=tl.float64)
        for start in range(0, R, BLOCK_J):
            j = start + tl.arange(0, BLOCK_J)
            counted, value = members(rewards_ptr, groups_ptr, invalid_ptr, group, j, R, True)
            origin = tl.maximum(origin, tl.max(tl.where(counted, value[None, :], -float("inf")), 1))
        origin = tl.where(origin == -float("inf"), 0.0, origin)

    count = tl.zeros([BLOCK_R], dtype=tl.float64)
    total = tl.zeros([BLOCK_R], dtype=tl.float64)
    for start in range(0, R, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        counted, value = members(rewards_ptr, groups_ptr, invalid_ptr, group, j, R, HAS_INVALID and EXCLUDE)
        count += tl.sum(counted.to(tl.float64), 1)
        total += tl.sum(tl.where(counted, value[None, :] - origin[:, None], 0.0), 1)
    # `total` adds distances from the origin. The sum is exact, and 0 if all rewards are equal, so quotients can
    # be in float32. (In float64 they are function calls, which save registers to memory.) A group of one has mean 0.
    total = tl.where(count > 1, total, -origin)
    divisor = tl.maximum(count, 1.0)
    shift = tl.div_rn(total.to(tl.float32), divisor.to(tl.float32)).to(tl.float64)
    mean = tl.where(count > 1, origin + shift, 0.0)
    above_mean = tl.where(count > 1, reward - origin - shift, reward).to(tl.float32)

    spread = tl.zeros([BLOCK_R], dtype=tl.float64)
    for start in range(0, R, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        counted, value = members(rewards_ptr, groups_ptr, invalid_ptr, group, j, R, HAS_INVALID and EXCLUDE)
        distance = value[None, :] - mean[:, None]
        spread += tl.sum(tl.where(counted, distance * distance, 0.0), 1)
    variance = tl.div_rn(spread.to(tl.float32), tl.maximum(count - 1.0, 1.0).to(tl.float32))
    std = tl.where(count > 1, tl.sqrt_rn(variance), 1.0)

    advantage = above_mean
    if NORMALIZE:
        advantage = tl.div_rn(advantage, std + epsilon)
    if HAS_INVALID and not KEEP:
        advantage = tl.where(tl.load(invalid_ptr + rows, mask=inside, other=1) == 0, advantage, 0.0)
    first = advantage
    if SELECTION > 0:
        best = tl.full([BLOCK_R], -float("inf"), dtype=tl.float64)
        winner = tl.zeros([BLOCK_R], dtype=tl.int32) + R  # stays R if no row of the group can win
        for start in range(0, R, BLOCK_J):
            j = start + tl.arange(0, BLOCK_J)
            correct, value = members(rewards_ptr, groups_ptr, invalid_ptr, group, j, R, HAS_INVALID and VALID_WINNER)
            # "reward > mean" without a quotient, whose rounding could differ between the rows of a group.
            correct = correct & ((value[None, :] - origin[:, None]) * divisor[:, None] > total[:, None])
            logprob = tl.load(logprob_ptr + j, mask=j < R, other=0.0).to(tl.float64)
            logprob = tl.where(logprob == logprob, logprob, -float("inf"))  # the mean of no steps may be NaN
            candidate = tl.where(correct, logprob[None, :], -float("inf"))
            highest = tl.max(candidate, 1)
            place = tl.min(tl.where(correct & (candidate == highest[:, None]), j[None, :], R), 1)
            # In a tie, an earlier tile wins, because its rows come first.
            better = (place < R) & ((highest > best) | (winner == R))
            best = tl.where(better, highest, best)
            winner = tl.where(better, place, winner)
        rival = (advantage > 0) if SELECTION == 1 else (winner < R)
        first = tl.where(rival & (rows != winner), 0.0, first)
    tl.store(advantage_ptr + rows, advantage, mask=inside)
    tl.store(first_ptr + rows, first, mask=inside)
    tl.store(mean_ptr + rows, mean.to(tl.float32), mask=inside)
    tl.store(std_ptr + rows, std, mask=inside)


def constants(
    *, has_invalid: bool, invalid: str, normalize_std: bool, first_token: str, winner_from: str
) -> dict[str, int | bool]:
    """Return the constants of the kernel."""
    return {
        "HAS_INVALID": has_invalid, "EXCLUDE": invalid == "exclude", "KEEP": invalid == "keep",
        "NORMALIZE": normalize_std,
        "VALID_WINNER": invalid == "exclude" or (invalid == "zero" and winner_from == "valid"),
        "SELECTION": SELECTIONS[first_token], "BLOCK_R": BLOCK_R, "BLOCK_J": BLOCK_J,
    }  # fmt: skip


def group_advantages_triton(
    rewards: Tensor, group_ids: Tensor, invalid_mask: Tensor | None, invalid: str, normalize_std: bool,
    mean_logprob: Tensor | None, first_token: str, winner_from: str,
) -> GroupAdvantages:  # fmt: skip
    """Compute `latent_kernels.group_advantages` on checked arguments."""
    rewards, rows = rewards.contiguous(), len(rewards)
    result = GroupAdvantages(*torch.empty(4, rows, dtype=torch.float32, device=rewards.device))
    if rows:
        unused = rewards  # in the place of a tensor that the kernel does not read
        chosen = constants(
            has_invalid=invalid_mask is not None,
            invalid=invalid,
            normalize_std=normalize_std,
            first_token=first_token,
            winner_from=winner_from,
        )
        group_advantages_kernel[(triton.cdiv(rows, BLOCK_R),)](
            rewards_ptr=rewards, groups_ptr=group_ids.contiguous(),
            invalid_ptr=unused if invalid_mask is None else invalid_mask.bool().contiguous().view(torch.int8),
            logprob_ptr=unused if mean_logprob is None else mean_logprob.contiguous(),
            advantage_ptr=result.advantages, first_ptr=result.first_step, mean_ptr=result.group_mean,
            std_ptr=result.group_std, R=rows, epsilon=STD_EPSILON, **chosen, num_warps=NUM_WARPS,
        )  # fmt: skip
    return result
