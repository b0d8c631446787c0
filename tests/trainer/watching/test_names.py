"""The names of metrics: every one that a run logs is on the page, and every one of the page is logged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import REPOSITORY
from support.documents import script
from support.trainers import ROWS, even, grpo

from latent_grpo.commands.main import main
from latent_grpo.watching.metrics import read_metrics
from latent_grpo.watching.names import METRICS, OLD_NAMES, RUN, documented
from latent_grpo.watching.trackers import tracked_name


def run_of(folder: Path, tokenizer, warm, **options):
    trainer = grpo(folder, tokenizer, [even, "accuracy"], warm, max_steps=2, invalid="keep", **options)
    trainer.eval_rows, trainer.args.eval_steps = list(ROWS[:2]), 2
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def runs(tokenizer, warm, tmp_path_factory):
    latent = run_of(tmp_path_factory.mktemp("latent"), tokenizer, warm, beta=0.1)
    text = run_of(tmp_path_factory.mktemp("text"), tokenizer, warm, latent=False, top_k=0, top_p=1.0, temperature=1.0)
    return latent, text


def test_the_page_is_current(tmp_path):
    written = tmp_path / "metrics.md"
    script("metrics").main([str(written)])
    current = (REPOSITORY / "docs" / "metrics.md").read_text()
    assert written.read_text() == current, "run `python docs/metrics.py docs/metrics.md`"


def test_a_run_logs_what_the_page_says(runs):
    latent, text = ({documented(name) for row in run.metrics.history for name in row} for run in runs)
    said = {name for name, metric in METRICS.items() if RUN in metric.phases.split(", ")}
    assert latent - {"step", "phase"} == said
    of_latent_steps = {name for name in said if name.startswith("latent/")}
    assert text - {"step", "phase"} == said - of_latent_steps - {"kl"}  # it has no reference model


def test_metrics_with_names_of_trl_mean_what_they_mean_there(runs):
    for run in runs:
        first, last = run.metrics.history
        prompt, response = run.tokenizer(ROWS[0]["prompt"])["input_ids"], first["completions/mean_length"]
        tokens = last["num_tokens"] - first["num_tokens"]
        assert tokens == pytest.approx(16 * (len(prompt) + response), rel=0.5)
        assert last["epoch"] == pytest.approx(2 * 4 / len(ROWS))
        assert first["completions/min_length"] <= response <= first["completions/max_length"] <= 8
        assert first["completions/mean_terminated_length"] <= first["completions/max_terminated_length"]
        assert first["frac_reward_zero_std"] in (0.0, 0.25, 0.5, 0.75, 1.0)
        # Of 0 and 1 the deviation follows from the mean.
        mean = first["rewards/even/mean"]
        assert first["rewards/even/std"] == pytest.approx((mean * (1 - mean) * 16 / 15) ** 0.5)
        assert 0 < last["entropy"] < 8


def test_logs_and_checkpoints_of_earlier_versions_have_the_new_names(tmp_path, capsys):
    row = {"phase": "train", "step": 1, "reward": 0.5, **dict.fromkeys(OLD_NAMES, 0.25)}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (read,) = read_metrics(tmp_path / "metrics.jsonl")
    assert read == {"phase": "train", "step": 1, "reward": 0.5, **dict.fromkeys(OLD_NAMES.values(), 0.25)}
    assert set(OLD_NAMES.values()) <= set(METRICS)
    assert not set(OLD_NAMES) & set(METRICS)
    assert main(["inspect", str(tmp_path)]) == 0
    assert "completions/mean_length" in capsys.readouterr().out


def test_trackers_have_the_groups_of_transformers_trainer():
    assert tracked_name("train", "completions/mean_length") == "train/completions/mean_length"
    assert tracked_name("train", "eval_pass_at_1") == "eval/pass_at_1"
    assert tracked_name("sft", "loss") == "sft/loss"
