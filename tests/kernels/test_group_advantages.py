"""Group-relative advantages: golden vectors, the oracle's loop over groups, and the paper's cases by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import tolerances as tol
from support.golden import advantage_inputs
from support.kernels import NEEDS_TRITON, SLOW_IF_INTERPRETED, kernel, with_kernel
from support.oracle_loss import Advantages
from support.oracle_loss import group_advantages as oracle_advantages

from latent_kernels import GroupAdvantages, group_advantages
from latent_kernels.reference.loss import group_advantages_ref

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


def assert_same(actual: GroupAdvantages, expected: GroupAdvantages | Advantages) -> None:
    """All four results agree to float32."""
    for name, value, reference in zip(GroupAdvantages._fields, actual, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=0, atol=tol.FLOAT32, msg=lambda m, name=name: f"{name}: {m}")


# Golden vectors


@PUBLIC_AND_REFERENCE
@pytest.mark.golden("official_a_advantage")
@pytest.mark.parametrize("released", ["adv_exclude", "adv_include", "adv_grpo"])
def test_advantages_equal_those_of_the_released_code(operator, golden_case, released):
    result = operator(**advantage_inputs(golden_case, released))
    mask, expected = golden_case["mask"], golden_case[released]
    actual = result.advantages.unsqueeze(-1).repeat(1, mask.shape[1])
    actual[:, 0] = result.first_step
    assert (expected[:, 0] != expected[:, 1]).any() == (released != "adv_grpo")
    torch.testing.assert_close(actual * mask, expected * mask, rtol=0, atol=tol.GOLDEN_VALUE)


# Against the oracle


def unequal_groups() -> dict[str, Any]:
    """Return shuffled groups of 1 to 8 rows with negative and huge ids; group 5 has invalid rows only."""
    sizes = {-3: 1, 7: 8, 0: 2, 10**12: 5, -(2**62): 4, 5: 3, 6: 6}
    groups = torch.cat([torch.full((size,), group) for group, size in sizes.items()])
    broken = torch.rand(len(groups)) < 0.3
    broken[groups == 5] = True
    order = torch.randperm(len(groups))
    groups, broken = groups[order], broken[order]
    rewards = torch.randint(0, 3, (len(groups),)) / 2
    return dict(rewards=rewards, group_ids=groups, invalid_mask=broken, mean_logprob=-torch.rand(len(groups)))


@PUBLIC_AND_REFERENCE
@ALL_MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_unequal_groups_equal_the_oracle(operator, invalid, first_token, normalize_std, dtype):
    for winner_from in ("valid", "all", "valid"):
        options = dict(invalid=invalid, first_token=first_token, normalize_std=normalize_std, winner_from=winner_from)
        data = unequal_groups()
        data["rewards"] = data["rewards"].to(dtype)
        result = operator(**data, **options)
        assert all(part.dtype == torch.float32 for part in result)
        assert_same(result, oracle_advantages(**data, **options))


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Any]:
    """Return rewards with ties, groups, invalid rows and log-probs of up to 14 responses."""
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
def test_any_batch_equals_the_oracle(data, mode):
    options = dict(zip(("invalid", "first_token", "normalize_std"), mode, strict=True))
    expected = oracle_advantages(**data, **options)
    for operator in (group_advantages, group_advantages_ref):
        assert_same(operator(**data, **options), expected)
    early = dict(options, winner_from="all")
    for operator in (group_advantages, group_advantages_ref):
        assert_same(operator(**data, **early), oracle_advantages(**data, **early))


# Every mode once. The test of unequal groups has every combination of modes already.
QUICK_MODES = (
    ("exclude", "best_of_correct", True),
    ("zero", "best_of_group", False),
    ("keep", "all", True),
)


@NEEDS_TRITON
@pytest.mark.parametrize(
    ("invalid", "first_token", "normalize_std"),
    [pytest.param(*mode, marks=() if mode in QUICK_MODES else SLOW_IF_INTERPRETED) for mode in MODES],
)
def test_the_kernel_joins_groups_and_ties_across_tiles(invalid, first_token, normalize_std):
    rows = 80  # three tiles of 32 rows, the last of them not full
    data = dict(
        rewards=torch.randint(4, (rows,)) / 3.0,
        group_ids=torch.where(torch.rand(rows) < 0.5, 7, torch.randint(40, (rows,))),  # one group of half the rows
        invalid_mask=torch.rand(rows) < 0.2,
        mean_logprob=-torch.randint(3, (rows,)) / 2.0,  # winners tie within and across tiles
    )
    options = dict(invalid=invalid, first_token=first_token, normalize_std=normalize_std)
    assert_same(triton_advantages(**data, **options), oracle_advantages(**data, **options))


@given(batches(), st.sampled_from(MODES), st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(data, mode, random):
    options = dict(zip(("invalid", "first_token", "normalize_std"), mode, strict=True))
    order = list(range(len(data["rewards"])))
    random.shuffle(order)
    # A tie goes to the first row, so the winner of a tie would depend on the order.
    data["mean_logprob"] = -torch.arange(len(order), dtype=torch.float32) / 16
    expected = group_advantages(**data, **options)
    actual = group_advantages(**{name: value[order] for name, value in data.items()}, **options)
    assert_same(actual, GroupAdvantages(*(part[order] for part in expected)))


@given(batches(), st.sampled_from(MODES))
def test_other_groups_do_not_change_a_groups_advantages(data, mode):
    options = dict(zip(("invalid", "first_token", "normalize_std"), mode, strict=True))
    together = group_advantages(**data, **options)
    for group in data["group_ids"].unique():
        member = data["group_ids"] == group
        only_group = group_advantages(**{name: value[member] for name, value in data.items()}, **options)
        assert_same(only_group, GroupAdvantages(*(part[member] for part in together)))


# Cases by hand


@PUBLIC_AND_REFERENCE
def test_first_token_selection_keeps_the_winner_only(operator):
    rewards = torch.tensor([1.0, 1.0, 0.0, 0.0])
    data = dict(
        rewards=rewards, group_ids=torch.zeros(4, dtype=torch.int64), mean_logprob=torch.tensor([-2.0, -1, 0, -3])
    )
    gain = 0.5 / (math.sqrt(1 / 3) + 1e-6)
    for first_token, first in {
        "best_of_correct": [0.0, gain, -gain, -gain],
        "best_of_group": [0.0, gain, 0.0, 0.0],
        "all": [gain, gain, -gain, -gain],
    }.items():
        result = operator(**data, first_token=first_token)
        torch.testing.assert_close(result.first_step, torch.tensor(first))
        torch.testing.assert_close(result.advantages, torch.tensor([gain, gain, -gain, -gain]))


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
    log_probs = torch.tensor([-3.0, -1.0, -2.0])
    groups = torch.zeros(3, dtype=torch.int64)
    result = operator(rewards, groups, invalid_mask=broken, invalid=invalid, mean_logprob=log_probs)
    assert result.first_step[1] == 0
    assert result.first_step[2] > 0


@PUBLIC_AND_REFERENCE
def test_the_winner_is_correct_even_if_no_correct_row_has_a_finite_log_prob(operator):
    rewards, log_probs = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([-1.0, -torch.inf, -torch.inf])
    result = operator(rewards, torch.zeros(3, dtype=torch.int64), mean_logprob=log_probs)
    assert result.first_step[0] < 0
    assert result.first_step[1] > 0
    assert result.first_step[2] == 0


@PUBLIC_AND_REFERENCE
@pytest.mark.parametrize("first_token", ["best_of_correct", "best_of_group"])
def test_a_cut_off_winner_leaves_nobody_with_a_positive_first_step(operator, first_token):
    rewards, broken = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([False, True, False])
    log_probs, groups = torch.tensor([-3.0, -1.0, -2.0]), torch.zeros(3, dtype=torch.int64)
    options = dict(invalid_mask=broken, mean_logprob=log_probs, first_token=first_token, winner_from="all")
    first = operator(rewards, groups, invalid="zero", **options).first_step
    assert first[1:].tolist() == [0.0, 0.0]
    assert (first[0] < 0).item() == (first_token == "best_of_correct")
    assert operator(rewards, groups, invalid="exclude", **options).first_step[2] > 0  # row 1 is not in the group


@PUBLIC_AND_REFERENCE
def test_a_group_of_one_has_mean_zero_and_std_one(operator):
    result = operator(torch.tensor([0.7]), torch.tensor([4]), mean_logprob=torch.tensor([-1.0]))
    assert (result.group_mean.item(), result.group_std.item()) == (0.0, 1.0)
    assert result.advantages.item() == result.first_step.item() == pytest.approx(0.7, abs=1e-5)


@PUBLIC_AND_REFERENCE
@pytest.mark.parametrize("invalid", ["exclude", "zero"])
def test_a_group_of_invalid_rows_only_gets_no_advantage(operator, invalid):
    rewards, groups, broken = torch.tensor([1.0, 0.0, 1.0]), torch.zeros(3, dtype=torch.int64), torch.ones(3).bool()
    result = operator(rewards, groups, invalid_mask=broken, invalid=invalid, mean_logprob=torch.zeros(3))
    assert result.advantages.tolist() == result.first_step.tolist() == [0.0, 0.0, 0.0]


@PUBLIC_AND_REFERENCE
@pytest.mark.parametrize("size", [2, 3, 5, 7, 11])
@pytest.mark.parametrize("reward", [0.1, 0.3, 0.7, 1.0, -0.9, 1e4])
def test_equal_rewards_give_exactly_no_advantage(operator, size, reward):
    result = operator(torch.full((size,), reward), torch.full((size,), 3), mean_logprob=torch.zeros(size))
    assert result.advantages.tolist() == result.first_step.tolist() == [0.0] * size


@PUBLIC_AND_REFERENCE
def test_no_rows_give_empty_results(operator):
    empty = torch.zeros(0)
    result = operator(empty, empty.long(), invalid_mask=empty.bool(), mean_logprob=empty)
    assert all(part.shape == (0,) for part in result)


def test_strides_of_the_inputs_do_not_matter():
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
    "winner": (dict(winner_from="best"), ValueError, "winner_from must be one of 'valid', 'all', got 'best'"),
    "log-prob-missing": (dict(mean_logprob=None), ValueError, "first_token='best_of_correct' needs mean_logprob"),
    "log-prob-shape": (dict(mean_logprob=torch.zeros(3)), ValueError, r"mean_logprob .* got \[3\]"),
    "impl-bogus": (dict(impl="bogus"), ValueError, "impl must be one of .* got 'bogus'"),
    "impl-triton": (dict(impl="triton"), RuntimeError, "use impl='auto'"),
}


@pytest.mark.parametrize(("change", "error", "message"), INVALID.values(), ids=INVALID)
def test_an_error_names_the_wrong_argument(change, error, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = {"rewards": torch.zeros(4), "group_ids": GROUPS, "mean_logprob": torch.zeros(4), **change}
    with pytest.raises(error, match=message):
        group_advantages(**arguments)
