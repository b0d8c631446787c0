"""Group-relative advantages: golden vectors, a brute force in plain Python, and the paper's cases by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import tolerances as tol
from support.kernels import NEEDS_TRITON, kernel, with_kernel

from latent_kernels import GroupAdvantages, group_advantages
from latent_kernels.reference import group_advantages_ref

triton_advantages = kernel(group_advantages)
PUBLIC_AND_REFERENCE = with_kernel(group_advantages, group_advantages_ref)
INVALID_MODES = ("exclude", "zero", "keep")
FIRST_TOKEN_MODES = ("best_of_correct", "best_of_group", "all")
MODES = list(itertools.product(INVALID_MODES, FIRST_TOKEN_MODES, (True, False)))
ALL_MODES = pytest.mark.parametrize(
    ("invalid", "first_token", "normalize_std"),
    MODES,
    ids=[f"{invalid}-{first}-{'std' if std else 'no-std'}" for invalid, first, std in MODES],
)


def assert_same(got: GroupAdvantages, expected: GroupAdvantages) -> None:
    for name, a, b in zip(GroupAdvantages._fields, got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tol.FLOAT32, msg=lambda m, name=name: f"{name}: {m}")


def by_hand(
    rewards: list[float],
    groups: list[int],
    broken: list[bool],
    log_probs: list[float],
    *,
    invalid: str,
    first_token: str,
    normalize_std: bool,
) -> GroupAdvantages:
    """SPEC 5 with lists, in Python's float64."""
    size = len(rewards)
    advantages, means, stds = [0.0] * size, [0.0] * size, [1.0] * size
    for group in set(groups):
        members = [i for i in range(size) if groups[i] == group]
        counted = [rewards[i] for i in members if invalid != "exclude" or not broken[i]]
        mean, std = 0.0, 1.0
        if len(counted) > 1:
            mean = math.fsum(counted) / len(counted)
            std = math.sqrt(math.fsum((r - mean) ** 2 for r in counted) / (len(counted) - 1))
        for i in members:
            means[i], stds[i] = mean, std
            if invalid == "keep" or not broken[i]:
                advantages[i] = (rewards[i] - mean) / (std + 1e-6 if normalize_std else 1.0)
    first = list(advantages)
    for group in set(groups):
        members = [i for i in range(size) if groups[i] == group]
        correct = [i for i in members if advantages[i] > 0]
        if first_token == "all" or not correct:
            continue
        winner = max(correct, key=lambda i: (log_probs[i], -i))
        for i in correct if first_token == "best_of_correct" else members:
            if i != winner:
                first[i] = 0.0
    return GroupAdvantages(*(torch.tensor(x, dtype=torch.float32) for x in (advantages, first, means, stds)))


# Golden vectors


@PUBLIC_AND_REFERENCE
@pytest.mark.golden("official_a_advantage")
@pytest.mark.parametrize("released", ["adv_exclude", "adv_include", "adv_grpo"])
def test_golden_vectors(operator, golden_case, released):
    mask = golden_case["mask"]
    length = mask.sum(-1)
    broken = length >= int(golden_case["max_len"])
    mean_logprob = (golden_case["old_logp"] * mask).sum(-1) / length.clamp_min(1.0)
    options = {
        "adv_exclude": dict(invalid="exclude", first_token="best_of_group"),
        "adv_include": dict(invalid="keep", first_token="best_of_group"),
        "adv_grpo": dict(invalid="keep", first_token="all"),
    }[released]
    result = operator(
        golden_case["rewards"], golden_case["group"], invalid_mask=broken, mean_logprob=mean_logprob,
        normalize_std=bool(golden_case["norm_std"]), **options,
    )  # fmt: skip
    got = result.advantages.unsqueeze(-1).repeat(1, mask.shape[1])
    got[:, 0] = result.first_step
    expected = golden_case[released]
    assert (expected[:, 0] != expected[:, 1]).any() == (released != "adv_grpo")
    torch.testing.assert_close(got * mask, expected * mask, rtol=0, atol=tol.GOLDEN_VALUE)


# Brute force


def unequal_groups() -> dict[str, Any]:
    """Groups of 1 to 8 rows with negative and huge ids, shuffled; some with invalid rows, one with nothing else."""
    sizes = {-3: 1, 7: 8, 0: 2, 10**12: 5, -(2**62): 4, 5: 3, 6: 6}
    groups = torch.cat([torch.full((size,), group) for group, size in sizes.items()])
    broken = torch.rand(len(groups)) < 0.3
    broken[groups == 5] = True
    order = torch.randperm(len(groups))
    groups, broken = groups[order], broken[order]
    rewards = torch.randint(0, 3, (len(groups),)) / 2
    return dict(rewards=rewards, group_ids=groups, invalid_mask=broken, mean_logprob=-torch.rand(len(groups)))


