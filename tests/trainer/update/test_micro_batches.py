"""What the trainer does with a rollout's log-probs and lengths: gaps, importance weights, micro-batches, memory."""

from __future__ import annotations

import pytest
import torch
from support.trainers import even, gradients, grpo

from latent_grpo.config import ConfigError, LatentGRPOConfig
from latent_grpo.model import ModelError
from latent_grpo.rollout.slot_cache import rows_within
from latent_grpo.rollout.trajectory import Rollout
from latent_grpo.update.micro_batches import micro_batches


def made_rollout(lengths: list[int], generations: int) -> Rollout:
    rows, steps = len(lengths), max(lengths)
    mask = torch.arange(steps) < torch.tensor(lengths).unsqueeze(-1)
    shape = (rows, steps)
    prompts = rows // generations
    return Rollout(
        prompt_ids=torch.zeros(prompts, 3, dtype=torch.int64), prompt_mask=torch.ones(prompts, 3, dtype=torch.int64),
        prompt_index=torch.arange(rows) // generations, token=torch.zeros(shape, dtype=torch.int64),
        ids=torch.zeros(*shape, 2, dtype=torch.int64), scores=torch.zeros(*shape, 2),
        is_latent=torch.zeros(shape, dtype=torch.bool), mask=mask, logprob=torch.zeros(shape),
        finished=torch.ones(rows, dtype=torch.bool), tau=1.0,
    )  # fmt: skip


def test_micro_batches_are_of_like_length_and_keep_groups_together():
    rollout = made_rollout([9, 1, 2, 2, 8, 3, 1, 1], 2)
    parts = micro_batches(rollout, torch.arange(8), 4)
    assert [part.tolist() for part in parts] == [[6, 7, 2, 3], [4, 5, 0, 1]]
    assert micro_batches(rollout, torch.tensor([5, 0, 3]), 4)[0].tolist() == [5, 0, 3]


@pytest.mark.parametrize("budget", [1, 7, 20, 30, 1000])
def test_micro_batches_stay_within_their_tokens(budget):
    generator = torch.Generator().manual_seed(budget)
    lengths = torch.randint(1, 12, (24,), generator=generator).tolist()
    rollout = made_rollout(lengths, 4)
    rows = torch.randperm(24, generator=generator)[:17]
    parts = micro_batches(rollout, rows, 2, budget)
    assert torch.cat(parts).sort().values.tolist() == rows.sort().values.tolist()
    for part in parts:
        longest = max(lengths[row] for row in part.tolist())
        tokens = 3 * len(rollout.prompt_index[part].unique()) + longest * len(part)
        assert tokens <= budget or len(part) == 1
    assert budget < 1000 or len(parts) == 1


@pytest.mark.parametrize("budget", [None, 1200])
@pytest.mark.parametrize("spread", ["within groups", "between groups"])
def test_the_cost_of_an_update_follows_its_real_tokens(spread, budget):
    """One response in eight runs to the limit: one in each group, or all of every eighth group."""
    long = (lambda i: i % 8 == 0) if spread == "within groups" else (lambda i: i // 8 % 8 == 0)
    lengths = [160 if long(i) else 8 for i in range(512)]
    rollout = made_rollout(lengths, 8)
    parts = micro_batches(rollout, torch.randperm(512), 32, budget)
    assert torch.cat(parts).sort().values.tolist() == list(range(512))
    padded = sum(len(part) * max(lengths[row] for row in part.tolist()) for part in parts)
    assert padded < 1.05 * sum(lengths)
    prompts = sum(len(rollout.prompt_index[part].unique()) for part in parts)
    assert prompts <= (64 + len(parts) if spread == "between groups" else 2 * 64 + len(parts))


def test_micro_batches_by_tokens_give_the_gradient_of_the_whole_batch(tokenizer, warm, tmp_path):
    found, calls = [], []
    for budget in (None, 60):
        trainer = grpo(
            tmp_path, tokenizer, even, warm, first_token="all", invalid="keep", micro_batch_tokens=budget,
            old_logprobs="rollout",
        )  # fmt: skip
        batch, _ = trainer.collect()
        calls.append(len(trainer.micro_batches(batch.rollout, torch.arange(16))))
        trainer.accumulate(batch, torch.arange(16))
        found.append(gradients(trainer.model))
    assert calls[0] == 1 < calls[1]
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5 * float(found[0].abs().max()))


def test_advantages_are_weighed_by_capped_importance(tokenizer, warm, tmp_path):
    options = dict(first_token="all", invalid="keep", per_device_train_batch_size=4)
    plain = grpo(tmp_path, tokenizer, even, warm, **options)
    found = plain.collector.sample(plain.model)
    rollout, rewards = found.rollout, found.rewards
    rollout.logprob[:, 0] += 0.5  # as a sampler of coarse precision would
    rollout.logprob[:, 1] -= 2.0
    with pytest.warns(UserWarning, match=r"over max_logprob_gap 0\.05"):
        before, gap = plain.prepare(rollout, rewards)
    assert gap["logprob_gap"] > 0.5
    capped = grpo(tmp_path, tokenizer, even, warm, importance_sampling_cap=1.5, max_logprob_gap=10.0, **options)
    after, _ = capped.prepare(rollout, rewards)
    ratio = (after.advantages / before.advantages)[before.advantages[:, 0] != 0]
    torch.testing.assert_close(ratio[:, 0], torch.full_like(ratio[:, 0], 0.6065), rtol=1e-3, atol=0)
    torch.testing.assert_close(ratio[:, 1], torch.full_like(ratio[:, 1], 1.5))
    assert torch.equal(after.old_logprob, before.old_logprob)


def test_sampled_log_probs_that_are_off_are_told_of(tokenizer, warm, tmp_path):
    trainer = grpo(tmp_path, tokenizer, even, warm, old_logprobs="rollout", first_token="all", invalid="keep")
    batch, _ = trainer.collect()
    batch.old_logprob = batch.old_logprob + 0.3
    with pytest.warns(UserWarning, match="max_logprob_gap"):
        metrics = trainer.update(batch)
    assert metrics["logprob_gap"] == pytest.approx(0.3, abs=1e-3)


def test_importance_weights_need_recomputed_log_probs():
    with pytest.raises(ConfigError, match=r"importance_sampling_cap is 2\.0: it needs old_logprobs recompute"):
        LatentGRPOConfig(importance_sampling_cap=2.0, old_logprobs="rollout")


def test_a_memory_budget_bounds_the_rows_in_flight(tokenizer, warm, tmp_path, monkeypatch):
    from latent_grpo.rollout import generate as generation

    whole = grpo(tmp_path, tokenizer, even, warm)
    wanted = whole.collector.sample(whole.model).rollout
    seen = []
    decoder_for = generation.decoder_for
    monkeypatch.setattr(generation, "decoder_for", lambda *args: seen.append(args[3]) or decoder_for(*args))
    config = warm.config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    tokens = wanted.prompt_ids.shape[1] + 8
    small = grpo(tmp_path, tokenizer, even, warm, rollout_memory=5.5 * token * tokens / 2**30)
    found = small.collector.sample(small.model).rollout
    assert seen == [5]
    assert torch.equal(found.ids, wanted.ids)
    with pytest.raises(ModelError, match="raise rollout_memory"):
        rows_within(0.5 * token * tokens / 2**30, config, torch.float32, tokens)
