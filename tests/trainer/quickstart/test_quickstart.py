"""The quickstart from end to end, with a few steps a phase, and that latent steps alone can learn."""

from __future__ import annotations

import json

import pytest
import torch

from latent_grpo.errors import ConfigError
from latent_grpo.quickstart.run import LATENT_ONLY, quickstart
from latent_kernels import group_advantages, latent_logprob_from_logits, latent_step_from_logits


def test_quickstart_writes_what_it_promises_from_the_same_start(short_quickstart, tmp_path, capsys):
    summaries = {}
    for loss_on, world in ((None, "graph"), ("latent", "graph"), ("text", "arithmetic")):
        out = tmp_path / str(loss_on)
        summaries[loss_on] = quickstart(out, seed=3, loss_on=loss_on, world=world)
        assert json.loads((out / "summary.json").read_text()) == summaries[loss_on]
        phases = [json.loads(line)["phase"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert set(phases) >= {"sft", "train"}
        assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
        for model in ("latent-sft", "latent-grpo"):
            assert (out / model / "model.safetensors").is_file()
            assert (out / model / "tokenizer.json").is_file()
    for summary in summaries.values():
        assert summary["seed"] == 3
        assert summary["seconds"] > 0
        for phase in ("latent_sft", "latent_grpo"):
            assert summary[phase]["problems"] == 40
            assert 0 <= summary[phase]["pass_at_1"] <= 1
            assert summary[phase]["reasoning_steps"] >= 0
        assert 0 <= summary["latent_sft"]["gold_chain_accuracy"] <= 1
    both, latent = summaries[None], summaries["latent"]
    assert both["latent_sft"] == latent["latent_sft"]
    assert both[LATENT_ONLY] == latent["latent_grpo"]  # from the same start, on the same streams
    assert LATENT_ONLY not in latent
    shown = capsys.readouterr().out
    assert "with the loss on latent steps only" in " ".join(shown.split())  # a console breaks lines
    assert "Pass@1" in shown
    assert "Problem 1" in shown
    assert "read out of the gold chain" in shown


def test_quickstart_overwrites_nothing(short_quickstart, tmp_path):
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ConfigError, match="already holds a run"):
        quickstart(tmp_path)
    assert (tmp_path / "summary.json").read_text() == "{}"


@pytest.mark.parametrize("noise", ["one_sided", "two_sided"])
def test_a_latent_step_learns_which_component_to_weigh(noise):
    """A bandit on the operators alone: reward where component 0 outweighs component 1, both equally likely at first."""
    vocab, rows, size = 10, 256, 8
    logits = torch.full((vocab,), -6.0)
    logits[:2] = 0.0
    logits.requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    rewards = []
    for step in range(60):
        sampled = latent_step_from_logits(
            logits.detach().expand(rows, -1), torch.eye(vocab), top_k=2, noise=noise, seed=step
        )
        reward = (sampled.embedding[:, 0] > sampled.embedding[:, 1]).float()
        advantages = group_advantages(reward, torch.arange(rows) // size, first_token="all").advantages
        logprob = latent_logprob_from_logits(
            logits.expand(rows, -1), sampled.ids, sampled.scores, advantages=advantages
        )
        loss = -(advantages * torch.exp(logprob - logprob.detach())).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rewards.append(float(reward.mean()))
    assert 0.4 < rewards[0] < 0.6
    assert rewards[-1] > 0.9
