"""The algorithm in one file: it stays one scroll, it runs, and it trains."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from support import REPOSITORY
from transformers import AutoModelForCausalLM

from latent_grpo import LatentSFTConfig, LatentSFTTrainer
from latent_grpo.quickstart.run import sft_config
from latent_grpo.quickstart.toy_task import make_model, make_problems, make_tokenizer, worked_examples

SCRIPT = REPOSITORY / "docs" / "one_file.py"


@pytest.fixture
def one_file() -> Any:
    """The module of docs/one_file.py."""
    spec = importlib.util.spec_from_file_location("one_file", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def warm_start(folder: Path, **options: Any) -> str:
    """Train a warm start of the toy task, as the quickstart does, and return its folder."""
    settings: dict[str, Any] = {**vars(sft_config(folder, 0)), **options}
    tokenizer = make_tokenizer()
    rows = worked_examples(make_problems(20_000, seed=1), seed=1)
    LatentSFTTrainer(make_model(tokenizer, seed=0), LatentSFTConfig(**settings), rows, tokenizer).train()
    return str(settings["output_dir"])


def test_the_file_is_one_scroll():
    assert len(SCRIPT.read_text().splitlines()) <= 150


def test_a_step_samples_rewards_and_updates(one_file, tmp_path, monkeypatch):
    monkeypatch.setattr(one_file, "PROMPTS", 8)
    monkeypatch.setattr(one_file, "MINI_BATCH", 32)
    start = warm_start(tmp_path, max_steps=60, per_device_train_batch_size=32)
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
    hard = (rollout["ids"][:, :, 1:] == one_file.UNUSED_ID).any(-1)
    assert (~hard & rollout["mask"]).any(), "no latent step was sampled"
    assert (hard & rollout["mask"]).any(), "no text step was sampled"
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert not any("embed_tokens" in name for name in changed)


@pytest.mark.slow
def test_the_reward_rises(one_file, tmp_path, capsys):
    rewards = one_file.main([warm_start(tmp_path), "--steps", "40"])
    assert capsys.readouterr().out.count("reward") == 40
    assert mean(rewards[-5:]) > mean(rewards[:5]) + 0.1
