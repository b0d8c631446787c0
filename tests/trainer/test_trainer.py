"""Latent-SFT and Latent-GRPO as whole: losses, switches, metrics, what is learned."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from support import tolerances as tol
from support.kernels import NEEDS_TRITON
from support.trainers import ROWS, even, gradients, grpo

from latent_grpo import LatentGRPOConfig, LatentGRPOTrainer, LatentSFTConfig, LatentSFTTrainer
from latent_grpo.config import ConfigError
from latent_grpo.data.rows import DataError
from latent_grpo.model import ModelError, check_compatible
from latent_grpo.quickstart.toy_task import FORGOTTEN, ToyTask, make_model, make_problems, worked_examples
from latent_grpo.rollout.trajectory import Rollout
from latent_grpo.sft import build_examples, collate, gold_chain_accuracy, gumbel_noise, input_mixtures, target_loss
from latent_grpo.update.loss import batch_std
from latent_grpo.update.replay import replay, replay_logprob
from latent_kernels import fused_policy_loss
from latent_kernels._dispatch import resolve


def test_held_out_problems_are_disjoint_and_answers_are_the_last_total():
    rows = make_problems(300, seed=5)
    assert len({row["prompt"] for row in rows}) == 300
    other = make_problems(100, seed=6, exclude={row["prompt"] for row in rows})
    assert not {row["prompt"] for row in rows} & {row["prompt"] for row in other}
    for row in rows:
        assert row["chain"].split()[-1] == row["answer"]
        assert len(row["chain"].split()) % 2 == 0


def test_careless_examples_forget_the_last_change_and_no_other():
    problems = make_problems(2000, seed=0)
    examples = worked_examples(problems, seed=1)
    assert examples == worked_examples(problems, seed=1)
    forgotten = 0
    for true, worked in zip(problems, examples, strict=True):
        assert worked["prompt"] == true["prompt"]
        if worked != true:
            forgotten += 1
            *before, last = true["chain"].split()
            assert worked["chain"].split() == [*before, before[-1]]
            assert worked["answer"] == before[-1] != last
    assert abs(forgotten / 2000 - FORGOTTEN) < 0.05  # four standard deviations of the share


def test_a_toy_task_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="max_total"):
        ToyTask(max_operand=9, max_total=10)


def test_tokenizer_and_model_survive_saving(tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = make_model(tokenizer, seed=0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = ROWS[0]["prompt"] + " </think> 12"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_sft_targets_are_groups_of_chain_tokens(tokenizer):
    args = LatentSFTConfig(compression=2, answer_template="{answer}")
    row = {"prompt": "Mia has 3 coins.", "chain": "3 7 5", "answer": "5"}
    (example,) = build_examples(tokenizer, [row], args)
    ids = tokenizer.convert_tokens_to_ids
    assert example.response == [[ids("3"), ids("7")], [ids("5")], [ids("</think>")], [ids("5")], [ids("<eos>")]]
    batch = collate([example], torch.device("cpu"))
    table = torch.randn(len(tokenizer), 4, generator=torch.Generator().manual_seed(0))
    mixtures = input_mixtures(batch, table)
    start = len(example.prompt)
    torch.testing.assert_close(mixtures[0, start], (table[ids("3")] + table[ids("7")]) / 2)
    torch.testing.assert_close(mixtures[0, start + 1], table[ids("5")])


def test_noise_of_a_warm_start_does_not_depend_on_the_batch(tokenizer):
    examples = build_examples(tokenizer, make_problems(6, seed=3), LatentSFTConfig(answer_template="{answer}"))
    together, alone = (collate(chosen, torch.device("cpu")) for chosen in (examples, examples[4:5]))
    noise, own = (gumbel_noise(batch, seed=7, step=2) for batch in (together, alone))
    count = len(examples[4].response)
    start, own_start = (int(batch.response.int().argmax(-1)[row]) for batch, row in ((together, 4), (alone, 0)))
    width = own.shape[-1]
    assert torch.equal(noise[4, start : start + count, :width], own[0, own_start : own_start + count])
    latent = noise[together.weights > 0]
    assert -1.5 <= latent.min() < latent.max() <= 3.0
    for other in (gumbel_noise(together, seed=8, step=2), gumbel_noise(together, seed=7, step=3)):
        assert not torch.equal(other, noise)
    table = torch.randn(len(tokenizer), 4, generator=torch.Generator().manual_seed(0))
    plain, perturbed = input_mixtures(together, table), input_mixtures(together, table, 0.5, 7, 2)
    several = (together.weights > 0).sum(-1) > 1
    assert not torch.equal(plain[several], perturbed[several])
    assert torch.equal(plain[~several], perturbed[~several])


def test_sft_loss_is_the_divergence_to_the_target_and_its_gradient_is_right():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 6, generator=generator, requires_grad=True)
    head = torch.randn(11, 6, generator=generator)
    ids = torch.tensor([[2, 5], [4, 4], [7, 0]])
    weights = torch.tensor([[0.5, 0.5], [0.5, 0.5], [1.0, 0.0]])
    loss = target_loss(hidden, head, ids, weights)
    log_probs = (hidden @ head.T).log_softmax(-1)
    expected = -log_probs[1, 4] - log_probs[2, 7]
    expected = expected + 0.5 * (torch.log(torch.tensor(0.5)) - log_probs[0, 2])
    expected = expected + 0.5 * (torch.log(torch.tensor(0.5)) - log_probs[0, 5])
    torch.testing.assert_close(loss, expected)
    got, wanted = (torch.autograd.grad(value, hidden, retain_graph=True)[0] for value in (loss, expected))
    torch.testing.assert_close(got, wanted)


def test_sft_learns_and_saves(tokenizer, tmp_path):
    args = LatentSFTConfig(
        output_dir=str(tmp_path / "sft"), max_steps=25, learning_rate=3e-3, per_device_train_batch_size=32,
        answer_template="{answer}", max_completion_length=16,
    )  # fmt: skip
    LatentSFTTrainer(make_model(tokenizer, seed=0), args, ROWS, tokenizer).train()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "sft" / "metrics.jsonl").open()]
    assert losses[-1] < 0.7 * losses[0]
    assert (tmp_path / "sft" / "model.safetensors").exists()


def test_sft_without_a_chain_says_so(tokenizer):
    with pytest.raises(DataError, match="chain"):
        build_examples(tokenizer, [{"prompt": "a", "answer": "1"}], LatentSFTConfig())


def step_with(impl: str, monkeypatch: pytest.MonkeyPatch, trainer: LatentGRPOTrainer) -> tuple[set[str], Rollout]:
    """A rollout and its update with `impl` where the trainer asks for "auto". Which operators ran so; the rollout."""
    used: set[str] = set()

    def choose(op: str, asked: str, *tensors: torch.Tensor, **options: str | None) -> str:
        assert asked == "auto", f"the trainer asks for impl={asked!r} of {op}"
        used.add(op)
        return resolve(op, impl, *tensors, **options)

    for name in ("latent_step", "mix_embeddings", "latent_logprob", "group_advantages", "fused_policy_loss"):
        monkeypatch.setattr(sys.modules[f"latent_kernels.ops.{name}"], "resolve", choose)
    batch, _ = trainer.collect()
    trainer.update(batch)
    return used, batch.rollout


@NEEDS_TRITON
def test_a_training_step_is_the_same_with_eager_operators_and_kernels(tokenizer, warm, tmp_path, monkeypatch):
    trainers, rollouts = [], []
    for impl in ("eager", "triton"):
        trainer = grpo(
            tmp_path, tokenizer, even, warm, max_completion_length=5, generation_batch_size=8, beta=0.01, max_steps=4,
            learning_rate=1e-4, loss_type="grpo",
        )  # fmt: skip
        with monkeypatch.context() as patch:
            used, rollout = step_with(impl, patch, trainer)
        assert {"latent_step", "mix_embeddings", "group_advantages", "fused_policy_loss"} <= used
        assert {"latent_logprob", "latent_logprob_from_logits"} <= used
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


def test_micro_batches_give_the_gradient_of_the_whole_batch(tokenizer, warm, tmp_path):
    for loss_type in ("dapo", "grpo", "dr_grpo", "gspo", "cispo"):
        found = []
        for size in (16, 4):
            trainer = grpo(
                tmp_path, tokenizer, even, warm, loss_type=loss_type, first_token="all",
                per_device_train_batch_size=size, gradient_accumulation_steps=16 // size, invalid="keep",
            )  # fmt: skip
            batch, _ = trainer.collect()
            trainer.accumulate(batch, torch.arange(16))
            found.append(gradients(trainer.model))
        assert found[0].abs().max() > 0
        torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5 * float(found[0].abs().max()))


def textbook_loss(loss_type, logprob, old, advantages, mask, size, limit) -> torch.Tensor:
    """Each loss type as its paper and TRL write it, on a clip range of 0.2 and 0.3, in micro-batches of `size`."""
    lengths = mask.sum(-1)
    ratio = (logprob - old).exp()
    if loss_type == "gspo":
        sequence = (((logprob - old) * mask).sum(-1) / lengths).exp()
        return torch.maximum(-advantages[:, 1] * sequence, -advantages[:, 1] * sequence.clamp(0.8, 1.3)).mean()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.3)) * mask
    if loss_type == "cispo":
        loss = -ratio.detach().clamp(max=1.3) * advantages * logprob * mask
    if loss_type == "bnpo":
        parts = zip(loss.split(size), mask.split(size), strict=True)
        return sum(part.sum() / active.sum() for part, active in parts) / (len(loss) // size)
    return {
        "dapo": loss.sum() / mask.sum(), "cispo": loss.sum() / mask.sum(), "grpo": (loss.sum(-1) / lengths).mean(),
        "dr_grpo": loss.sum() / len(loss) / limit,
    }[loss_type]  # fmt: skip


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "bnpo", "gspo", "cispo"])
def test_every_loss_type_is_the_textbook_formula(tokenizer, warm, tmp_path, loss_type):
    trainer = grpo(
        tmp_path, tokenizer, even, warm, loss_type=loss_type, first_token="all", invalid="keep", delta=None,
        margin_gradient="none", epsilon_high=1.3 if loss_type == "cispo" else 0.3, per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
    )  # fmt: skip
    batch, _ = trainer.collect()
    batch.old_logprob += 0.5 * torch.randn(batch.old_logprob.shape)
    stats = trainer.accumulate(batch, torch.arange(16))
    got = gradients(trainer.model)
    trainer.model.zero_grad()
    logprob = replay_logprob(trainer.model, batch.rollout, trainer.args.temperature)
    loss = textbook_loss(loss_type, logprob, batch.old_logprob, batch.advantages, batch.rollout.mask, 4, 8)
    loss.backward()
    expected = gradients(trainer.model)
    assert batch.rollout.mask.sum(-1).unique().numel() > 1  # or several of the means would be the same
    assert 0.1 < stats["clip_fraction"] < 1
    assert stats["loss"] == pytest.approx(loss.item(), abs=tol.FLOAT32)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(), dict(ratio="token", objective="clip", clip_low=0.2, clip_high=0.2, dual_clip=3.0, kl_coef=0.0)),
        (dict(epsilon=0.1, epsilon_high=0.28, delta=4.0), dict(clip_low=0.1, clip_high=0.28, dual_clip=4.0)),
        (dict(loss_type="gspo"), dict(ratio="sequence", aggregation="seq-mean-token-mean")),
        (dict(importance_sampling_level="sequence"), dict(ratio="sequence", aggregation="token-mean")),
        (dict(loss_type="cispo"), dict(objective="cispo", clip_low=1.0, clip_high=4.0)),
        (dict(loss_type="cispo", epsilon_high=2.5), dict(objective="cispo", clip_low=1.0, clip_high=1.5)),
        (dict(beta=0.1, kl_estimator="k2"), dict(kl_coef=0.1, kl_estimator="k2")),
        (dict(entropy_coef=0.01), dict(entropy_coef=0.01)),
        (dict(margin_gradient="released", temperature=0.9), dict(margin_gradient="released", temperature=0.9)),
    ],
    ids=str,
)
def test_options_of_the_loss_reach_the_operator(tokenizer, warm, tmp_path, monkeypatch, options, expected):
    seen = []
    operator = fused_policy_loss

    def record(*tensors, **given):
        seen.append(given)
        return operator(*tensors, **given)

    trainer = grpo(tmp_path, tokenizer, even, warm, **options)
    monkeypatch.setattr(sys.modules["latent_grpo.update.loss"], "fused_policy_loss", record)
    batch, _ = trainer.collect()
    trainer.accumulate(batch, torch.arange(16))
    assert {name: seen[0][name] for name in expected} == expected


def test_the_entropy_bonus_is_a_mean_over_text_tokens_as_the_loss_is(tokenizer, warm, tmp_path):
    found = {}
    for coef in (0.0, 0.1):
        trainer = grpo(
            tmp_path, tokenizer, even, warm, entropy_coef=coef, per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
        )  # fmt: skip
        batch, _ = trainer.collect()
        trainer.accumulate(batch, torch.arange(16))
        found[coef] = gradients(trainer.model)
    trainer.model.zero_grad()
    rollout = batch.rollout
    logits = replay(trainer.model, rollout) @ trainer.model.get_output_embeddings().weight.T
    log_p = (logits / trainer.args.temperature).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)[rollout.mask & ~rollout.is_latent].sum() / rollout.mask.sum()
    (-0.1 * entropy).backward()
    expected = gradients(trainer.model)
    assert expected.abs().max() > 0
    torch.testing.assert_close(
        found[0.1] - found[0.0], expected, rtol=1e-3, atol=1e-5 * float(found[0.1].abs().max())
    )  # fmt: skip
    assert trainer.update(batch)["entropy"] > 0


@pytest.mark.parametrize("invalid", ["exclude", "zero", "keep"])
def test_rewards_may_be_scaled_by_the_deviation_of_the_batch(tokenizer, warm, tmp_path, invalid):
    trainer = grpo(tmp_path, tokenizer, even, warm, scale_rewards="batch", invalid=invalid, first_token="all")
    found = trainer.collector.sample(trainer.full_model)
    rollout, rewards = found.rollout, found.rewards
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


def test_the_deviation_of_a_batch_with_one_reward_or_equal_ones_is_no_obstacle():
    one = torch.tensor([True, False, False])
    assert batch_std(torch.tensor([3.0, 1.0, 2.0]), one) == 1.0
    assert batch_std(torch.tensor([2.0, 2.0, 2.0]), one | True) == pytest.approx(1e-6)


def test_long_responses_are_punished_softly(tokenizer, warm, tmp_path):
    trainer = grpo(tmp_path, tokenizer, ["soft_overlong"], warm, soft_punish_cache=4)
    found = trainer.collector.sample(trainer.full_model)
    rollout, rewards = found.rollout, found.rewards
    assert rewards.unique().numel() > 1
    assert rewards.tolist() == [-max(0, length - 4) / 4 for length in rollout.lengths.tolist()]


def test_loss_on_latent_and_text_steps_add_up_to_all(tokenizer, warm, tmp_path):
    grads = {}
    for part in ("all", "latent", "text"):
        trainer = grpo(tmp_path, tokenizer, even, warm, loss_on=part, loss_type="dr_grpo", invalid="keep")
        batch, _ = trainer.collect()
        assert batch.rollout.is_latent.any()
        trainer.accumulate(batch, torch.arange(16))
        grads[part] = gradients(trainer.model)
    assert grads["latent"].abs().max() > 0
    torch.testing.assert_close(
        grads["latent"] + grads["text"], grads["all"], rtol=1e-3, atol=1e-5 * float(grads["all"].abs().max())
    )


def test_embeddings_stay_as_they_are(tokenizer, warm, tmp_path):
    trainer = grpo(tmp_path, tokenizer, even, warm, learning_rate=1e-2, invalid="keep")
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert not any("embed_tokens" in name for name in changed)


def test_text_mode_learns_a_reward_through_the_same_code(tokenizer, tmp_path):
    def likes_eos(completion_ids, **kwargs):
        return [1.0 if len(ids) < 8 else 0.0 for ids in completion_ids]

    trainer = grpo(
        tmp_path, tokenizer, likes_eos, latent=False, max_steps=25, learning_rate=3e-3, generation_batch_size=64,
        per_device_train_batch_size=64, invalid="keep", top_k=0, top_p=1.0, temperature=1.0,
    )  # fmt: skip
    trainer.train()
    rewards = [json.loads(line)["reward"] for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2


def test_groups_that_agree_are_dropped_and_sampled_again(tokenizer, tmp_path):
    calls = []

    def reward(prompts, completions, **kwargs):
        calls.append(len(prompts))
        return [float(i % 4 == 0) if i < 8 else 1.0 for i in range(len(prompts))]  # two of four groups disagree

    trainer = grpo(tmp_path, tokenizer, reward, group_filter=True, max_generation_batches=5)
    batch, values = trainer.collect()
    assert len(calls) == 2
    assert values["groups_kept"] == 0.5
    assert len(batch.rewards) == 16
    assert (batch.rewards.view(4, 4).std(-1) > 0).all()


def test_an_exhausted_filter_warns_and_trains_on_what_there_is(tokenizer, tmp_path):
    trainer = grpo(
        tmp_path, tokenizer, lambda prompts, **kw: [1.0] * len(prompts), group_filter=True, max_generation_batches=2
    )
    with pytest.warns(UserWarning, match="0 of 4 groups after 2"):
        values = trainer.train()
    assert values["loss"] == 0.0


def test_non_finite_gradients_are_skipped_and_counted(tokenizer, warm, tmp_path):
    trainer = grpo(tmp_path, tokenizer, even, warm, invalid="keep", max_steps=2)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    next(p for p in trainer.model.parameters() if p.requires_grad).register_hook(lambda g: g * float("nan"))
    with pytest.warns(UserWarning, match="update skipped"):
        values = trainer.train()
    assert values["skipped_updates"] == 2
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_metrics_of_a_step(tokenizer, warm, tmp_path):
    grpo(tmp_path, tokenizer, even, warm).train()
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    for name in (
        "reward", "reward_std", "groups_kept", "response_length", "latent_length", "latent_share", "mixture_entropy",
        "clip_fraction", "margin_crossed", "grad_norm", "logprob_gap", "time_rollout", "time_update",
        "tokens_per_second",
    ):  # fmt: skip
        assert isinstance(row[name], float), name
    assert "entropy" not in row  # which is not computed without a bonus
    assert row["logprob_gap"] < 1e-4


def test_the_reference_model_is_loaded_only_for_a_penalty(tokenizer, warm, tmp_path):
    assert grpo(tmp_path, tokenizer).reference is None
    trainer = grpo(tmp_path, tokenizer, even, warm, beta=0.1, max_steps=3, learning_rate=1e-2, invalid="keep")
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert abs(rows[0]["kl"]) < 1e-6
    assert rows[-1]["kl"] > 1e-5


def test_reading_out_of_the_gold_chain_is_zero_before_training(tokenizer):
    examples = build_examples(tokenizer, ROWS, LatentSFTConfig(answer_template="{answer}"))
    assert gold_chain_accuracy(make_model(tokenizer, seed=0), examples) < 0.2


def test_models_that_do_more_than_a_product_are_refused(tokenizer):
    model = make_model(tokenizer, seed=0)
    head = model.get_output_embeddings()
    model.set_output_embeddings(torch.nn.Linear(head.in_features, head.out_features, bias=True))
    with pytest.raises(ModelError, match="biased head"):
        check_compatible(model)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("tau", 0.0),
        ("latent_top_k", 1),
        ("generation_batch_size", 9),
        ("noise", "none"),
        ("temperature", 0.0),
        ("max_steps", 0),
        ("epsilon", 1.5),
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


def test_a_cispo_weight_is_not_a_distance_from_one():
    with pytest.raises(ConfigError, match=r"epsilon_high is 0\.28: cispo"):
        LatentGRPOConfig(loss_type="cispo", epsilon_high=0.28)


def test_sampling_options_reach_the_rollout():
    config = LatentGRPOConfig(latent_top_k=3, tau=0.5, max_completion_length=7)
    assert replace(config.sampling(), seed=1).latent_top_k == 3
    assert config.sampling().max_new_tokens == 7
