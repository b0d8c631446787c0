"""The table of a run: 80 columns, a header, a legend, and one block of output in a notebook."""

from __future__ import annotations

import re
import sys
import types

import pytest
from support.trainers import even, grpo

from latent_grpo import LatentGRPOConfig
from latent_grpo.watching import metrics as metrics_module
from latent_grpo.watching.alarms import Alarms
from latent_grpo.watching.metrics import Metrics, progress_bar
from latent_grpo.watching.run_table import COLUMNS, columns_for, heading, legend, table_line

VALUES = {column.metric: 1 if column.form.endswith("d") else 0.5 for column in COLUMNS} | {"phase": "train"}


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_a_table_fits_its_terminal_and_keeps_what_matters(width):
    columns = columns_for(VALUES, width)
    assert len(heading(columns)) == len(table_line(columns, VALUES)) <= width
    names = {column.metric for column in columns}
    assert {"step", "loss", "reward"} <= names
    assert len(columns) == len(COLUMNS) or len(heading(columns)) + max(c.width for c in COLUMNS) > width
    assert all(f"{column.heading}: {column.meaning}" in legend(columns) for column in columns if column.meaning)


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(metrics_module.CONSOLE, "_width", 80)


@pytest.mark.parametrize("latent", [True, False])
def test_a_run_says_where_it_runs_and_explains_its_headings(latent, tokenizer, warm, tmp_path, capsys, narrow):
    text = {} if latent else dict(latent=False, top_k=0, top_p=1.0, temperature=1.0)
    grpo(tmp_path, tokenizer, even, warm, **text).train()
    lines = capsys.readouterr().err.splitlines()
    assert max(map(len, lines)) <= 80
    said = " ".join(" ".join(lines[:3]).split())
    kind = "Latent-GRPO" if latent else "text GRPO"
    limit = "8 steps; K 2, tau 1" if latent else "8 tokens"
    expected = f"{kind} on cpu, float32: 64 rows; 1 steps, each of 4 prompts x 4 responses of at most {limit}"
    assert said.startswith(expected)
    head = next(number for number, line in enumerate(lines) if line.startswith("  step"))
    assert "length: steps of a response" in " ".join(" ".join(lines[:head]).split())
    # A run of text has no column for latent steps, whose figures would all be zero, and no label of them.
    assert ("latent" in lines[head]) == ("entropy" in lines[head]) == latent
    own = " ".join(line for line in lines if "/" not in line or "━" in line)  # without paths in warnings
    assert bool(re.search("latent", own, re.IGNORECASE)) == latent


def test_a_notebook_has_one_table_and_one_bar_that_are_written_anew(tmp_path, monkeypatch, capsys):
    pages: list[list[str]] = []

    def display(page, display_id):
        assert display_id
        pages.append([page])
        return types.SimpleNamespace(update=pages[-1].append)

    module = types.ModuleType("IPython.display")
    module.HTML, module.display = str, display
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr(metrics_module, "in_notebook", lambda: True)
    metrics = Metrics(LatentGRPOConfig(output_dir=str(tmp_path / "run")))
    with progress_bar("training", 12) as bar:
        for step in range(1, 13):
            metrics.write({"phase": "train", "step": step, "reward": step / 100, "frac_reward_zero_std": 1.0})
            bar.advance(f"reward {step / 100}")
    metrics.close()
    bars, table = pages
    assert len(bars) == 13
    assert len(table) == 12
    assert 'value="12" max="12"' in bars[-1]
    assert "training 12/12 reward 0.12" in bars[-1]
    assert table[-1].count("<tr>") == 13
    assert "<td>  0.120</td>" in table[-1]
    assert table[-1].count("rewards agree within every group") == 1
    assert "step" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ({"latent/share": 1.0}, "the warm start does not yet end its latent runs: train it longer, or raise max_compl"),
        ({"latent/share": 0.7}, "latent runs end, but the text behind them does not"),
        ({}, "check with doctor --model"),
        ({"completions/clipped_ratio": 0.9}, None),
        (
            {"completions/clipped_ratio": 0.5, "frac_reward_zero_std": 1.0, "reward_std": 0.0, "reward": 0.0},
            "every response has the reward 0: there is nothing to learn; look at some with num_completions_to_print",
        ),
    ],
)
def test_the_first_rollout_says_why_nothing_can_be_learnt(figures, expected):
    alarms, lines = Alarms(), []
    for step in range(1, 15):
        row = {"phase": "train", "step": step, "completions/clipped_ratio": 1.0, **figures}
        lines.append(alarms.update({**row, "frac_reward_zero_std": 0.0} if step > 1 else row))
    assert lines[1:] == [[]] * 13
    if expected is None:
        assert lines[0] == []
    else:
        (line,) = lines[0]
        assert line.startswith("step 1: every response ")
        assert expected in line
