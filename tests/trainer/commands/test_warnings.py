"""What a command prints beside its results: warnings of one line, and a progress bar with the name of the method."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings

import pytest
from support.trainers import ROWS, even, grpo

from latent_grpo.commands.main import warnings_in_one_line
from latent_grpo.watching import metrics


def test_a_warning_is_one_line_without_its_place(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        before = warnings.formatwarning
        with warnings_in_one_line():
            assert warnings.formatwarning("Two\n lines.", UserWarning, "file.py", 3, "code") == "warning: Two lines.\n"
        assert warnings.formatwarning is before


def test_the_command_line_prints_warnings_in_one_line(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps(ROWS[:1] * 4))
    model = ["--model_name_or_path", str(tmp_path / "none")]
    words = [sys.executable, "-m", "latent_grpo", "sft", "--dataset", str(tmp_path / "data.json"), *model]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=dict(os.environ))
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "repeats its prompts" in line]
    assert line.startswith(f"warning: {tmp_path / 'data.json'} repeats its prompts: 1 distinct prompts in 4 rows")
    assert "warnings.warn(" not in done.stderr


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ({}, "Latent-GRPO"),
        (dict(latent=False), "text GRPO"),
        (dict(method="soft_grpo", noise="two_sided"), "SofT-GRPO"),
        (dict(method="multiplex", latent_top_p=1.0), "Multiplex Thinking"),
    ],
    ids=str,
)
def test_the_progress_bar_names_the_method(options, label, tokenizer, warm, tmp_path, monkeypatch):
    labels = []

    def progress_bar(label, *counts, **options):
        labels.append(label)
        return metrics.progress_bar(label, *counts, shown=False)

    monkeypatch.setattr("latent_grpo.trainer.progress_bar", progress_bar)
    grpo(tmp_path, tokenizer, even, warm, **options).train()
    assert labels == [label]
