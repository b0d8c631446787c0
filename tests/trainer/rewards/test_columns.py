"""Which columns of the data reach the reward functions, and what they hold where a row lacks them."""

from __future__ import annotations

import json
import warnings

import pytest
from datasets import Dataset
from support.options import ROWS, metrics_of
from support.trainers import even, grpo

from latent_grpo import LatentGRPOConfig, LatentGRPOTrainer
from latent_grpo.commands.main import main
from latent_grpo.errors import DataError
from latent_grpo.rewards.columns import reward_columns

EXTRA = {"level": 3, "tags": ["a", "b"], "info": {"source": "x"}, "text": "t", "ids": [1], "solution": "s"}
REWARD = """
import json

def record(prompts, completions, completion_ids, **columns):
    with open({path!r}, "a") as file:
        file.write(json.dumps(columns, default=str) + chr(10))
    return [float(i % 4) for i in range(len(prompts))]
"""


@pytest.mark.parametrize("kind", ["dicts", "datasets"])
@pytest.mark.parametrize("first", [0, 1])
def test_a_column_that_some_rows_lack_is_none_there(kind, first, tokenizer, warm, tmp_path):
    """Whichever row comes first in a batch, every column is there."""
    rows = [{**row, **EXTRA} if i % 2 == first else dict(row) for i, row in enumerate(ROWS[:4])]
    seen = []

    def reward(prompts, completions, **columns):
        seen.append((prompts, columns))
        return even(completions)

    data = rows if kind == "dicts" else Dataset.from_list([{**dict.fromkeys(EXTRA), **row} for row in rows])
    trainer = grpo(tmp_path, tokenizer, reward, warm, rows=data, max_steps=3)
    trainer.train()
    by_prompt = {row["prompt"]: row for row in rows}
    assert len(seen) == 3
    for prompts, columns in seen:
        for name in (*EXTRA, "answer", "chain"):
            assert columns[name] == [by_prompt[prompt].get(name) for prompt in prompts]
        assert "prompt" not in columns


def test_columns_with_the_name_of_an_argument_are_left_out():
    rows = [{"prompt": "p", "completion": "c", "completion_ids": [1]}, {"prompt": "p", "a": 1, "trainer_state": 2}]
    with pytest.warns(UserWarning, match="do not get the column 'trainer_state' of the data, .*; rename the column"):
        assert reward_columns(rows) == ["a"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reward_columns([{"prompt": "p", "ids": 1}, {"text": 2}]) == ["ids", "text"]


def needs_level(completions, level):
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("reward", "row", "words"),
    [
        (needs_level, {}, r"'needs_level' needs 'level', which is no column of the data \(\[chain, answer\]\)"),
        ("accuracy", {"answer": None}, "row 2 has the answer None, with which 'accuracy_reward' can compare"),
        ("exact_match", {"answer": " "}, "row 2 has the answer ' ', with which 'exact_match_reward' can compare"),
    ],
)
def test_what_a_reward_needs_is_missed_before_the_first_step(reward, row, words, tokenizer, warm, tmp_path):
    columns = ("prompt", "chain", "answer")
    rows = [{name: each[name] for name in columns} for each in ROWS[:3]]
    rows[1] |= row
    with pytest.raises(DataError, match=words):
        grpo(tmp_path, tokenizer, reward, warm, rows=rows)
    if reward == "accuracy":
        args = LatentGRPOConfig(output_dir=str(tmp_path / "run"), latent_top_k=2, eval_steps=1)
        with pytest.raises(DataError, match=words):
            LatentGRPOTrainer(warm, needs_level, args, [{**ROWS[0], "level": 1}], rows, tokenizer)


@pytest.mark.parametrize("renamed", [False, True])
def test_every_column_of_a_file_reaches_the_rewards(renamed, tokenizer, warm, tmp_path):
    warm.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "own.py").write_text(REWARD.format(path=str(tmp_path / "seen.jsonl")))
    names = {"prompt": "query", "answer": "gold"} if renamed else {"prompt": "prompt", "answer": "answer"}
    rows = [{names.get(name, name): value for name, value in row.items()} | EXTRA for row in ROWS[:4]]
    (tmp_path / "data.json").write_text(json.dumps([*rows[:3], {**rows[3], "level": None}]))
    flags = ["--prompt_column", "query", "--answer_column", "gold"] if renamed else []
    sizes = dict(max_steps=1, generation_batch_size=16, num_generations=4, max_completion_length=6, latent_top_k=2)
    options = dict(sizes, dataset=tmp_path / "data.json", output_dir=tmp_path / "run", log_table=False)
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    reward = ["--reward_funcs", f"{tmp_path / 'own.py'}:record", "--model_name_or_path", str(tmp_path / "model")]
    assert main(["train", *words, *reward, *flags]) == 0
    assert len(metrics_of(tmp_path / "run")) == 1
    columns = json.loads((tmp_path / "seen.jsonl").read_text().splitlines()[0])
    assert sorted(columns["answer"]) == sorted(row["answer"] for row in ROWS[:4] for _ in range(4))
    assert sorted(columns["level"], key=str) == [3] * 12 + [None] * 4
    for name in ("tags", "info", "text", "ids", "solution"):
        assert columns[name] == [EXTRA[name]] * 16
    if renamed:
        assert columns["gold"] == columns["answer"]
        assert set(columns["query"]) == {row["prompt"] for row in ROWS[:4]}
