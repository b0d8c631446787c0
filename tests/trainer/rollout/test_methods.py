"""Rollouts of every method and end rule, and the bounds of a latent run."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support.rollouts import END, EOS, ending_early, make_model
from support.trainers import rollout_of

from latent_grpo import LatentSampling, generate_latent
from latent_grpo.errors import ConfigError
from latent_grpo.model import embedding_table
from latent_grpo.rollout import decoder
from latent_grpo.rollout.trajectory import mixture_entropy
from latent_grpo.update.replay import replay_logprob
from latent_kernels import mix_embeddings

RULES = {
    "soft_grpo": dict(method="soft_grpo", noise="two_sided", tau=0.1, end_rule="noisy"),
    "soft_grpo-without-noise": dict(method="soft_grpo", noise="none", tau=0.1),
    "multiplex": dict(method="multiplex", latent_top_p=1.0, end_rule="noisy"),
    "multiplex-averaged": dict(method="multiplex", latent_top_p=1.0, tau=float("inf")),
    "multiplex-without-noise": dict(method="multiplex", latent_top_p=1.0, noise="none"),
    "noisy-end": dict(end_rule="noisy", noise_delta=0.2),
    "bounded": dict(min_latent_steps=3, max_latent_steps=5),
}


@pytest.fixture(scope="module")
def model():
    return make_model("llama-tied")


@pytest.mark.parametrize("options", RULES.values(), ids=RULES)
def test_a_rollout_can_be_replayed_by_its_record(options, model, prompts, monkeypatch):
    steps, function = [], decoder.decoding_step

    def step(hidden, head, table, given, **options):
        result = function(hidden, head, table, given, **options)
        steps.append((given.row_ids.clone(), given.step.clone(), result))
        return result

    sampling = ending_early(model, prompts, **options)
    monkeypatch.setattr(decoder, "decoding_step", step)
    rollout = generate_latent(model, *prompts, sampling, num_generations=4)
    assert rollout.is_latent.any()
    assert (rollout.mask & ~rollout.is_latent).any()
    assert rollout.logprob.dtype == rollout.scores.dtype == torch.float32
    gap = (replay_logprob(model, rollout, 1.0, sampling.method) - rollout.logprob)[rollout.mask].abs().max()
    assert gap < 1e-4
    mixed = mix_embeddings(
        rollout.ids.flatten(0, 1), rollout.scores.flatten(0, 1), embedding_table(model), tau=rollout.tau
    )
    mixed = mixed.view(*rollout.mask.shape, -1)
    compared = 0
    for rows, numbers, result in steps:
        latent = result.is_latent
        if latent.any():
            torch.testing.assert_close(mixed[rows[latent], numbers[latent]], result.embedding[latent])
            compared += int(latent.sum())
    assert compared == int(rollout.latent_steps.sum())


def test_bounds_of_the_latent_run(model, prompts):
    sampling = ending_early(model, prompts)
    free = generate_latent(model, *prompts, sampling, num_generations=4)
    assert free.latent_steps.min() < 3
    assert free.latent_steps.max() > 4
    bounded = generate_latent(
        model, *prompts, replace(sampling, min_latent_steps=3, max_latent_steps=4), num_generations=4
    )
    assert set(bounded.latent_steps.tolist()) == {3, 4} or set(bounded.latent_steps.tolist()) == {4}
    after = bounded.latent_steps.unsqueeze(-1)
    assert (bounded.token.gather(1, after) == sampling.end_token_id).all(), "a run ends with the end marker"
    assert (bounded.ids.gather(1, after.unsqueeze(-1).expand(-1, -1, 2))[..., 1] == -100).all()
    same = free.latent_steps == bounded.latent_steps  # rows that the bounds did not touch
    assert torch.equal(free.ids[same & (free.latent_steps == 3)], bounded.ids[same & (free.latent_steps == 3)])


def test_the_noisy_rule_ends_runs_by_the_sampled_mixture(model, prompts):
    sampling = LatentSampling(
        latent_top_k=4,
        max_new_tokens=10,
        end_token_id=END,
        eos_token_id=EOS,
        method="multiplex",
        latent_top_p=1.0,
        seed=5,
    )
    free = generate_latent(model, *prompts, sampling, num_generations=4)
    end = int(free.ids[0, 1, 0])  # the first draw of row 0 at step 1
    sampling = replace(sampling, end_token_id=end, end_rule="noisy")
    ended = generate_latent(model, *prompts, sampling, num_generations=4)
    drawn = (free.ids[..., 0] == end) & free.is_latent
    first = torch.where(drawn.any(-1), drawn.long().argmax(-1), free.latent_steps)
    assert int(ended.latent_steps[0]) <= 1
    assert torch.equal(ended.latent_steps, first)


def test_the_entropy_of_a_mixture_adds_up_repeated_ids():
    ids = torch.tensor([[7, 7, 7, 7], [3, 5, 3, 3], [1, 2, 3, 4]]).unsqueeze(0)
    rollout = replace(
        rollout_of([3], [0]), ids=ids, scores=torch.zeros(1, 3, 4), is_latent=torch.ones(1, 3).bool(), tau=float("inf")
    )
    expected = [0.0, -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), math.log(4)]
    torch.testing.assert_close(mixture_entropy(rollout), torch.tensor([expected]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(method="multiplex"), "latent_top_p is 0.95: method multiplex draws from all tokens; give 1"),
        (
            dict(noise="two_sided", noise_delta=0.1),
            "noise_delta is 0.1: it needs noise one_sided, not two_sided; give 0",
        ),
        (dict(min_latent_steps=5, max_latent_steps=4), "min_latent_steps is 5: give at most max_latent_steps 4"),
        (dict(max_latent_steps=128), "max_latent_steps is 128: a response has at most 128 steps; give less"),
        (dict(min_latent_steps=128), "min_latent_steps is 128: a response has at most 128 steps; give less"),
        (dict(max_latent_steps=0), "max_latent_steps is 0: give a number, 1 or more"),
        (dict(noise_delta=-0.1), "noise_delta is -0.1: give a number, 0 or more"),
        (dict(method="grpo"), "method is 'grpo': choose from latent_grpo, soft_grpo, multiplex"),
        (dict(end_rule="soft"), "end_rule is 'soft': choose from raw, noisy"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ConfigError) as error:
        LatentSampling(**options).check()
    assert message in str(error.value)


def test_options_of_latent_steps_do_not_bind_text():
    LatentSampling(latent=False, method="multiplex", min_latent_steps=5, max_latent_steps=4).check()
