"""Commands run from start to end: presets, resumed and interrupted runs, failing rewards, sft to eval to generate."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support import REPOSITORY
from support.options import metrics_of
from transformers import PreTrainedTokenizerFast

from latent_grpo.commands.main import main


@pytest.mark.parametrize("preset", ["two-sided-noise", "soft-grpo", "multiplex", "text-grpo"])
def test_a_preset_trains(preset, train_command, input_folder, tmp_path, capsys):
    assert main(train_command(tmp_path / "run", "--config", preset, "--max_steps", "1")) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{input_folder}/model: float32 on cpu (dtype auto)"
    (row,) = metrics_of(tmp_path / "run")
    assert (row.get("latent/share", 0) > 0) == (preset != "text-grpo")


def test_a_finished_run_is_not_overwritten(train_command, tmp_path, capsys):
    assert main(train_command(tmp_path / "run", "--max_steps", "1")) == 0
    assert main(train_command(tmp_path / "run", "--max_steps", "1")) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_resumed_training_equals_uninterrupted_training(train_command, tmp_path):
    common = ["--learning_rate", "1e-3", "--loss_type", "grpo", "--first_token", "all"]
    resume = ["--resume_from_checkpoint", "true"]
    assert main(train_command(tmp_path / "whole", "--max_steps", "4", *common)) == 0
    assert main(train_command(tmp_path / "resumed", "--max_steps", "2", "--save_steps", "2", *common)) == 0
    assert main(train_command(tmp_path / "resumed", "--max_steps", "4", *resume, *common)) == 0
    whole, resumed = metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "resumed")
    assert [row["step"] for row in resumed] == [1, 2, 3, 4]
    for name in ("reward", "loss", "grad_norm", "latent/mixture_entropy", "num_tokens", "epoch"):
        assert [row[name] for row in whole] == [row[name] for row in resumed]


def test_sigint_leaves_a_checkpoint_and_resume_continues(train_command, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "latent_grpo", *train_command(run, "--max_steps", "100000")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    metrics = run / "metrics.jsonl"
    # The signal must arrive during training. The handler is not there yet while the process imports PyTorch.
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130
    (checkpoint,) = run.glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    assert step >= 2
    resume = ["--max_steps", str(step + 1), "--resume_from_checkpoint", str(checkpoint)]
    assert main(train_command(run, *resume)) == 0
    assert metrics_of(run)[-1]["step"] == step + 1


def test_a_failing_reward_stops_the_run_with_the_sample_named(train_command, tmp_path, capsys):
    source = tmp_path / "bad.py"
    source.write_text("def bad(completions, **kwargs):\n    return [float('nan')] * len(completions)\n")
    assert main(train_command(tmp_path / "run", "--max_steps", "1", "--reward_funcs", f"{source}:bad")) == 1
    assert "bad" in capsys.readouterr().err


def test_a_raising_reward_shows_the_users_traceback_on_request(train_command, tmp_path, capsys, monkeypatch):
    source = tmp_path / "bad.py"
    source.write_text("def bad(completions, **kwargs):\n    return {}['score']\n")
    command = train_command(tmp_path / "run", "--max_steps", "1", "--reward_funcs", f"{source}:bad")
    assert main(command) == 1
    shown = capsys.readouterr().err
    assert "return {}['score']" not in shown
    assert "LATENT_GRPO_TRACEBACK=1 shows its traceback" in shown
    monkeypatch.setenv("LATENT_GRPO_TRACEBACK", "1")
    assert main(command) == 1
    assert "return {}['score']" in capsys.readouterr().err


def test_sft_then_eval_then_generate(input_folder, tmp_path, capsys):
    data, model, out = str(input_folder / "data.jsonl"), str(tmp_path / "sft"), str(tmp_path / "eval.json")
    short = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--output_dir", model]
    assert main(["sft", "--model_name_or_path", str(input_folder / "model"), "--dataset", data, *short]) == 0

    def first_line() -> str:
        return capsys.readouterr().out.splitlines()[0]

    assert first_line() == f"{input_folder}/model: float32 on cpu (dtype auto)"
    PreTrainedTokenizerFast.from_pretrained(model)
    options = ["--latent_top_k", "2", "--max_completion_length", "6"]
    assert main(["eval", "--model", model, "--data", data, "--pass-at", "1,2", "--out", out, *options]) == 0
    (result,) = json.loads(Path(out).read_text())["results"].values()
    assert result["problems"] == 24
    assert 0 <= result["pass_at_1"] <= 1
    assert 0 <= result["pass@2"] <= 1
    assert first_line() == f"{model}: float32 on cpu (dtype auto)"
    options += ["--dtype", "bfloat16"]
    assert main(["generate", "--model", model, "--prompt", "Mia has 3 coins. finds 4. How many now?", *options]) == 0
    precision, *response = capsys.readouterr().out.splitlines()
    assert precision == f"{model}: bfloat16 on cpu"
    assert any("answer:" in line for line in response)
    assert main(["doctor", "--model", model]) == 0
    assert "of 8 within" in " ".join(capsys.readouterr().out.split())
    assert torch.get_default_dtype() == torch.float32  # no command changes it for its caller