def brute(data: dict[str, Any], **options: Any) -> GroupAdvantages:
    return by_hand(
        *(data[name].tolist() for name in ("rewards", "group_ids", "invalid_mask", "mean_logprob")), **options
    )


@PUBLIC_AND_REFERENCE
@ALL_MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_equals_brute_force(operator, invalid, first_token, normalize_std, dtype):
    options = dict(invalid=invalid, first_token=first_token, normalize_std=normalize_std)
    for _ in range(5):
        data = unequal_groups()
        data["rewards"] = data["rewards"].to(dtype)
        result = operator(**data, **options)
        assert all(part.dtype == torch.float32 for part in result)
        assert_same(result, brute(data, **options))


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Any]:
    size = draw(st.integers(0, 14))

    def column(elements: st.SearchStrategy, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(draw(st.lists(elements, min_size=size, max_size=size)), dtype=dtype)

    return dict(
        rewards=column(st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0, -1.0, 3.7]), torch.float32),
        group_ids=column(st.sampled_from([-5, 0, 1, 2**40]), torch.int64),
        invalid_mask=column(st.booleans(), torch.bool),
        mean_logprob=column(st.integers(-64, 0).map(lambda n: n / 16), torch.float32),
    )


@given(batches(), st.sampled_from(MODES))
def test_any_batch_equals_brute_force(data, mode):
    options = dict(zip(("invalid", "first_token", "normalize_std"), mode, strict=True))
    expected = brute(data, **options)
    assert_same(group_advantages(**data, **options), expected)
    assert_same(group_advantages_ref(**data, **options), expected)


@NEEDS_TRITON
@ALL_MODES
def test_kernel_over_many_tiles_with_ties_and_unequal_groups(invalid, first_token, normalize_std):
    rows = 301  # tiles of 32 rows, the last of them not full
    data = dict(
        rewards=torch.randint(4, (rows,)) / 3.0,
        group_ids=torch.where(torch.rand(rows) < 0.5, 7, torch.randint(40, (rows,))),  # one group of half the rows
        invalid_mask=torch.rand(rows) < 0.2,
        mean_logprob=-torch.randint(3, (rows,)) / 2.0,  # winners tie within and across tiles
    )
    options = dict(invalid=invalid, first_token=first_token, normalize_std=normalize_std)
    assert_same(triton_advantages(**data, **options), brute(data, **options))


@given(batches(), st.sampled_from(MODES), st.randoms(use_true_random=False))
def test_rows_may_come_in_any_order(data, mode, random):
    options = dict(zip(("invalid", "first_token", "normalize_std"), mode, strict=True))
    order = list(range(len(data["rewards"])))
    random.shuffle(order)
    # A tie goes to the first row, so the winner of one would depend on the order.
    data["mean_logprob"] = -torch.arange(len(order), dtype=torch.float32) / 16
    expected = group_advantages(**data, **options)
    got = group_advantages(**{name: value[order] for name, value in data.items()}, **options)
    assert_same(got, GroupAdvantages(*(part[order] for part in expected)))


@given(batches(), st.sampled_from(MODES))
def test_advantages_of_a_group_do_not_depend_on_the_other_groups(data, mode):
    options = dict(zip(("invalid", "first_token", "normalize_std"), mode, strict=True))
    together = group_advantages(**data, **options)
    for group in data["group_ids"].unique():
        member = data["group_ids"] == group
        alone = group_advantages(**{name: value[member] for name, value in data.items()}, **options)
        assert_same(alone, GroupAdvantages(*(part[member] for part in together)))


# Cases by hand


@PUBLIC_AND_REFERENCE
def test_first_token_selection_by_hand(operator):
    rewards = torch.tensor([1.0, 1.0, 0.0, 0.0])
    data = dict(
        rewards=rewards, group_ids=torch.zeros(4, dtype=torch.int64), mean_logprob=torch.tensor([-2.0, -1, 0, -3])
    )
    a = 0.5 / (math.sqrt(1 / 3) + 1e-6)
    for first_token, first in {
        "best_of_correct": [0.0, a, -a, -a],
        "best_of_group": [0.0, a, 0.0, 0.0],
        "all": [a, a, -a, -a],
    }.items():
        result = operator(**data, first_token=first_token)
        torch.testing.assert_close(result.first_step, torch.tensor(first))
        torch.testing.assert_close(result.advantages, torch.tensor([a, a, -a, -a]))


@PUBLIC_AND_REFERENCE
@pytest.mark.parametrize("first_token", ["best_of_correct", "best_of_group"])
def test_a_tie_in_log_prob_goes_to_the_first_row(operator, first_token):
    rewards = torch.tensor([0.0, 1.0, 1.0, 1.0])
    result = operator(
        rewards, torch.zeros(4, dtype=torch.int64), mean_logprob=torch.full((4,), -1.0), first_token=first_token
    )
    assert (result.first_step > 0).tolist() == [False, True, False, False]


