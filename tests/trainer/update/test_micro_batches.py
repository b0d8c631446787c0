"""How responses are divided into micro-batches, and the gap between the log-probs of sampler and trainer."""

from __future__ import annotations

import pytest
import torch
from support.trainers import assert_same_gradients, even, gradients, grpo, rollout_of

from latent_grpo.config import LatentGRPOConfig
from latent_grpo.errors import ConfigError
from latent_grpo.rollout.trajectory import Rollout
from latent_grpo.update.micro_batches import micro_batches
from latent_grpo.update.statistics import GAP


def rollout_of_groups(lengths: list[int], generations: int) -> Rollout:
    """Return a rollout with `generations` responses to each prompt of 3 tokens."""
    return rollout_of(lengths, [row // generations for row in range(len(lengths))], prompt_length=3)


def test_micro_batches_have_similar_lengths_and_keep_groups_together():
    rollout = rollout_of_groups([9, 1, 2, 2, 8, 3, 1, 1], 2)
    batches = micro_batches(rollout, torch.arange(8), 4)
    assert [rows.tolist() for rows in batches] == [[6, 7, 2, 3], [4, 5, 0, 1]]


def test_rows_that_fit_one_micro_batch_keep_their_order():
    rollout = rollout_of_groups([9, 1, 2, 2, 8, 3, 1, 1], 2)
    assert [rows.tolist() for rows in micro_batches(rollout, torch.tensor([5, 0, 3]), 4)] == [[5, 0, 3]]


def test_no_rows_give_no_micro_batch():
    rollout = rollout_of([3, 1], [0, 0])
    assert micro_batches(rollout, torch.arange(0), 4) == micro_batches(rollout, torch.arange(0), 4, tokens=9) == []


@pytest.mark.parametrize("budget", [1, 7, 20, 30, 1000])
def test_micro_batches_stay_within_their_tokens(budget):
    generator = torch.Generator().manual_seed(budget)
    lengths = torch.randint(1, 12, (24,), generator=generator).tolist()
    rollout = rollout_of_groups(lengths, 4)
    rows = torch.randperm(24, generator=generator)[:17]
    batches = micro_batches(rollout, rows, 2, budget)
    assert torch.cat(batches).sort().values.tolist() == rows.sort().values.tolist()
    for batch in batches:
        longest = max(lengths[row] for row in batch.tolist())
        tokens = 3 * len(rollout.prompt_index[batch].unique()) + longest * len(batch)
        assert tokens <= budget or len(batch) == 1
    assert budget < 1000 or len(batches) == 1


@pytest.mark.parametrize("budget", [None, 1200])
@pytest.mark.parametrize("spread", ["within groups", "between groups"])
def test_the_cost_of_an_update_follows_its_real_tokens(spread, budget):
    """One response in eight runs to the limit: one in each group, or all of every eighth group."""
    is_long = (lambda i: i % 8 == 0) if spread == "within groups" else (lambda i: i // 8 % 8 == 0)
    lengths = [160 if is_long(i) else 8 for i in range(512)]
    rollout = rollout_of_groups(lengths, 8)
    batches = micro_batches(rollout, torch.randperm(512), 32, budget)
    assert torch.cat(batches).sort().values.tolist() == list(range(512))
    padded = sum(len(batch) * max(lengths[row] for row in batch.tolist()) for batch in batches)
    assert padded < 1.05 * sum(lengths)
    prompts = sum(len(rollout.prompt_index[batch].unique()) for batch in batches)
    assert prompts <= (64 + len(batches) if spread == "between groups" else 2 * 64 + len(batches))


def test_micro_batches_by_tokens_give_the_gradient_of_the_whole_batch(tokenizer, warm, tmp_path):
    results, counts = [], []
    for budget in (None, 60):
        options = dict(first_token="all", invalid="keep", old_logprobs="rollout", micro_batch_tokens=budget)
        trainer = grpo(tmp_path, tokenizer, even, warm, **options)
        batch, _ = trainer.collect()
        counts.append(len(trainer.micro_batches(batch.rollout, torch.arange(16))))
        trainer.accumulate(batch, torch.arange(16))
        results.append(gradients(trainer.model))
    assert counts[0] == 1 < counts[1]
    assert_same_gradients(results[1], results[0])


def test_a_micro_batch_of_one_step_is_replayed_in_two_passes_as_others_are():
    rollout = rollout_of([3, 1], [0, 0])
    assert rollout.select(torch.tensor([1])).mask.tolist() == [[True, False]]
    assert rollout_of([1, 1], [0, 0]).select(torch.tensor([1])).mask.tolist() == [[True]]


def test_advantages_are_weighted_by_capped_importance(tokenizer, warm, tmp_path):
    options = dict(first_token="all", invalid="keep", per_device_train_batch_size=4)
    plain = grpo(tmp_path, tokenizer, even, warm, **options)
    groups = plain.collector.sample(plain.model)
    rollout, rewards = groups.rollout, groups.rewards
    rollout.logprob[:, 0] += 0.5  # as a sampler of coarse precision would
    rollout.logprob[:, 1] -= 2.0
    with pytest.warns(UserWarning, match=r"over max_logprob_gap 0\.05"):
        before, gap = plain.prepare(rollout, rewards)
    assert gap[GAP] > 0.5
    capped = grpo(tmp_path, tokenizer, even, warm, importance_sampling_cap=1.5, max_logprob_gap=10.0, **options)
    after, _ = capped.prepare(rollout, rewards)
    ratio = (after.advantages / before.advantages)[before.advantages[:, 0] != 0]
    torch.testing.assert_close(ratio[:, 0], torch.full_like(ratio[:, 0], 0.6065), rtol=1e-3, atol=0)
    torch.testing.assert_close(ratio[:, 1], torch.full_like(ratio[:, 1], 1.5))
    assert torch.equal(after.old_logprob, before.old_logprob)


def test_sampled_log_probs_that_differ_from_the_trainers_give_a_warning(tokenizer, warm, tmp_path):
    trainer = grpo(tmp_path, tokenizer, even, warm, old_logprobs="rollout", first_token="all", invalid="keep")
    batch, _ = trainer.collect()
    batch.old_logprob = batch.old_logprob + 0.3
    with pytest.warns(UserWarning, match="max_logprob_gap"):
        metrics = trainer.update(batch)
    assert metrics[GAP] == pytest.approx(0.3, abs=1e-3)


def test_importance_weights_without_recomputed_log_probs_are_refused():
    with pytest.raises(ConfigError, match=r"importance_sampling_cap is 2\.0: it needs old_logprobs recompute"):
        LatentGRPOConfig(importance_sampling_cap=2.0, old_logprobs="rollout")
