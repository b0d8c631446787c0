"""Every option of sampling, advantages, rewards and the KL reference changes what its help text says it changes."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from support.options import ROWS, metrics_of, record_calls

from latent_grpo.config import LatentSampling
from latent_grpo.model import body, embedding_table, end_marker_ids, lm_head, positions
from latent_grpo.prompts import encode_prompts
from latent_grpo.rollout import decoder
from latent_grpo.rollout.generate import generate_latent
from latent_grpo.update.replay import replay_logprob
from latent_kernels import latent_step_from_logits, latent_step_with_logits


@pytest.mark.parametrize(
    "options",
    [
        dict(latent_top_p=0.3),
        dict(tau=0.4),
        dict(noise_scale=0.25),
        dict(noise="two_sided"),
        dict(latent_top_k=3),
        dict(noise_delta=0.2),
        dict(end_rule="noisy"),
        dict(min_latent_steps=2),
        dict(max_latent_steps=3),
        dict(method="soft_grpo"),
    ],
    ids=str,
)
def test_options_of_the_latent_step_reach_every_step_of_a_rollout(options, make_trainer, monkeypatch):
    needed = {"noise": "two_sided"} if options == {"method": "soft_grpo"} else {}
    trainer = make_trainer("train", **needed, **options)
    calls = record_calls(monkeypatch, decoder, "decoding_step")
    trainer.collect()
    ((name, expected),) = options.items()
    # The operator calls them top_k and top_p.
    argument = name.removeprefix("latent_")
    assert len(calls) > 1
    assert {arguments[argument] for _, arguments, _ in calls} == {expected}


def sampling_of(tokenizer, **options) -> LatentSampling:
    """Return sampling options for short rollouts with the seed 5."""
    base = dict(
        latent_top_k=2,
        latent_top_p=0.9,
        max_new_tokens=4,
        end_token_id=end_marker_ids(tokenizer, "</think>")[0],
        eos_token_id=tokenizer.eos_token_id,
        seed=5,
    )
    return LatentSampling(**{**base, **options})


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(latent_top_p=0.1),
        dict(noise_scale=0.25),
        dict(noise="two_sided"),
        dict(noise="none"),
        dict(latent_top_k=4),
        dict(noise_delta=0.3),
        dict(method="soft_grpo", noise="two_sided", tau=0.1),
        dict(method="multiplex", latent_top_p=1.0, tau=float("inf")),
    ],
    ids=str,
)
def test_the_first_latent_step_of_a_rollout_is_that_of_the_operator(options, tokenizer, model):
    ids, mask = encode_prompts(tokenizer, [row["prompt"] for row in ROWS[:4]], model.device)
    sampling = sampling_of(tokenizer, **options)
    rollout = generate_latent(model, ids, mask, sampling, num_generations=2)
    with torch.no_grad():
        hidden = body(model, embedding_table(model)[ids], mask, positions(mask))[:, -1].repeat_interleave(2, 0)

    def operator(sampling):
        names = ("tau", "noise", "noise_scale", "noise_delta", "seed", "end_token_id", "method")
        return latent_step_from_logits(
            hidden @ lm_head(model).T,
            embedding_table(model),
            top_k=sampling.latent_top_k,
            top_p=sampling.latent_top_p,
            step=0,
            **{name: getattr(sampling, name) for name in names},
        )

    expected = operator(sampling)
    assert rollout.is_latent[:, 0].all()
    assert torch.equal(rollout.ids[:, 0], expected.ids)
    torch.testing.assert_close(rollout.scores[:, 0], expected.scores)
    if options:  # an option that changed nothing would pass the comparison above
        default = operator(sampling_of(tokenizer))
        assert default.scores.shape != expected.scores.shape or not torch.equal(default.scores, expected.scores)


def test_the_replay_mixes_with_the_temperature_of_the_rollout(make_trainer):
    trainer = make_trainer("train", tau=0.3)
    rollout = trainer.collect()[0].rollout
    with torch.no_grad():
        replayed, with_another_tau = (
            replay_logprob(trainer.model, recorded, trainer.args.temperature)
            for recorded in (rollout, replace(rollout, tau=1.0))
        )
    assert rollout.tau == 0.3
    torch.testing.assert_close(replayed, rollout.logprob, rtol=0, atol=1e-4)
    assert (with_another_tau - rollout.logprob).abs().max() > 1e-3


def logits_by_stream(calls) -> dict[tuple[int, int], tuple[int, torch.Tensor]]:
    """Return {(noise stream, step): (seed, logits)} of recorded calls of `decoding_step`."""
    recorded = {}
    for (hidden, head, table, _), arguments, _ in calls:
        logits = latent_step_with_logits(hidden, head, table, top_k=2, seed=0)[1]
        streams, steps = arguments["row_ids"].tolist(), arguments["step"].tolist()
        for row, key in enumerate(zip(streams, steps, strict=True)):
            recorded.setdefault(key, (int(arguments["seed"]), logits[row].clone()))
    return recorded


def test_noise_of_a_bfloat16_rollout_does_not_depend_on_the_batch(tokenizer, model, monkeypatch):
    """Logits in bfloat16 depend on the batch, so each step is compared with the operator on the step's own logits."""
    model = copy.deepcopy(model).bfloat16()
    ids, mask = encode_prompts(tokenizer, [row["prompt"] for row in ROWS[:4]], model.device)
    compared = 0
    for prompts in (slice(0, 4), slice(2, 3)):
        streams = torch.arange(8).view(4, 2)[prompts].flatten()
        with monkeypatch.context() as patch:
            calls = record_calls(patch, decoder, "decoding_step")
            rollout = generate_latent(
                model, ids[prompts], mask[prompts], sampling_of(tokenizer), num_generations=2, row_ids=streams
            )
        recorded = logits_by_stream(calls)
        for stream in (4, 5):  # the responses to prompt 2, which is in both batches
            row = streams.tolist().index(stream)
            for step in range(int(rollout.latent_steps[row])):
                seed, logits = recorded[stream, step]
                options = dict(top_k=2, top_p=0.9, seed=5, step=step, row_ids=torch.tensor([stream]))
                expected = latent_step_from_logits(logits.unsqueeze(0), embedding_table(model), **options)
                assert seed == 5
                assert torch.equal(rollout.ids[row, step], expected.ids[0])
                torch.testing.assert_close(rollout.scores[row, step], expected.scores[0])
                compared += 1
    assert compared >= 8


