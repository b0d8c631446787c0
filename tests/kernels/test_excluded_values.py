"""What does not count reaches no sum, equal rewards have no advantage, and draws are taken in float32."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.kernels import NEEDS_TRITON, kernel

from latent_kernels import group_advantages, mix_embeddings, project_with_noise

BOTH = pytest.mark.parametrize("impl", ["eager", pytest.param("triton", marks=NEEDS_TRITON)])


def of(operator, impl):
    return operator if impl == "eager" else kernel(operator)


@BOTH
@settings(max_examples=15, deadline=None)
@given(reward=st.floats(-100, 100), size=st.integers(2, 9), dtype=st.sampled_from(["float16", "float32", "float64"]))
def test_equal_rewards_have_no_advantage(impl, reward, size, dtype):
    rewards = torch.full((size,), reward, dtype=getattr(torch, dtype))
    result = of(group_advantages, impl)(rewards, torch.zeros(size, dtype=torch.int64), first_token="all")
    assert not result.advantages.any()
    assert not result.group_std.any()


@BOTH
@pytest.mark.parametrize("junk", [torch.nan, torch.inf, -torch.inf])
def test_rewards_of_excluded_rows_may_hold_anything(impl, junk):
    groups, invalid = torch.tensor([0, 0, 0, 1]), torch.tensor([False, True, False, True])
    options = dict(invalid_mask=invalid, mean_logprob=torch.tensor([-1.0, torch.nan, torch.nan, torch.nan]))
    expected = of(group_advantages, impl)(torch.tensor([1.0, 0.0, 0.3, 0.0]), groups, **options)
    for one, other in zip(
        of(group_advantages, impl)(torch.tensor([1.0, junk, 0.3, junk]), groups, **options), expected, strict=True
    ):
        assert torch.equal(one, other)
        assert one.isfinite().all()


@BOTH
def test_an_infinite_tau_gives_an_impossible_component_no_weight(impl):
    ids, scores = torch.tensor([[0, 1, 2]]), torch.tensor([[5.0, -torch.inf, 1.0]])
    mixed = of(mix_embeddings, impl)(ids, scores, torch.eye(3), tau=float("inf"))
    torch.testing.assert_close(mixed, torch.tensor([[0.5, 0.0, 0.5]]))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_draws_in_16_bits_are_taken_in_float32(impl, dtype):
    hidden, weight, draws = torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([[0.3, 1.7, 0.9]]).to(dtype)
    noise = of(project_with_noise, impl)(hidden, weight, exponential=draws)
    torch.testing.assert_close(noise, 1.5 - draws.float().log(), rtol=0, atol=1e-6)