@PUBLIC_AND_REFERENCE
@pytest.mark.parametrize("invalid", ["exclude", "zero"])
def test_an_invalid_row_never_wins(operator, invalid):
    rewards, broken = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([False, True, False])
    result = operator(
        rewards, torch.zeros(3, dtype=torch.int64), invalid_mask=broken, invalid=invalid,
        mean_logprob=torch.tensor([-3.0, -1.0, -2.0]),
    )  # fmt: skip
    assert result.first_step[1] == 0
    assert result.first_step[2] > 0


@PUBLIC_AND_REFERENCE
def test_a_group_of_one_has_mean_zero_and_std_one(operator):
    result = operator(torch.tensor([0.7]), torch.tensor([4]), mean_logprob=torch.tensor([-1.0]))
    assert (result.group_mean.item(), result.group_std.item()) == (0.0, 1.0)
    assert result.advantages.item() == result.first_step.item() == pytest.approx(0.7, abs=1e-5)


@PUBLIC_AND_REFERENCE
@pytest.mark.parametrize("invalid", ["exclude", "zero"])
def test_a_group_of_invalid_rows_gets_nothing(operator, invalid):
    result = operator(
        torch.tensor([1.0, 0.0, 1.0]), torch.zeros(3, dtype=torch.int64),
        invalid_mask=torch.ones(3, dtype=torch.bool), invalid=invalid, mean_logprob=torch.zeros(3),
    )  # fmt: skip
    assert result.advantages.tolist() == result.first_step.tolist() == [0.0, 0.0, 0.0]


@PUBLIC_AND_REFERENCE
@pytest.mark.parametrize("size", [2, 3, 5, 7, 11])
@pytest.mark.parametrize("reward", [0.1, 0.3, 0.7, 1.0, -0.9, 1e4])
def test_equal_rewards_give_exactly_no_advantage(operator, size, reward):
    result = operator(torch.full((size,), reward), torch.full((size,), 3), mean_logprob=torch.zeros(size))
    assert result.advantages.tolist() == result.first_step.tolist() == [0.0] * size


@PUBLIC_AND_REFERENCE
def test_no_rows(operator):
    empty = torch.zeros(0)
    result = operator(empty, empty.long(), invalid_mask=empty.bool(), mean_logprob=empty)
    assert all(part.shape == (0,) for part in result)


def test_strided_inputs_equal_contiguous_ones():
    data = unequal_groups()
    strided = {name: torch.stack([value, value], -1)[:, 0] for name, value in data.items()}
    assert not strided["rewards"].is_contiguous()
    assert_same(group_advantages(**strided), group_advantages(**data))


GROUPS = torch.zeros(4, dtype=torch.int64)
INVALID = {
    "rewards-2d": (dict(rewards=torch.zeros(4, 1)), ValueError, r"rewards must have shape \[\*\], got \[4, 1\]"),
    "rewards-int": (dict(rewards=GROUPS), TypeError, "rewards .* got torch.int64"),
    "groups-shape": (dict(group_ids=GROUPS[:3]), ValueError, r"group_ids must have shape \[4\], got \[3\]"),
    "groups-float": (dict(group_ids=torch.zeros(4)), TypeError, "group_ids must be torch.int64, got torch.float32"),
    "groups-device": (dict(group_ids=GROUPS.to("meta")), ValueError, "group_ids is on meta"),
    "mask-shape": (dict(invalid_mask=GROUPS[:2].bool()), ValueError, r"invalid_mask .* got \[2\]"),
    "invalid": (dict(invalid="drop"), ValueError, "invalid must be one of 'exclude', 'zero', 'keep', got 'drop'"),
    "first-token": (dict(first_token="best"), ValueError, "first_token must be one of .* got 'best'"),
    "log-prob-missing": (dict(mean_logprob=None), ValueError, "first_token='best_of_correct' needs mean_logprob"),
    "log-prob-shape": (dict(mean_logprob=torch.zeros(3)), ValueError, r"mean_logprob .* got \[3\]"),
    "impl-bogus": (dict(impl="bogus"), ValueError, "impl must be one of .* got 'bogus'"),
    "impl-triton": (dict(impl="triton"), RuntimeError, "use impl='auto'"),
}


@pytest.mark.parametrize(("change", "error", "message"), INVALID.values(), ids=INVALID)
def test_wrong_arguments_are_named(change, error, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = {"rewards": torch.zeros(4), "group_ids": GROUPS, "mean_logprob": torch.zeros(4), **change}
    with pytest.raises(error, match=message):
        group_advantages(**arguments)
