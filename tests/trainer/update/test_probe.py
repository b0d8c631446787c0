"""The probe of latent steps against a computation in float64 that shares no code with it, and its sample."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.rollouts import END, EOS, make_model
from support.trainers import even, grpo

from latent_grpo import LatentGRPOConfig, LatentSampling, Rollout, generate_latent
from latent_grpo.update.probe import RESPONSES, in_nucleus, sample_steps, start_probe

K, TOP_P = 4, 0.8


def config(**options) -> LatentGRPOConfig:
    """Return options whose nucleus holds more tokens than the mixture, and that replay five responses at a time."""
    base = dict(latent_top_k=K, latent_top_p=TOP_P, per_device_train_batch_size=5, logging_steps=3)
    return LatentGRPOConfig(**{**base, **options})


def sampled(model, args: LatentGRPOConfig, rows: int = 4) -> Rollout:
    """Return four responses of up to ten steps to each of `rows` prompts."""
    ids = torch.randint(50, 120, (rows, 5), generator=torch.Generator().manual_seed(1))
    shared = {name: getattr(args, name) for name in ("method", "noise", "noise_scale", "noise_delta", "tau")}
    options = LatentSampling(latent_top_k=K, latent_top_p=TOP_P, max_new_tokens=10, end_token_id=END, **shared)
    options = replace(options, eos_token_id=EOS, temperature=1.0, seed=5, max_latent_steps=6)
    return generate_latent(model, ids, torch.ones_like(ids), options, num_generations=4)


def drifted(model):
    """Return a copy of a model whose parameters have moved far."""
    torch.manual_seed(11)
    moved = copy.deepcopy(model)
    for parameter in moved.parameters():
        parameter.data += 2.0 * parameter.data.std() * torch.randn_like(parameter)
    return moved


def latent_logprobs(model, rollout: Rollout, row: int) -> list[list[float]]:
    """Return the log-probs over the vocabulary at each latent step of a response, in float64."""
    model = copy.deepcopy(model).double()
    table, vectors = model.get_input_embeddings().weight, []
    for ids, scores in zip(rollout.ids[row], rollout.scores[row].double(), strict=True):
        weights = [math.exp(float(score / rollout.tau)) for score in scores]
        vectors.append(sum(w / sum(weights) * table[i] for w, i in zip(weights, ids.tolist(), strict=True)))
    prompt = rollout.prompt_ids[rollout.prompt_index[row]]
    count = int(rollout.is_latent[row].sum())
    inputs = torch.cat([table[prompt], *(vector.unsqueeze(0) for vector in vectors[: count - 1])])
    logits = model(inputs_embeds=inputs.unsqueeze(0)).logits[0, len(prompt) - 1 :]
    return logits.log_softmax(-1).tolist()


def rank_and_mass(logprob: list[float], token: int) -> tuple[int, float]:
    """Return how many tokens come before one, and their probability."""
    before = [v for v, value in enumerate(logprob) if (-value, v) < (-logprob[token], token)]
    return len(before), sum(math.exp(logprob[v]) for v in before)


@pytest.mark.parametrize(
    "options",
    [
        dict(noise_scale=0.6),
        dict(noise_delta=0.2, noise_scale=0.5),
        dict(noise="two_sided"),
        dict(method="soft_grpo", noise="two_sided", tau=0.5),
    ],
    ids=str,
)
@torch.no_grad()
def test_metrics_are_those_of_a_direct_computation(options):
    args, model = config(**options), make_model("llama-tied")
    rollout = sampled(model, args)
    assert len(rollout.mask) == RESPONSES  # so the probe sees every latent step
    probe = start_probe(model, rollout, args, step=3)
    before, moved = copy.deepcopy(model), drifted(model)
    model.load_state_dict(moved.state_dict())  # the update, in place
    actual = probe()
    most = args.noise_scale * (3.0 if args.noise == "two_sided" else 4.5 + args.noise_delta)
    hits: dict[str, list[bool]] = {
        "latent/margins_not_positive": [],
        "latent/nucleus_overlap": [],
        "latent/upper_atom": [],
    }
    for row in range(RESPONSES):
        then, now = latent_logprobs(before, rollout, row), latent_logprobs(model, rollout, row)
        for t in range(int(rollout.is_latent[row].sum())):
            for token, score in zip(rollout.ids[row, t].tolist(), rollout.scores[row, t].tolist(), strict=True):
                position, mass = rank_and_mass(now[t], token)
                target = now[t][token]
                if args.method == "soft_grpo":  # of the probability among the components alone
                    together = sum(math.exp(now[t][other]) for other in rollout.ids[row, t].tolist())
                    target = math.log(math.exp(target) / together + 1e-6)
                hits["latent/margins_not_positive"].append(score - target <= 0)
                hits["latent/nucleus_overlap"].append(position < K or mass < TOP_P)
                hits["latent/upper_atom"].append(abs(score - then[t][token] - most) < 1e-3)
    expected = {name: sum(values) / len(values) for name, values in hits.items()}
    if args.method == "soft_grpo":
        del expected["latent/upper_atom"]
    assert actual == pytest.approx(expected, abs=1e-9)
    assert all(0 < value < 1 for value in expected.values()), expected


@torch.no_grad()
def test_the_sample_is_bounded_and_depends_on_the_step():
    model = make_model("llama-tied")
    rollout = sampled(model, config(), rows=10)
    samples = {}
    for step in (3, 6):
        sample, chosen = sample_steps(rollout, 20, step)
        again, same = sample_steps(rollout, 20, step)
        assert torch.equal(sample.token, again.token)
        assert torch.equal(chosen, same)
        assert len(sample.mask) == len(chosen) == RESPONSES
        assert len(sample.prompt_ids) == 4  # up to four responses to a prompt
        assert int(chosen.sum()) == 20
        assert bool(sample.is_latent[chosen].all())
        assert sample.mask.shape[1] <= 6  # text steps are not replayed
        samples[step] = sample
    assert not torch.equal(
        samples[3].prompt_ids[samples[3].prompt_index], samples[6].prompt_ids[samples[6].prompt_index]
    )
    assert int(sample_steps(rollout, 1000, 3)[1].sum()) < 1000


@torch.no_grad()
def test_there_is_no_probe_where_it_has_no_meaning():
    model = make_model("llama-tied")
    rollout = sampled(model, config())
    no_steps = replace(rollout, is_latent=torch.zeros_like(rollout.is_latent))
    multiplex = config(method="multiplex", latent_top_p=1.0)
    for args, responses, step in [
        (config(probe_steps=0), rollout, 3),
        (config(), rollout, 4),
        (config(latent=False), rollout, 3),
        (multiplex, rollout, 3),
        (config(), no_steps, 3),
    ]:
        assert start_probe(model, responses, args, step)() == {}
    assert start_probe(model, rollout, config(), 3)() != {}


@given(st.lists(st.integers(0, 4), min_size=2, max_size=8), st.floats(0.05, 1.0), st.integers(1, 3))
def test_the_nucleus_is_its_definition(levels, top_p, top_k):
    logprob = torch.tensor([levels], dtype=torch.float64).log_softmax(-1)
    every = torch.arange(len(levels)).unsqueeze(0)
    for token, kept in enumerate(in_nucleus(logprob, every, top_p, top_k)[0].tolist()):
        position, mass = rank_and_mass(logprob[0].tolist(), token)
        if abs(mass - top_p) > 1e-9:
            assert kept == (position < top_k or mass < top_p)


def test_a_run_logs_the_metrics_at_logged_steps_and_trains_the_same_without_them(tmp_path, tokenizer, warm):
    names = {f"latent/{name}" for name in ("margins_not_positive", "upper_atom", "nucleus_overlap")}
    rows, models = {}, {}
    for steps in (0, 5):
        run = grpo(tmp_path / str(steps), tokenizer, even, warm, max_steps=4, logging_steps=2, probe_steps=steps)
        run.train()
        lines = (tmp_path / str(steps) / "run" / "metrics.jsonl").read_text().splitlines()
        rows[steps], models[steps] = [json.loads(line) for line in lines], run.model
    assert [row["step"] for row in rows[5]] == [2, 4]
    for without, probed in zip(rows[0], rows[5], strict=True):
        assert probed.keys() - without.keys() == names
        assert all(0 <= probed[name] <= 1 for name in names)
        assert probed["reward"] == without["reward"]
        assert probed["loss"] == without["loss"]
    for a, b in zip(models[0].parameters(), models[5].parameters(), strict=True):
        assert torch.equal(a, b)
