"""The noise: Philox words against the oracle and Triton, and the distribution of the clamped Gumbel draws."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import oracle
from support.tolerances import chi_squared_bound

from latent_kernels import philox_uniform
from latent_kernels._noise import (
    draw_seed,
    exponential_draws,
    gumbel_noise,
    noise_bounds,
    philox_words,
    uniform,
)

WORD = 2**32
FULL = WORD - 1


@given(
    ids=st.lists(st.integers(0, FULL), min_size=1, max_size=5),
    rows=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=3),
    seed=st.integers(-(2**63), 2**63 - 1),
    step=st.integers(0, 2**31 - 1),
)
def test_words_equal_those_of_the_oracle(ids, rows, seed, step):
    key = (seed % WORD, (seed >> 32) % WORD)
    expected = [[oracle.philox((i, row % WORD, (row >> 32) % WORD, step), key)[0] for i in ids] for row in rows]
    assert philox_words(torch.tensor(ids), torch.tensor(rows), seed, step).tolist() == expected
    tensors = torch.tensor(seed), torch.tensor(step)
    assert philox_words(torch.tensor(ids), torch.tensor(rows), *tensors).tolist() == expected


def test_words_depend_on_every_part_of_the_counter_and_key():
    base = dict(ids=torch.tensor([3]), row_ids=torch.tensor([5]), seed=7, step=11)
    other_values = dict(ids=torch.tensor([4]), row_ids=torch.tensor([5 + WORD]), seed=7 + WORD, step=12)
    words = {philox_words(**base).item()} | {philox_words(**{**base, k: v}).item() for k, v in other_values.items()}
    assert len(words) == 5


TRITON_PROGRAM = """
import torch, triton, triton.language as tl
from latent_kernels._noise import philox_words

@triton.jit
def kernel(out, ids, seed, low, high, step, whole: tl.constexpr, n: tl.constexpr):
    i = tl.arange(0, n)
    c0 = tl.load(ids + i)
    zero = tl.zeros_like(c0)
    if whole:
        word, _, _, _ = tl.philox(seed, c0, zero + low, zero + high, zero + step)
    else:
        word, _, _, _ = tl.randint4x(seed, c0)
    tl.store(out + i, word.to(tl.uint32, bitcast=True).to(tl.int64))

ids = torch.arange(64, dtype=torch.int32) * 2003
for seed in (0, 1, 1 << 40, (1 << 63) - 1):
    for row, step in ((0, 0), (7, 3), (5 + (9 << 32), 1 << 20)):
        out = torch.zeros(64, dtype=torch.int64)
        kernel[(1,)](out, ids, seed, row & 0xFFFFFFFF, row >> 32, step, whole=True, n=64)
        assert torch.equal(out, philox_words(ids.long(), torch.tensor([row]), seed, step)[0]), (seed, row, step)
    kernel[(1,)](out, ids, seed, 0, 0, 0, whole=False, n=64)
    assert torch.equal(out, philox_words(ids.long(), torch.tensor([0]), seed, 0)[0]), seed
print("words agree")
"""


def test_words_equal_those_of_triton_bit_for_bit(repository: Path, tmp_path: Path):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    program = tmp_path / "program.py"  # the interpreter reads a kernel's source from its file
    program.write_text(TRITON_PROGRAM)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(repository)}
    done = subprocess.run([sys.executable, str(program)], env=environment, capture_output=True, text=True, timeout=120)
    if done.returncode and "AssertionError" not in done.stderr:
        pytest.skip(f"Triton's interpreter cannot run here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    assert "words agree" in done.stdout


def test_uniform_draws_are_positive_and_at_most_one():
    draws = uniform(torch.tensor([0, 1, FULL - 1, FULL]))
    assert draws.dtype == torch.float32
    assert draws.tolist() == [2.0**-33, 2.0**-33 + 2.0**-32, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["one_sided", "two_sided"])
def test_noise_is_within_its_bounds_at_the_ends_of_the_exponential(kind):
    low, high = noise_bounds(kind)
    noise = gumbel_noise(torch.tensor([0.0, 1e-30, math.exp(-3.0) / 2, 10.0, float("inf")]), kind)
    assert noise.tolist() == [high, high, high, low, low]
    middle = gumbel_noise(torch.tensor([1.0]), kind).item()
    assert middle == (1.5 if kind == "one_sided" else 0.0)


def clamped_gumbel_counts(noise: torch.Tensor, bins: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return observed and expected counts: of the two atoms at the ends of the clamp, and of `bins` intervals."""
    edges = torch.linspace(-1.5, 3.0, bins + 1, dtype=torch.float64)
    cumulative = torch.exp(-torch.exp(-edges))
    expected = torch.cat([cumulative[:1], cumulative.diff(), 1.0 - cumulative[-1:]]) * noise.numel()
    inside = noise[(noise > -1.5) & (noise < 3.0)]
    atoms = [(noise == -1.5).sum().view(1), (noise == 3.0).sum().view(1)]
    observed = torch.cat([atoms[0], torch.histc(inside, bins, -1.5, 3.0), atoms[1]])
    return observed.double(), expected


@pytest.mark.parametrize("axis", ["over-ids", "over-rows", "over-steps", "over-seeds"])
def test_draws_follow_the_clamped_gumbel_distribution(axis):
    count, one = 1 << 16, torch.zeros(1, dtype=torch.int64)
    many = torch.arange(count)
    if axis == "over-ids":
        draws = exponential_draws(many, one, 5, 2)
    elif axis == "over-rows":
        draws = exponential_draws(one, many, 5, 2)
    elif axis == "over-steps":
        draws = exponential_draws(one, one.expand(count), 5, many)
    else:
        draws = exponential_draws(one, one.expand(count), many.view(-1, 1) * 2654435761, 2)
    noise = gumbel_noise(draws.flatten(), "two_sided").double()
    observed, expected = clamped_gumbel_counts(noise, bins=30)
    assert observed.sum() == count
    statistic = ((observed - expected).square() / expected).sum().item()
    assert statistic < chi_squared_bound(31)


def test_one_sided_noise_is_two_sided_noise_shifted_to_zero():
    draws = exponential_draws(torch.arange(1000), torch.arange(3), 1, 0)
    torch.testing.assert_close(gumbel_noise(draws, "one_sided"), gumbel_noise(draws, "two_sided") + 1.5, rtol=0, atol=0)


def test_torch_manual_seed_decides_fresh_seeds():
    torch.manual_seed(3)
    first = [draw_seed() for _ in range(3)]
    torch.manual_seed(3)
    assert [draw_seed() for _ in range(3)] == first
    assert len(set(first)) == 3
    assert all(0 <= seed < 2**63 for seed in first)


def test_uniform_draw_of_a_row_is_the_word_of_id_zero():
    rows = torch.tensor([0, 5, -1, 1 << 40])
    draws = philox_uniform(rows, seed=3, step=4)
    words = philox_words(torch.zeros(1, dtype=torch.int64), rows, 3, 4).squeeze(-1)
    assert draws.dtype == torch.float64
    assert torch.equal(draws, (words.double() + 0.5) / WORD)
    assert torch.equal(draws, philox_uniform(rows, seed=torch.tensor(3), step=torch.tensor(4)))


def test_uniform_draws_of_rows_are_uniform():
    draws = philox_uniform(torch.arange(1 << 16), seed=1, step=2)
    assert 0 < draws.min() < draws.max() < 1
    observed, expected = torch.histc(draws, 32, 0.0, 1.0), (1 << 16) / 32
    assert ((observed - expected).square() / expected).sum().item() < chi_squared_bound(31)