REWARDS = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 2.0])


def prepare_batch(trainer):
    """Return a batch whose two groups have the rewards REWARDS, with the advantages that the trainer computes."""
    return trainer.prepare(trainer.collector.sample(trainer.model).rollout, REWARDS)[0]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (dict(first_token="best_of_correct"), "the best and those below the mean"),
        (dict(first_token="best_of_group"), "the best"),
        (dict(first_token="all"), "all"),
        (dict(latent=False), "all"),
    ],
    ids=str,
)
def test_first_token_selects_the_responses_that_train_the_first_step(options, kept, make_trainer):
    batch = prepare_batch(make_trainer("train", **options))
    lengths = batch.rollout.mask.sum(-1)
    mean_logprob = ((batch.old_logprob * batch.rollout.mask).sum(-1) / lengths).view(2, 4)
    groups = REWARDS.view(2, 4)
    advantages = (groups - groups.mean(-1, keepdim=True)) / (groups.std(-1, keepdim=True) + 1e-6)
    expected = advantages.clone()
    for group, likelihood in zip(expected, mean_logprob, strict=True):
        positive = [i for i in range(4) if group[i] > 0]
        best = max(positive, key=lambda i: likelihood[i])
        for i in range(4):
            if i != best and (kept == "the best" or (kept != "all" and i in positive)):
                group[i] = 0.0
    torch.testing.assert_close(batch.advantages[:, 0], expected.flatten())
    torch.testing.assert_close(batch.advantages[:, 1], advantages.flatten())


@pytest.mark.parametrize("scale", ["none", "group"])
def test_advantages_are_divided_by_the_deviation_of_the_group_unless_scale_rewards_is_none(scale, make_trainer):
    batch = prepare_batch(make_trainer("train", scale_rewards=scale, first_token="all"))
    groups = REWARDS.view(2, 4)
    expected = groups - groups.mean(-1, keepdim=True)
    if scale == "group":
        expected /= groups.std(-1, keepdim=True) + 1e-6
    torch.testing.assert_close(batch.advantages, expected.view(8, 1).expand_as(batch.advantages))


@pytest.mark.parametrize(("weights", "expected"), [(None, 11.0), ([1.0, 2.0], 21.0), ([0.5, 0.0], 0.5)])
def test_the_reward_is_the_weighted_sum_of_the_reward_functions(weights, expected, make_trainer, tmp_path):
    functions = [lambda prompts, **columns: [1.0] * len(prompts), lambda prompts, **columns: [10.0] * len(prompts)]
    make_trainer("train", functions, reward_weights=weights).train()
    assert [row["reward"] for row in metrics_of(tmp_path / "run")] == [expected]


def test_the_reference_model_is_read_from_the_folder_and_is_not_trained(input_folder, model, make_trainer, tmp_path):
    options = dict(model=str(input_folder / "model"), max_steps=2, learning_rate=1e-2)
    trainer = make_trainer("train", beta=0.1, **options)
    trainer.train()
    first, second = metrics_of(tmp_path / "run")
    assert first["kl"] == pytest.approx(0.0, abs=1e-5)
    assert second["kl"] > 1e-4
    batch = prepare_batch(trainer)
    with torch.no_grad():
        initial, trained = (replay_logprob(m, batch.rollout, trainer.args.temperature) for m in (model, trainer.model))
    torch.testing.assert_close(batch.ref_logprob, initial, rtol=0, atol=1e-4)
    assert (trained - initial).abs().max() > 0.01
    assert make_trainer("train", beta=0.0, **options).reference is None
