"""The commands on a real model and real data: SmolLM2-135M on GSM8K rows, a few steps each."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from latent_grpo import LatentSampling, generate_latent
from latent_grpo.commands.main import main
from latent_grpo.model import end_marker_ids, eos_ids, load_model, load_tokenizer
from latent_grpo.prompts import encode_prompts
from latent_grpo.update.replay import replay_logprob
from latent_grpo.update.statistics import GAP

MODEL = os.environ.get("LATENT_GRPO_REAL_MODEL", "")
pytestmark = pytest.mark.skipif(
    not Path(MODEL, "config.json").is_file(), reason="LATENT_GRPO_REAL_MODEL names no model"
)


@pytest.fixture(scope="module")
def data(shared):
    return shared / "data"


@pytest.fixture(scope="module")
def warm(data, tmp_path_factory):
    """The folder of SmolLM2 after two steps of a warm start."""
    out = tmp_path_factory.mktemp("real") / "sft"
    arguments = ["sft", "--model_name_or_path", MODEL, "--dataset", str(data / "gsm8k_train.jsonl"), "--limit", "8"]
    options = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--output_dir", str(out)]
    assert main([*arguments, *options]) == 0
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").open()]
    assert len(losses) == 2
    return out


def test_train_saves_a_model_that_eval_and_generate_read(warm, data, tmp_path, capsys):
    out = tmp_path / "grpo"
    arguments = ["train", "--model_name_or_path", str(warm), "--dataset", str(data / "gsm8k_train.jsonl")]
    arguments += ["--limit", "4", "--max_steps", "2", "--generation_batch_size", "8", "--num_generations", "4"]
    arguments += ["--per_device_train_batch_size", "8", "--max_completion_length", "12", "--no_group_filter"]
    assert main([*arguments, "--output_dir", str(out)]) == 0
    steps = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert [row["step"] for row in steps] == [1, 2]
    assert all(row[GAP] < 1e-4 for row in steps)
    short = ["--max_completion_length", "8"]
    files = [str(path) for path in sorted(data.glob("*.json*"))]
    assert len(files) == 7
    result = tmp_path / "eval.json"
    assert main(["eval", "--model", str(out), "--data", *files, "--limit", "2", "--out", str(result), *short]) == 0
    assert [r["problems"] for r in json.loads(result.read_text())["results"].values()] == [2] * 7
    capsys.readouterr()
    assert main(["generate", "--model", str(out), "--prompt", "What is 12 + 7?", *short]) == 0
    assert "latent 1:" in capsys.readouterr().out


def test_log_probs_while_sampling_agree_with_one_teacher_forced_pass():
    tokenizer, model = load_tokenizer(MODEL), load_model(MODEL)
    prompts = encode_prompts(
        tokenizer, ["What is 12 + 7?", "A farmer has 3 hens and buys 9 more. How many now?"], model.device
    )
    likely_end = LatentSampling(
        max_new_tokens=12, end_token_id=end_marker_ids(tokenizer, "</think>")[0], eos_token_id=eos_ids(model, tokenizer)
    )
    probe = generate_latent(model, *prompts, likely_end, num_generations=2)
    # With a token that the model prefers as end marker, rows end their latent run, and text steps are checked too.
    likely_end.end_token_id = int(probe.token[0, 4])
    rollout = generate_latent(model, *prompts, likely_end, num_generations=2)
    assert rollout.is_latent.any()
    assert (rollout.mask & ~rollout.is_latent).any()
    with torch.no_grad():
        gap = (replay_logprob(model, rollout, likely_end.temperature) - rollout.logprob).abs().max()
    assert gap < 1e-4
