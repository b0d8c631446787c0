"""The loss of an update: every loss type against its formula, micro-batches, entropy bonus, scaling of rewards."""

from __future__ import annotations

import sys

import pytest
import torch
from support import tolerances as tol
from support.trainers import assert_same_gradients, even, gradients, grpo

from latent_grpo.update.loss import batch_std
from latent_grpo.update.replay import replay, replay_logprob
from latent_kernels import fused_policy_loss

ALL_ROWS = torch.arange(16)
COMPONENT = dict(method="multiplex", latent_top_p=1.0, importance_sampling_level="component")
FOUR_MICRO_BATCHES = dict(per_device_train_batch_size=4, gradient_accumulation_steps=4)


def test_micro_batches_give_the_gradient_of_the_whole_batch(tokenizer, warm, tmp_path):
    for loss_type in ("dapo", "grpo", "dr_grpo", "gspo", "cispo", "sapo", "luspo", "vespo"):
        results = []
        for split in ({}, FOUR_MICRO_BATCHES):
            options = dict(loss_type=loss_type, first_token="all", invalid="keep", **split)
            trainer = grpo(tmp_path, tokenizer, even, warm, **options)
            batch, _ = trainer.collect()
            trainer.accumulate(batch, ALL_ROWS)
            results.append(gradients(trainer.model))
        assert_same_gradients(results[1], results[0])


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"loss_type": "gspo", "beta": 0.1}], ids=str)
def test_a_rollout_of_one_micro_batch_is_replayed_once(tokenizer, warm, tmp_path, options):
    trainer = grpo(tmp_path, tokenizer, even, warm, invalid="keep", **options)
    batch, _ = trainer.collect()
    known = batch.hidden
    assert known is not None
    assert known.requires_grad
    order = torch.arange(15, -1, -1)
    trainer.accumulate(batch, order)
    once = gradients(trainer.model)
    assert batch.hidden is None  # a graph serves one backward pass
    torch.testing.assert_close(batch.old_logprob, trainer.logprobs(trainer.model, batch.rollout).detach())
    trainer.model.zero_grad()
    trainer.accumulate(batch, order)  # replays
    assert once.abs().max() > 0
    assert_same_gradients(once, gradients(trainer.model))


@pytest.mark.parametrize("options", [FOUR_MICRO_BATCHES, {"num_iterations": 2}, {"old_logprobs": "rollout"}], ids=str)
def test_other_rollouts_are_replayed_for_the_old_logprobs(tokenizer, warm, tmp_path, options):
    assert grpo(tmp_path, tokenizer, even, warm, **options).collect()[0].hidden is None


