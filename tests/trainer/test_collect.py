"""What an update learns from: the group filter, rewards, and the memory of a rollout."""

from __future__ import annotations

import pytest
import torch
from support.trainers import even, grpo

from latent_grpo import LatentGRPOConfig
from latent_grpo.errors import ModelError
from latent_grpo.rollout import generate as generate_module
from latent_grpo.rollout.slot_cache import rows_within


def test_groups_that_agree_are_dropped_and_sampled_again(tokenizer, tmp_path):
    calls = []

    def reward(prompts, completions, **columns):
        calls.append(len(prompts))
        return [float(i % 4 == 0) if i < 8 else 1.0 for i in range(len(prompts))]  # two of four groups disagree

    trainer = grpo(tmp_path, tokenizer, reward, group_filter=True, max_generation_batches=5)
    batch, values = trainer.collect()
    assert len(calls) == 2
    assert values["groups_kept"] == 0.5
    assert len(batch.rewards) == 16
    assert (batch.rewards.view(4, 4).std(-1) > 0).all()


def test_an_exhausted_filter_warns_and_trains_on_what_there_is(tokenizer, tmp_path):
    def equal(prompts, **columns):
        return [1.0] * len(prompts)

    trainer = grpo(tmp_path, tokenizer, equal, group_filter=True, max_generation_batches=2)
    with pytest.warns(UserWarning, match="0 of 4 groups after 2"):
        values = trainer.train()
    assert values["loss"] == 0.0


def test_soft_overlong_falls_over_the_last_steps_before_the_limit(tokenizer, warm, tmp_path):
    trainer = grpo(tmp_path, tokenizer, ["soft_overlong"], warm, soft_punish_cache=4)
    groups = trainer.collector.sample(trainer.full_model)
    assert groups.rewards.unique().numel() > 1
    lengths = groups.rollout.lengths.tolist()
    assert groups.rewards.tolist() == [-max(0, length - 4) / 4 for length in lengths]


def test_sampling_options_reach_the_rollout():
    sampling = LatentGRPOConfig(latent_top_k=3, tau=0.5, max_completion_length=7).sampling()
    assert (sampling.latent_top_k, sampling.tau, sampling.max_new_tokens) == (3, 0.5, 7)


def test_a_memory_budget_bounds_the_rows_in_flight_and_changes_no_response(tokenizer, warm, tmp_path, monkeypatch):
    unbounded = grpo(tmp_path, tokenizer, even, warm)
    expected = unbounded.collector.sample(unbounded.model).rollout
    config = warm.config
    bytes_per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    tokens = expected.prompt_ids.shape[1] + 8
    bounded = grpo(tmp_path, tokenizer, even, warm, rollout_memory=5.5 * bytes_per_token * tokens / 2**30)
    seen = []
    decoder_for = generate_module.decoder_for
    monkeypatch.setattr(generate_module, "decoder_for", lambda *args: seen.append(args[3]) or decoder_for(*args))
    actual = bounded.collector.sample(bounded.model).rollout
    assert seen == [5]
    assert torch.equal(actual.ids, expected.ids)
    with pytest.raises(ModelError, match="raise rollout_memory"):
        rows_within(0.5 * bytes_per_token * tokens / 2**30, warm, tokens)
