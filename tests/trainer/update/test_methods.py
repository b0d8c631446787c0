"""Training with SofT-GRPO and Multiplex Thinking: log-probs, losses, and steps whose end was forced."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from support import oracle
from support import tolerances as tol
from support.oracle_loss import component_loss
from support.trainers import assert_same_gradients, even, gradients, grpo

from latent_grpo.update.loss import policy_advantages, response_mask
from latent_grpo.update.replay import replay, replay_logprob
from latent_grpo.update.statistics import GAP
from latent_kernels import group_advantages

SOFT = dict(method="soft_grpo", noise="two_sided", tau=0.1, temperature=1.0, margin_gradient="none")
MULTIPLEX = dict(method="multiplex", latent_top_p=1.0, temperature=1.0, latent_top_k=3)
COMPONENT = dict(MULTIPLEX, importance_sampling_level="component")
RUNS = {
    "soft": SOFT,
    "soft-gspo": dict(SOFT, loss_type="gspo"),
    "soft-rollout": dict(SOFT, old_logprobs="rollout"),
    "multiplex": MULTIPLEX,
    "multiplex-rollout": dict(MULTIPLEX, old_logprobs="rollout", loss_type="cispo"),
    "component": dict(COMPONENT, beta=0.1, importance_sampling_cap=2.0),
    "component-cispo": dict(COMPONENT, loss_type="cispo", entropy_coef=0.1),
}
COMMON = dict(first_token="all", invalid="keep", learning_rate=1e-4)
ALL_ROWS = torch.arange(16)


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_a_step_trains_on_log_probs_that_equal_the_sampled_ones(options, tokenizer, warm, tmp_path):
    trainer = grpo(tmp_path, tokenizer, even, warm, **{**COMMON, **options})
    batch, values = trainer.collect()
    assert batch.rollout.is_latent.any()
    values |= trainer.update(batch)
    assert values[GAP] < tol.FLOAT32 * 10
    assert values["grad_norm"] > 0
    assert ("latent/margin_crossed" in values) == (options["method"] == "soft_grpo")
    assert values["entropy"] > 0  # estimated or, for the bonus, computed
    before, after = (torch.nn.utils.parameters_to_vector(m.parameters()) for m in (warm, trainer.model))
    assert not torch.equal(before, after)


@pytest.mark.parametrize("options", [SOFT, MULTIPLEX], ids=["soft", "multiplex"])
def test_replayed_log_probs_equal_the_oracle(options, tokenizer, warm, tmp_path):
    trainer = grpo(tmp_path, tokenizer, even, warm, **{**COMMON, **options, "temperature": 0.7})
    rollout = trainer.collect()[0].rollout
    with torch.no_grad():
        logits = replay(warm, rollout)[rollout.mask] @ warm.get_output_embeddings().weight.T
        actual = replay_logprob(warm, rollout, 0.7, options["method"])[rollout.mask]
    ids, scores = rollout.ids[rollout.mask], rollout.scores[rollout.mask]
    expected = oracle.logprob(logits, ids, scores, temperature=0.7, method=options["method"])
    torch.testing.assert_close(actual.double(), expected.value, rtol=0, atol=10 * tol.FLOAT32)


def test_ratios_of_components_have_the_textbook_gradient(tokenizer, warm, tmp_path):
    results = []
    for split in (dict(), dict(per_device_train_batch_size=4, gradient_accumulation_steps=4)):
        trainer = grpo(tmp_path, tokenizer, even, warm, **{**COMMON, **COMPONENT, "delta": 1.5}, **split)
        batch, _ = trainer.collect()
        assert batch.old_logprob.shape == batch.rollout.ids.shape
        generator = torch.Generator().manual_seed(0)
        batch.old_logprob += 0.5 * torch.randn(batch.old_logprob.shape, generator=generator)  # so that ratios are cut
        stats = trainer.accumulate(batch, ALL_ROWS)
        results.append(gradients(trainer.model))
    assert_same_gradients(results[1], results[0])
    trainer.model.zero_grad()
    hidden = replay(trainer.model, batch.rollout)
    given: dict[str, Any] = dict(
        hidden=hidden,
        lm_head=trainer.model.get_output_embeddings().weight,
        ids=batch.rollout.ids,
        old_logprob=batch.old_logprob,
        ref_logprob=batch.old_logprob,
        advantages=batch.advantages,
        mask=batch.rollout.mask,
    )
    clips = dict(clip_low=0.2, clip_high=0.2, dual_clip=1.5, objective="clip")
    expected = component_loss(given, temperature=1.0, **clips)
    hidden.backward(expected.hidden.float())  # the head is tied to the frozen table
    assert 0.05 < stats["clip_fraction"] < 1
    assert stats["loss"] == pytest.approx(expected.loss, abs=tol.FLOAT32)
    assert stats["clip_fraction"] == pytest.approx(expected.stats["clip_fraction"], abs=0.01)  # of other micro-batches
    assert_same_gradients(results[1], gradients(trainer.model))


@pytest.mark.parametrize("loss_on", ["all", "latent", "text"])
def test_a_forced_end_marker_has_no_loss(loss_on, tokenizer, warm, tmp_path):
    trainer = grpo(tmp_path, tokenizer, even, warm, **COMMON, max_latent_steps=2, loss_on=loss_on)
    batch, _ = trainer.collect()
    rollout = batch.rollout
    whole = response_mask(rollout, loss_on)
    chosen = response_mask(rollout, loss_on, 2)
    forced = rollout.latent_steps == 2
    assert forced.any()
    assert (rollout.token[forced, 2] == trainer.sampling.end_token_id).all()
    expected = whole.clone()
    expected[forced, 2] = False
    assert torch.equal(chosen, expected)
    assert rollout.mask[forced, 2].all()  # the rollout itself keeps the step
    trainer.accumulate(batch, ALL_ROWS)
    actual = gradients(trainer.model)
    trainer.model.zero_grad()
    # The gradient does not depend on what would be learnt at the forced step.
    batch.advantages[forced, 2] = 100.0
    trainer.accumulate(batch, ALL_ROWS)
    assert torch.equal(gradients(trainer.model), actual)


def test_a_forced_end_marker_does_not_select_the_first_steps_response(tokenizer, warm, tmp_path):
    options = dict(first_token="best_of_group", invalid="keep", max_latent_steps=2)
    trainer = grpo(tmp_path, tokenizer, even, warm, **options)
    batch, _ = trainer.collect()
    rewards = torch.tensor([1.0, 1.0, 0.0, 0.0]).repeat(4)
    fixed = (trainer.args, batch.rollout, rewards, batch.group)
    before = policy_advantages(*fixed, batch.old_logprob)
    forced = (before[:, 0] > 0) & (batch.rollout.latent_steps == 2)
    assert forced.any()
    batch.old_logprob[forced, 2] = -torch.inf
    assert torch.equal(policy_advantages(*fixed, batch.old_logprob), before)


def test_a_run_below_its_limit_ends_by_choice(tokenizer, warm, tmp_path):
    rollout = grpo(tmp_path, tokenizer, even, warm, **COMMON).collect()[0].rollout
    longest = int(rollout.latent_steps.max())
    assert torch.equal(response_mask(rollout, "all", longest + 1), rollout.mask)
    assert torch.equal(response_mask(rollout, "all", 10_000), rollout.mask)


def test_options_of_advantages_reach_the_operator(tokenizer, warm, tmp_path, monkeypatch):
    calls = []

    def record(*tensors, **given):
        calls.append(given)
        return group_advantages(*tensors, **given)

    monkeypatch.setattr(sys.modules["latent_grpo.update.loss"], "group_advantages", record)
    grpo(tmp_path, tokenizer, even, warm).collect()
    grpo(tmp_path, tokenizer, even, warm, invalid="zero", winner_from="all", first_token="best_of_correct").collect()
    names = ("invalid", "first_token", "winner_from")
    assert [tuple(given[name] for name in names) for given in calls] == [
        ("exclude", "best_of_group", "valid"),
        ("zero", "best_of_correct", "all"),
    ]
