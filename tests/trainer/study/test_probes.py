"""The probes: their parts against plain computations, and one short run of them all."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from latent_grpo.commands.main import main
from latent_grpo.study import probes
from latent_grpo.study.gradient_probes import coefficients
from latent_kernels import latent_logprob_from_logits


@pytest.mark.parametrize("name", ["aligned", "released", "none"])
def test_coefficients_are_those_of_the_operator(name):
    torch.manual_seed(0)
    logits = torch.randn(40, 12, requires_grad=True)
    ids = torch.stack([torch.randperm(12)[:3] for _ in range(40)])
    margin, advantage = torch.randn(40, 3), torch.randn(40)
    scores = margin + logits.detach().log_softmax(-1).gather(-1, ids)
    value = latent_logprob_from_logits(logits, ids, scores, advantages=advantage, margin_gradient=name)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    factor = coefficients(margin, advantage, name) / 3
    expected = torch.zeros(40, 12).scatter(-1, ids, factor) - factor.sum(-1, keepdim=True) * logits.softmax(-1)
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-4, atol=1e-5)


def test_every_probe_runs_and_the_page_says_what_came_out(tmp_path, monkeypatch, capsys):
    small = {"UPDATES": (0, 1), "ROLLOUTS": 2, "PROBLEMS": 12, "DIRECTIONS": 3, "SAMPLES": 16, "SCALES": (0.0, 0.5, 1)}
    variants = {name: probes.VARIANTS[name] for name in ("masked", "kept")}
    small |= {"SETTINGS": {"K 2": {}}, "VARIANTS": variants}
    for name, value in {**small, "TRAIN_PROBLEMS": 400, "HELD_OUT_PROBLEMS": 40}.items():
        monkeypatch.setattr(probes, name, value)
    sft, grpo = probes.sft_config, probes.grpo_config
    monkeypatch.setattr(
        probes, "sft_config", lambda *args: replace(sft(*args), max_steps=60, per_device_train_batch_size=8)
    )
    batches = {"generation_batch_size": 32, "per_device_train_batch_size": 16}
    monkeypatch.setattr(probes, "grpo_config", lambda *args: replace(grpo(*args), **batches))
    out = tmp_path / "probes"
    assert main(["probes", "--out", str(out)]) == 0
    record = json.loads((out / "probes.json").read_text())
    page = (out / "probes.md").read_text()
    assert len(record["findings"]) == 6
    for finding in record["findings"]:
        assert finding["title"] in page
        assert finding["prediction"] in page
        assert finding["outcome"] in page
    assert "<svg" in (out / "probes.svg").read_text()
    signs = record["findings"][0]["numbers"]
    # By construction, apart from margins of exactly 0, which the lower end of the clamp gives.
    assert [row["aligned"] > 0.9 for row in signs if row["noise"] == "one_sided" and row["updates"] == 0] == [True]
    assert "holds here" in capsys.readouterr().out
    assert main(["probes", "--out", str(out)]) == 2
    assert "not empty" in capsys.readouterr().err