def textbook_loss(
    loss_type: str,
    logprob: torch.Tensor,
    old: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    size: int,
    limit: int,
) -> torch.Tensor:
    """Each loss type as its paper and TRL write it, on a clip range of 0.2 and 0.3, in micro-batches of `size`."""
    lengths = mask.sum(-1)
    ratio = (logprob - old).exp()
    if loss_type == "gspo":
        sequence = (((logprob - old) * mask).sum(-1) / lengths).exp()
        return torch.maximum(-advantages[:, 1] * sequence, -advantages[:, 1] * sequence.clamp(0.8, 1.3)).mean()
    if loss_type == "sapo":
        steep = torch.where(advantages > 0, 1.0, 1.05)
        soft = -advantages * (steep * (ratio - 1)).sigmoid() * 4 / steep
        return ((soft * mask).sum(-1) / lengths).mean()
    if loss_type == "vespo":
        whole = ((logprob - old) * mask).sum(-1, keepdim=True).exp().detach()
        weight = torch.where(advantages >= 0, whole**2 * (3 - 3 * whole).exp(), whole**3 * (2 - 2 * whole).exp())
        return -(weight * advantages * logprob * mask).sum() / mask.sum()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.3)) * mask
    if loss_type == "cispo":
        loss = -ratio.detach().clamp(max=1.3) * advantages * logprob * mask
    if loss_type == "bnpo":
        chunks = zip(loss.split(size), mask.split(size), strict=True)
        return sum(chunk.sum() / active.sum() for chunk, active in chunks) / (len(loss) // size)
    if loss_type == "luspo":
        return loss.sum(-1).mean()
    if loss_type == "grpo":
        return (loss.sum(-1) / lengths).mean()
    return loss.sum() / len(loss) / limit if loss_type == "dr_grpo" else loss.sum() / mask.sum()


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "bnpo", "gspo", "cispo", "sapo", "luspo", "vespo"])
def test_every_loss_type_is_the_textbook_formula(tokenizer, warm, tmp_path, loss_type):
    options = dict(loss_type=loss_type, first_token="all", invalid="keep", delta=None, margin_gradient="none")
    options["epsilon_high"] = 1.3 if loss_type == "cispo" else 0.3
    trainer = grpo(tmp_path, tokenizer, even, warm, **options, **FOUR_MICRO_BATCHES)
    batch, _ = trainer.collect()
    batch.old_logprob += 0.5 * torch.randn(batch.old_logprob.shape)  # so that ratios are clipped
    stats = trainer.accumulate(batch, ALL_ROWS)
    actual = gradients(trainer.model)
    trainer.model.zero_grad()
    logprob = replay_logprob(trainer.model, batch.rollout, trainer.args.temperature)
    loss = textbook_loss(loss_type, logprob, batch.old_logprob, batch.advantages, batch.rollout.mask, 4, 8)
    loss.backward()
    assert batch.rollout.mask.sum(-1).unique().numel() > 1  # or several of the means would be the same
    assert (0.1 < stats["clip_fraction"] < 1) == (loss_type not in ("sapo", "vespo"))
    assert stats["loss"] == pytest.approx(loss.item(), abs=tol.FLOAT32)
    assert_same_gradients(actual, gradients(trainer.model))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(), dict(ratio="token", objective="clip", clip_low=0.2, clip_high=0.2, dual_clip=3.0, kl_coef=0.0)),
        (dict(epsilon=0.1, epsilon_high=0.28, delta=4.0), dict(clip_low=0.1, clip_high=0.28, dual_clip=4.0)),
        (dict(epsilon=10.0, delta=None), dict(clip_low=1.0, clip_high=10.0)),
        (dict(loss_type="gspo"), dict(ratio="sequence", aggregation="seq-mean-token-mean")),
        (dict(importance_sampling_level="sequence"), dict(ratio="sequence", aggregation="token-mean")),
        (dict(epsilon=0.3, delta=1.1), dict(clip_high=pytest.approx(0.1), dual_clip=1.3)),
        (dict(delta=None), dict(clip_high=0.2, dual_clip=None)),
        (dict(loss_type="cispo"), dict(objective="cispo", clip_low=1.0, clip_high=-0.8)),
        (dict(loss_type="sapo", sapo_temperature_pos=2.0), dict(objective="sapo", sapo_temperatures=(2.0, 1.05))),
        (dict(loss_type="vespo", vespo_k_neg=2.5), dict(vespo_k=(2.0, 2.5), vespo_lambda=(3.0, 2.0))),
        (dict(loss_type="luspo"), dict(objective="clip", aggregation="seq-mean-token-sum")),
        (dict(use_bias_correction_kl=False), dict(kl_bias_correction=False)),
        (dict(loss_type="cispo", epsilon_high=2.5), dict(objective="cispo", clip_low=1.0, clip_high=1.5)),
        (dict(method="soft_grpo", noise="two_sided"), dict(method="soft_grpo", ratio="token")),
        (dict(COMPONENT, beta=0.1), dict(method="multiplex", ratio="component", kl_coef=0.1)),
        (dict(beta=0.1, kl_estimator="k2"), dict(kl_coef=0.1, kl_estimator="k2")),
        (dict(entropy_coef=0.01), dict(entropy_coef=0.01)),
        (dict(margin_gradient="released", temperature=0.9), dict(margin_gradient="released", temperature=0.9)),
    ],
    ids=str,
)
def test_options_of_the_loss_reach_the_operator(tokenizer, warm, tmp_path, monkeypatch, options, expected):
    calls = []

    def record(*tensors, **given):
        calls.append(given)
        return fused_policy_loss(*tensors, **given)

    trainer = grpo(tmp_path, tokenizer, even, warm, **options)
    monkeypatch.setattr(sys.modules["latent_grpo.update.loss"], "fused_policy_loss", record)
    batch, _ = trainer.collect()
    trainer.accumulate(batch, ALL_ROWS)
    assert {name: calls[0][name] for name in expected} == expected


