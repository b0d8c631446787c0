"""Latent-GRPO as a whole: a step with either implementation of the operators, what it trains, what it reports."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from support import tolerances as tol
from support.kernels import NEEDS_TRITON
from support.trainers import even, grpo

from latent_grpo import LatentGRPOConfig, LatentGRPOTrainer
from latent_grpo.errors import ConfigError
from latent_grpo.rollout.trajectory import Rollout
from latent_grpo.update.statistics import GAP
from latent_kernels._dispatch import resolve

OPERATORS = ("decoding_step", "mix_embeddings", "latent_logprob", "group_advantages", "fused_policy_loss")


def step_with(impl: str, monkeypatch: pytest.MonkeyPatch, trainer: LatentGRPOTrainer) -> tuple[set[str], Rollout]:
    """Take one step with `impl` where the trainer asks for "auto". Return the operators it used, and the rollout."""
    used: set[str] = set()

    def choose(op: str, asked: str, *tensors: torch.Tensor, **options: str | None) -> str:
        assert asked == "auto", f"the trainer asks for impl={asked!r} of {op}"
        used.add(op)
        return resolve(op, impl, *tensors, **options)

    for name in OPERATORS:
        monkeypatch.setattr(sys.modules[f"latent_kernels.ops.{name}"], "resolve", choose)
    batch, _ = trainer.collect()
    trainer.update(batch)
    return used, batch.rollout


@NEEDS_TRITON
def test_a_training_step_is_the_same_with_eager_operators_and_kernels(tokenizer, warm, tmp_path, monkeypatch):
    options = dict(max_completion_length=5, generation_batch_size=8, beta=0.01, learning_rate=1e-4, loss_type="grpo")
    trainers, rollouts = [], []
    for impl in ("eager", "triton"):
        trainer = grpo(tmp_path, tokenizer, even, warm, max_steps=4, **options)
        with monkeypatch.context() as patch:
            used, rollout = step_with(impl, patch, trainer)
        assert used >= {*OPERATORS}
        trainers.append(trainer)
        rollouts.append(rollout)
    assert torch.equal(rollouts[0].ids, rollouts[1].ids)
    eager, kernels, before = (
        torch.nn.utils.parameters_to_vector(m.parameters()).detach()
        for m in (trainers[0].model, trainers[1].model, warm)
    )
    assert (eager - before).abs().max() > 5 * tol.TRAINING_STEP
    torch.testing.assert_close(kernels, eager, rtol=0, atol=tol.TRAINING_STEP)
    assert torch.linalg.vector_norm(kernels - eager) < 1e-3 * torch.linalg.vector_norm(eager - before)


def test_frozen_embeddings_stay_as_they_are_and_the_rest_is_trained(tokenizer, warm, tmp_path):
    trainer = grpo(tmp_path, tokenizer, even, warm, learning_rate=1e-2, invalid="keep")
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert not any("embed_tokens" in name for name in changed)


def test_text_mode_learns_a_reward_through_the_same_code(tokenizer, tmp_path):
    def likes_eos(completion_ids, **columns):
        return [1.0 if len(ids) < 8 else 0.0 for ids in completion_ids]

    sampling = dict(latent=False, top_k=0, top_p=1.0, temperature=1.0)
    size = dict(max_steps=25, generation_batch_size=64, per_device_train_batch_size=64)
    trainer = grpo(tmp_path, tokenizer, likes_eos, learning_rate=3e-3, invalid="keep", **sampling, **size)
    trainer.train()
    rewards = [json.loads(line)["reward"] for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2


def test_non_finite_gradients_are_skipped_and_counted(tokenizer, warm, tmp_path):
    trainer = grpo(tmp_path, tokenizer, even, warm, invalid="keep", max_steps=2)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    next(p for p in trainer.model.parameters() if p.requires_grad).register_hook(lambda grad: grad * float("nan"))
    with pytest.warns(UserWarning, match="update skipped"):
        values = trainer.train()
    assert values["skipped_updates"] == 2
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_a_step_reports_its_metrics(tokenizer, warm, tmp_path):
    grpo(tmp_path, tokenizer, even, warm).train()
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    of_rollout = ("reward", "reward_std", "groups_kept", "completions/mean_length", "latent/mean_length", "entropy")
    of_update = ("clip_ratio/region_mean", "latent/margin_crossed", "grad_norm", GAP)
    of_time = ("step_time", "time_rollout", "time_update", "tokens_per_second")
    for name in (*of_rollout, *of_update, *of_time):
        assert isinstance(row[name], float), name
    assert row[GAP] < 1e-4


def test_the_reference_model_is_made_only_for_a_penalty_and_stays_as_it_was(tokenizer, warm, tmp_path):
    assert grpo(tmp_path, tokenizer).reference is None
    trainer = grpo(tmp_path, tokenizer, even, warm, beta=0.1, max_steps=3, learning_rate=1e-2, invalid="keep")
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert abs(rows[0]["kl"]) < 1e-6
    assert rows[-1]["kl"] > 1e-5


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("tau", 0.0),
        ("latent_top_k", 1),
        ("generation_batch_size", 9),
        ("noise", "none"),
        ("temperature", 0.0),
        ("max_steps", 0),
        ("epsilon", -0.1),
        ("epsilon_high", -0.1),
        ("delta", 1.0),
        ("beta", -0.1),
        ("entropy_coef", -0.1),
        ("soft_punish_cache", 0),
        ("soft_punish_cache", 129),
    ],
)
def test_options_out_of_range_are_named(option, value):
    with pytest.raises(ConfigError, match=f"{option} is {value!r}"):
        LatentGRPOConfig(**{option: value})
