"""Seeds that a run derives from its own: always usable, and the ones that recorded runs had."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.trainers import even, grpo

from latent_grpo.seeds import derive_seed, rank_seed, shuffle_seed

LARGEST = 2**32 - 1


@pytest.mark.parametrize("seed", [0, 1, 7, 2**16, 2**30])
def test_ordinary_seeds_derive_the_seeds_of_recorded_runs(seed):
    assert derive_seed(seed, 5) == seed * 2**31 + 5
    assert derive_seed(seed, 5, epoch=2, epochs=3) == (seed * 2**31 + 5) * 3 + 2
    assert rank_seed(seed, 3) == seed + 3


@pytest.mark.parametrize(("count", "epoch", "epochs"), [(0, 0, 1), (2**31 - 1, 0, 1), (9, 2, 3), (2**31 - 1, 99, 100)])
def test_the_largest_seed_derives_seeds_that_generators_accept(count, epoch, epochs):
    derived = derive_seed(LARGEST, count, epoch, epochs)
    assert 0 <= derived < 2**63
    torch.Generator().manual_seed(derived)
    np.random.seed(rank_seed(LARGEST, 7))


def test_the_largest_seed_updates_over_several_epochs(tokenizer, warm, tmp_path):
    size = dict(generation_batch_size=4, per_device_train_batch_size=4, max_completion_length=4)
    trainer = grpo(tmp_path, tokenizer, even, warm, seed=LARGEST, num_iterations=3, **size)
    assert math.isfinite(trainer.train()["loss"])


@pytest.mark.parametrize("other", [1, 2, 3, 4, 2**16, 2**31, LARGEST])
def test_no_two_seeds_shuffle_alike(other):
    """A CPU generator reads 32 bits of its seed, and the seeds 0 and 2 differ only in the others."""
    seeds = [[shuffle_seed(derive_seed(seed, count)) for count in range(100)] for seed in (0, other)]
    assert all(0 <= seed < 2**32 for several in seeds for seed in several)
    assert not set(seeds[0]) & set(seeds[1])
    orders = [torch.randperm(50, generator=torch.Generator().manual_seed(several[0])).tolist() for several in seeds]
    assert orders[0] != orders[1]


def test_seeds_of_recorded_runs_shuffle_as_before():
    assert [shuffle_seed(derive_seed(seed, 5)) for seed in (0, 1)] == [5, 2**31 + 5]


def test_runs_of_different_seeds_see_their_prompts_in_different_orders(tokenizer, warm, tmp_path):
    orders = []
    for seed in (0, 2):
        collector = grpo(tmp_path, tokenizer, even, warm, seed=seed).collector
        orders.append([collector.next_prompts() for _ in range(8)])
    assert orders[0] != orders[1]