@pytest.mark.parametrize("loss_type", ["dapo", "dr_grpo", "luspo"])
def test_the_entropy_bonus_is_a_mean_over_text_tokens_whatever_the_loss(tokenizer, warm, tmp_path, loss_type):
    by_coef = {}
    for coef in (0.0, 0.1):
        trainer = grpo(tmp_path, tokenizer, even, warm, loss_type=loss_type, entropy_coef=coef, **FOUR_MICRO_BATCHES)
        batch, _ = trainer.collect()
        trainer.accumulate(batch, ALL_ROWS)
        by_coef[coef] = gradients(trainer.model)
    trainer.model.zero_grad()
    rollout = batch.rollout
    logits = replay(trainer.model, rollout) @ trainer.model.get_output_embeddings().weight.T
    log_p = (logits / trainer.args.temperature).log_softmax(-1)
    text = rollout.mask & ~rollout.is_latent
    entropies = torch.where(text, -(log_p.exp() * log_p).sum(-1), 0.0)
    (-0.1 * sum(entropies[rows].sum() / text[rows].sum() for rows in ALL_ROWS.split(4)) / 4).backward()
    expected = gradients(trainer.model)
    assert expected.abs().max() > 0
    scale = float(by_coef[0.1].abs().max())  # of the gradients whose difference is taken
    torch.testing.assert_close(by_coef[0.1] - by_coef[0.0], expected, rtol=1e-3, atol=1e-5 * scale)
    assert trainer.update(batch)["entropy"] > 0


@pytest.mark.parametrize(("loss_type", "share"), [("dapo", 1.0), ("bnpo", 1.0), ("grpo", 0.5)])
def test_masked_truncated_responses_are_in_no_sum_and_in_no_denominator(tokenizer, warm, tmp_path, loss_type, share):
    """Of 16 responses 8 are cut off. A mean over tokens is that of the others, one over responses is half of theirs."""
    options = dict(loss_type=loss_type, invalid="keep", beta=0.1, mask_truncated_completions=True)
    trainer = grpo(tmp_path, tokenizer, even, warm, **options)
    batch, _ = trainer.collect()
    batch.rollout.finished[:] = ALL_ROWS >= 8
    trainer.accumulate(batch, ALL_ROWS)
    masked = gradients(trainer.model)
    trainer.model.zero_grad()
    trainer.accumulate(batch, ALL_ROWS[8:])
    assert_same_gradients(masked, share * gradients(trainer.model))


def test_the_losses_on_latent_and_on_text_steps_add_up_to_the_loss_on_all(tokenizer, warm, tmp_path):
    grads = {}
    for steps in ("all", "latent", "text"):
        trainer = grpo(tmp_path, tokenizer, even, warm, loss_on=steps, loss_type="dr_grpo", invalid="keep")
        batch, _ = trainer.collect()
        assert batch.rollout.is_latent.any()
        trainer.accumulate(batch, ALL_ROWS)
        grads[steps] = gradients(trainer.model)
    assert grads["latent"].abs().max() > 0
    assert_same_gradients(grads["latent"] + grads["text"], grads["all"])


@pytest.mark.parametrize("invalid", ["exclude", "zero", "keep"])
def test_rewards_may_be_scaled_by_the_deviation_of_the_batch(tokenizer, warm, tmp_path, invalid):
    trainer = grpo(tmp_path, tokenizer, even, warm, scale_rewards="batch", invalid=invalid, first_token="all")
    groups = trainer.collector.sample(trainer.full_model)
    rollout, rewards = groups.rollout, groups.rewards
    rollout.finished[::3] = False
    batch, _ = trainer.prepare(rollout, rewards)
    counted = rollout.finished if invalid == "exclude" else torch.ones(16, dtype=torch.bool)
    expected = torch.zeros(16)
    for group in torch.arange(16).split(4):
        members = group[counted[group]]
        expected[group] = rewards[group] - (rewards[members].mean() if len(members) > 1 else 0.0)
    expected /= rewards[counted].std() + 1e-6
    if invalid != "keep":
        expected[~rollout.finished] = 0.0
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(batch.advantages, expected.unsqueeze(-1).expand_as(batch.advantages))


def test_a_batch_with_one_reward_or_equal_rewards_divides_by_no_zero():
    one = torch.tensor([True, False, False])
    assert batch_std(torch.tensor([3.0, 1.0, 2.0]), one) == 1.0
    assert batch_std(torch.tensor([2.0, 2.0, 2.0]), one | True) == pytest.approx(1e-6)
