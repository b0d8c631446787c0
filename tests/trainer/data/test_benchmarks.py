"""Benchmarks by name, from a Hub that the tests stand in for, and files in their place."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from latent_grpo.data.benchmarks import BENCHMARKS, GROUPS, benchmark_name, load_benchmarks
from latent_grpo.errors import DataError


@pytest.fixture
def hub(monkeypatch):
    """Replace the Hub by one that has every data set, with one row in the real format. Return the requests to it."""
    incorrect = {f"Incorrect Answer {i}": str(i + 6) for i in (1, 2, 3)}
    columns = {
        "whynlp/gsm8k-aug": {"question": "q", "steps": ["<<1+1=2>>"], "answer": "2"},
        "reasoning-machines/gsm-hard": {"input": "q", "code": "", "target": 2.0},
        "ChilleD/SVAMP": {"Body": "b", "Question": "q", "Equation": "( 1.0 + 1.0 )", "Answer": "2.0"},
        "ChilleD/MultiArith": {"question": "q", "final_ans": "2"},
        "HuggingFaceH4/MATH-500": {"problem": "q", "solution": "s", "answer": "2"},
        "HuggingFaceH4/aime_2024": {"problem": "q", "solution": "s", "answer": "2"},
        "math-ai/aime25": {"problem": "q", "answer": "2"},
        "Idavidrein/gpqa": {"Question": "q", "Correct Answer": "2", **incorrect},
    }
    requests = []

    def load_dataset(name, config, *, split):
        requests.append((name, config, split))
        return [columns[name]]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return requests


def test_the_eight_benchmarks_by_name(hub):
    rows = load_benchmarks(["low-difficulty", "high_difficulty"])
    assert list(rows) == list(BENCHMARKS) == [*GROUPS["low-difficulty"], *GROUPS["high-difficulty"]]
    assert len(rows) == len(hub) == 8
    for name, (row,) in rows.items():
        assert row["answer"] in ("2", "A", "B", "C", "D"), name
    assert hub[-1] == ("Idavidrein/gpqa", "gpqa_diamond", "train")
    assert {split for *_, split in hub} == {"test", "train"}


@pytest.mark.parametrize(
    ("text", "name"),
    [("GSM8K", "gsm8k-aug"), ("math500", "math-500"), ("AIME_24", "aime24"), ("gpqa", "gpqa-diamond"), ("gsm9k", None)],
)
def test_the_spellings_of_a_name(text, name):
    assert benchmark_name(text) == name


def test_a_file_in_place_of_a_benchmark(hub, tmp_path):
    path = tmp_path / "a=b.jsonl"
    path.write_text('{"question": "q", "answer": "#### 7"}\n' * 3)
    rows = load_benchmarks([f"gsm8k={path}", f"other={path}", str(path)], limit=2)
    answers = {label: [row["answer"] for row in labelled] for label, labelled in rows.items()}
    assert answers == {"gsm8k-aug": ["7", "7"], "other": ["7", "7"], str(path): ["7", "7"]}
    assert not hub
    with pytest.raises(DataError, match="given twice"):
        load_benchmarks(["gsm8k", f"gsm8k-aug={path}"])


def test_a_benchmark_out_of_reach_names_the_remedy(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("the Hub is out of reach\nand so on")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for name in BENCHMARKS:
        with pytest.raises(DataError) as info:
            load_benchmarks([name])
        message = str(info.value)
        assert "\n" not in message
        assert BENCHMARKS[name].hub in message
        assert "ConnectionError: the Hub is out of reach" in message
        assert message.endswith(f"give a file in its place, as {name}=FILE.jsonl")
        assert ("accept its terms" in message) == (name == "gpqa-diamond")
