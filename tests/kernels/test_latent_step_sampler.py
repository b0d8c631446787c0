"""The noise of the latent step: which stream a row reads, and the distribution of ids and weights."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from support import oracle
from support import tolerances as tol
from support.kernels import DEVICE, NEEDS_TRITON, SLOW_IF_INTERPRETED, kernel, with_kernel
from support.latent_steps import WIDTH, assert_same_step, make_logits
from torch import Tensor

from latent_kernels import latent_step_from_logits

triton_step_from_logits = kernel(latent_step_from_logits)
PUBLIC_AND_TRITON = with_kernel(latent_step_from_logits)

pytestmark = pytest.mark.usefixtures("small_segments")


def test_seed_and_step_may_be_tensors():
    logits, table = make_logits("normal", 4, 333), torch.randn(333, WIDTH)
    ints = latent_step_from_logits(logits, table, seed=123456789012, step=7)
    tensors = latent_step_from_logits(logits, table, seed=torch.tensor(123456789012), step=torch.tensor(7))
    assert all(torch.equal(a, b) for a, b in zip(ints, tensors, strict=True))
    for other in (dict(seed=123456789013, step=7), dict(seed=123456789012, step=8)):
        assert not torch.equal(latent_step_from_logits(logits, table, **other).scores, ints.scores)


@PUBLIC_AND_TRITON
def test_a_step_per_row_gives_each_row_the_noise_of_its_step(operator):
    logits, table = make_logits("normal", 4, 333), torch.randn(333, WIDTH)
    steps = torch.tensor([3, 0, 3, 900])
    mask = torch.tensor([True, True, False, True])
    actual = operator(logits, table, seed=5, step=steps, latent_mask=mask)
    for row, step in enumerate(steps.tolist()):
        only_row = slice(row, row + 1)
        expected = operator(
            logits[only_row], table, seed=5, step=step, latent_mask=mask[only_row], row_ids=torch.tensor([row])
        )
        assert torch.equal(actual.ids[only_row], expected.ids)
        assert torch.equal(actual.scores[only_row], expected.scores)
    with pytest.raises(ValueError, match="step"):
        operator(logits, table, seed=5, step=steps[:3])


def test_without_a_seed_torch_manual_seed_decides_the_noise():
    logits, table = make_logits("normal", 4, 333), torch.randn(333, WIDTH)
    torch.manual_seed(1)
    first, second = (latent_step_from_logits(logits, table).scores for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(latent_step_from_logits(logits, table).scores, first)
    assert not torch.equal(first, second)


@PUBLIC_AND_TRITON
def test_a_seed_gives_the_draws_of_the_oracles_philox(operator):
    logits, table = make_logits("normal", 4, 333), torch.randn(333, WIDTH)
    rows = torch.tensor([9, -4, 1 << 35, 0])
    draws = oracle.exponential_draws(333, rows.tolist(), 5, 6)
    seeded = operator(logits, table, seed=5, step=6, row_ids=rows)
    assert_same_step(seeded, oracle.latent_step(logits, table, exponential=draws))


def test_noise_does_not_depend_on_the_dtype_of_the_logits():
    logits, table = make_logits("bf16-rounded", 4, 333), torch.randn(333, WIDTH)
    single = latent_step_from_logits(logits, table, seed=5)
    half = latent_step_from_logits(logits.bfloat16(), table, seed=5)
    double = latent_step_from_logits(logits.double(), table, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(half, single, strict=True))
    assert_same_step(double, single)


def fixed_logits(rows: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return the same twelve logits in every row, a table that shows the weights, and the options of the sampler."""
    logits = torch.linspace(2.0, -2.0, 12).expand(rows, -1)
    return logits, torch.eye(12), dict(top_k=3, top_p=0.9, noise_scale=1.3)


@functools.cache
def oracle_sample(noise: str) -> oracle.Step:
    """Return steps of the oracle with torch's own exponential draws."""
    logits, table, options = fixed_logits(8_000)
    draws = torch.empty(logits.shape).exponential_(generator=torch.Generator().manual_seed(1))
    return oracle.latent_step(logits, table, exponential=draws, noise=noise, **options)


# Other tests hold the kernel's draws against the oracle's, so what this one adds may wait for a GPU or `--slow`.
@pytest.mark.parametrize(
    "operator",
    [latent_step_from_logits, pytest.param(triton_step_from_logits, marks=[NEEDS_TRITON, *SLOW_IF_INTERPRETED])],
    ids=["public", "triton"],
)
@pytest.mark.parametrize("noise", ["one_sided", "two_sided"])
def test_ids_and_weights_have_the_distribution_of_the_oracles(operator, noise):
    interpreted = operator is triton_step_from_logits and DEVICE == "cpu"
    logits, table, options = fixed_logits(100 if interpreted else 40_000)
    actual, expected = operator(logits, table, seed=77, noise=noise, **options), oracle_sample(noise)
    for place in (0, 2):
        assert_same_distribution(actual.ids[:, place], expected.ids[:, place])
        edges = expected.weights[:, place].quantile(torch.linspace(0.0, 1.0, 9))[1:-1]
        steps = (actual, expected)
        assert_same_distribution(*(torch.bucketize(step.weights[:, place].contiguous(), edges) for step in steps))


def assert_same_distribution(first: Tensor, second: Tensor) -> None:
    """Hold two samples of whole numbers against each other by a chi-squared test.

    Values that are rarer than one in fifty are counted together.
    """
    values = max(int(first.max()), int(second.max())) + 1
    counts = torch.stack([x.bincount(minlength=values) for x in (first, second)]).double()
    rare = counts[1] < len(second) / 50
    counts = torch.cat([counts[:, ~rare], counts[:, rare].sum(1, keepdim=True)], dim=1)
    counts = counts[:, counts.sum(0) > 0]
    assert counts.shape[1] > 3
    share = (len(second) / len(first)) ** 0.5
    statistic = ((counts[0] * share - counts[1] / share).square() / counts.sum(0)).sum().item()
    assert statistic < tol.chi_squared_bound(counts.shape[1] - 1)
