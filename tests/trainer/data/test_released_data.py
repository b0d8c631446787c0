"""The released files as data: their columns, files of a Hub data set, expected columns, repeated prompts."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from latent_grpo.commands.main import main
from latent_grpo.config import LatentGRPOConfig, LatentSFTConfig
from latent_grpo.data.rows import load_rows, load_training_rows
from latent_grpo.errors import DataError


def write_lines(path: Path, *rows: Any) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return str(path)


SFT_ROWS = {
    "tags around the chain": (
        {"problem": " p\n", "cot": "<think>a <<1+1=2>>\nb </think>", "cot_answer": " It is \\boxed{1,234}. "},
        {"prompt": " p\n", "chain": "a <<1+1=2>>\nb ", "answer_text": " It is \\boxed{1,234}. ", "answer": "1234"},
    ),
    "no tags, a number": (
        {"problem": "p", "cot": "<<1+1=2>> #### 2", "cot_answer": "2.0"},
        {"prompt": "p", "chain": "<<1+1=2>> #### 2", "answer_text": "2.0", "answer": "2"},
    ),
    "an answer of its own": (
        {"problem": "p", "cot": "c", "cot_answer": "\\boxed{x}", "answer": "y"},
        {"prompt": "p", "chain": "c", "answer_text": "\\boxed{x}", "answer": "y"},
    ),
    "a tag inside": (
        {"problem": "p", "cot": "a</think>b", "cot_answer": "so\n#### 7"},
        {"prompt": "p", "chain": "a</think>b", "answer_text": "so\n#### 7", "answer": "7"},
    ),
}


@pytest.mark.parametrize(("source", "row"), SFT_ROWS.values(), ids=SFT_ROWS)
def test_training_rows_keep_chain_and_answer_text_as_they_are(source, row, tmp_path):
    assert load_rows(write_lines(tmp_path / "train.jsonl", source)) == [row]


def test_a_named_column_is_read_in_the_ordinary_way(tmp_path):
    path = write_lines(tmp_path / "train.jsonl", {"problem": " p ", "cot": " <<1+1=2>> ", "cot_answer": "2", "n": 3})
    assert load_rows(path, answer_column="n") == [{"prompt": "p", "answer": "3", "chain": "1+1=2"}]


@pytest.mark.parametrize(("name", "value"), [("cot", None), ("cot", ["a"]), ("cot_answer", " "), ("cot_answer", 2)])
def test_a_training_row_without_a_text_is_named(name, value, tmp_path):
    row = {"problem": "p", "cot": "c", "cot_answer": "2"}
    with pytest.raises(DataError, match=f"train.jsonl: row 2: {name} is .* not a text; remove the row"):
        load_rows(write_lines(tmp_path / "train.jsonl", row, {**row, name: value}))


def test_the_released_test_rows(tmp_path):
    source = {"problem": "p", "solution": "s", "answer": "\\frac{1}{2}"}
    row = {"prompt": "p", "answer": "\\frac{1}{2}", "chain": "s"}
    assert load_rows(write_lines(tmp_path / "test.jsonl", source)) == [row]


@pytest.fixture
def requests(monkeypatch):
    """Stand in for the Hub; return the arguments of each request to it."""
    received = []

    def load_dataset(name, config=None, **options):
        received.append((name, config, options))
        return [{"question": f"q{i % 10}", "answer": "2"} for i in range(40)]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return received


@pytest.mark.parametrize(
    ("source", "request_"),
    [
        ("org/set:main", ("org/set", "main", {})),
        ("org/set:main.v2", ("org/set", "main.v2", {})),
        ("org/set:train.parquet", ("org/set", None, {"data_files": {"dev": "train.parquet"}})),
        ("org/set-1.5:a/b.JSONL", ("org/set-1.5", None, {"data_files": {"dev": "a/b.JSONL"}})),
    ],
)
def test_behind_the_colon_stands_a_file_if_it_ends_like_one(source, request_, requests):
    load_rows(source, split="dev", repeated_prompts=1.0)
    name, config, options = request_
    assert requests == [(name, config, {**options, "split": "dev"})]


def test_a_file_that_exists_is_no_hub_data_set(requests, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    write_lines(tmp_path / "org" / "set:train.jsonl", {"question": "q", "answer": "1"})
    assert load_rows("org/set:train.jsonl") == [{"prompt": "q", "answer": "1"}]
    assert not requests


def test_repeated_prompts_are_named_with_their_count(requests):
    message = "10 distinct prompts in 40 rows; deduplicate: true keeps the first of each"
    with pytest.warns(UserWarning, match=f"org/set repeats its prompts: {message}"):
        assert len(load_rows("org/set")) == 40
    with pytest.warns(
        UserWarning, match="rows; the public upload of DAPO-Math-17k repeats each about a hundred times; "
    ):
        load_rows("BytedTsinghua-SIA/DAPO-Math-17k")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_rows("org/set", repeated_prompts=0.75)  # the share itself is allowed
        load_rows("org/set", limit=10)
        rows = load_rows("org/set", deduplicate=True, limit=7)
    assert [row["prompt"] for row in rows] == [f"q{i}" for i in range(7)]


def test_repeated_messages_are_found_too(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"q{i % 2}"}], "answer": str(i)} for i in range(6)]
    path = write_lines(tmp_path / "data.jsonl", *rows)
    assert [row["answer"] for row in load_rows(path, deduplicate=True)] == ["0", "1"]
    with pytest.warns(UserWarning, match="2 distinct prompts in 6 rows"):
        load_rows(path)


def test_a_set_without_an_expected_column_is_refused(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", {"question": "q", "answer": "1"})
    assert load_rows(path, expected_columns=["answer", "question"])
    with pytest.raises(DataError) as info:
        load_rows(path, expected_columns=["question", "prompt", "reward_model"])
    assert "has the columns [question, answer] and lacks [prompt, reward_model] of expected_columns" in str(info.value)
    assert "--expected_columns" in str(info.value)


@pytest.mark.parametrize("config", [LatentGRPOConfig, LatentSFTConfig])
def test_the_options_reach_the_loader(config, tmp_path):
    path = write_lines(tmp_path / "data.jsonl", *({"question": "q", "answer": str(i)} for i in range(3)))
    with pytest.warns(UserWarning, match="1 distinct prompts in 3 rows"):
        assert len(load_training_rows(config(dataset=path))) == 3
    assert len(load_training_rows(config(dataset=path, deduplicate=True))) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_training_rows(config(dataset=path, repeated_prompts=1.0))) == 3
    with pytest.raises(DataError, match="expected_columns"):
        load_training_rows(config(dataset=path, expected_columns=["prompt"]))


@pytest.mark.parametrize("name", ["low-difficulty", "high-difficulty"])
def test_recipes_name_the_released_files_and_refuse_others(name, repository, requests, tmp_path, capsys):
    recipe = yaml.safe_load((repository / "latent_grpo" / "recipes" / f"{name}.yaml").read_text())
    for option in ("dataset", "eval_dataset"):
        assert recipe[option].startswith("DJCheng/Latent-GRPO-Data:")
        assert recipe[option].endswith(".parquet")
    assert main(["train", "--config", name, "--output_dir", str(tmp_path)]) == 2
    assert "lacks [prompt, reward_model, extra_info] of expected_columns" in capsys.readouterr().err
    ((_, _, options),) = requests
    assert options["data_files"] == {"train": recipe["dataset"].partition(":")[2]}
