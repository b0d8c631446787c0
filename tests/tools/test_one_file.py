"""The algorithm in one file, docs/one_file.py: it stays short, its step runs, and it raises the reward."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from support.documents import REPOSITORY, script
from transformers import AutoModelForCausalLM

from latent_grpo import LatentSFTConfig, LatentSFTTrainer
from latent_grpo.quickstart.graph_world import make_model, make_problems, make_tokenizer
from latent_grpo.quickstart.run import sft_config


@pytest.fixture
def one_file() -> Any:
    """The module of docs/one_file.py."""
    return script("one_file")


def warm_start(folder: Path, problems: int = 20_000, **options: Any) -> str:
    """Train a warm start on problems of the graph world, as the quickstart does, and return its folder."""
    settings: dict[str, Any] = {**vars(sft_config(folder, 0)), **options}
    tokenizer = make_tokenizer()
    rows = make_problems(problems, seed=1)
    LatentSFTTrainer(make_model(tokenizer, seed=0), LatentSFTConfig(**settings), rows, tokenizer).train()
    return str(settings["output_dir"])


def test_the_file_is_at_most_150_lines():
    assert len((REPOSITORY / "docs" / "one_file.py").read_text().splitlines()) <= 150


def test_a_step_samples_latent_and_text_steps_and_updates_the_body_only(one_file, tmp_path, monkeypatch):
    monkeypatch.setattr(one_file, "MINI_BATCH", 32)
    # An untrained model would hardly ever sample the end marker, and so no text step.
    start = warm_start(tmp_path, problems=500, max_steps=30, per_device_train_batch_size=16)
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(start).eval()
    model.get_input_embeddings().requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    problems = make_problems(16, seed=5)
    rewards = [one_file.train_step(model, tokenizer, optimizer, problems[i : i + 8], seed=i) for i in (0, 8)]
    assert all(0 <= reward <= 1 for reward in rewards)
    rollout = one_file.sample(model, tokenizer, [row["prompt"] for row in problems], seed=9)
    is_text = (rollout["ids"][:, :, 1:] == one_file.UNUSED_ID).any(-1)
    assert (~is_text & rollout["mask"]).any(), "no latent step was sampled"
    assert (is_text & rollout["mask"]).any(), "no text step was sampled"
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert not any("embed_tokens" in name for name in changed)


@pytest.mark.slow
def test_the_reward_rises(one_file, tmp_path, capsys):
    # At the page's own batch: with half of it, what 40 steps gain is within the noise of five steps.
    rewards = one_file.main([warm_start(tmp_path), "--steps", "32"])
    assert capsys.readouterr().out.count("reward") == 32
    assert mean(rewards[-5:]) > mean(rewards[:5]) + 0.08
