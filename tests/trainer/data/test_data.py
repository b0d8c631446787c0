"""Data sets: the rows that each format is read into, and the error that each broken source gets."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from support import SHARED

from latent_grpo.data.rows import load_rows
from latent_grpo.errors import DataError

SHARED_DATA = SHARED / "data"
GPQA_ROW = {
    "Question": "Which gas is a noble gas?",
    "Correct Answer": "neon",
    "Incorrect Answer 1": "oxygen",
    "Incorrect Answer 2": "nitrogen",
    "Incorrect Answer 3": "chlorine",
}


def shared(name: str) -> str:
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"the data set {name} is not beside the repository")
    return str(path)


def write_lines(path: Path, *rows: Any) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return str(path)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


# File, rows, rows with a chain, start of the first prompt, first answer, start of the first chain.
REAL_FILES = [
    ("gsm8k_train.jsonl", 7473, 7473, "Natalia sold clips to 48", "72", "48/2=24 48+24=72"),
    ("gsm8k_test.jsonl", 1319, 1319, "Janet\u2019s ducks lay 16 eggs", "18", "16-3-4=9 9*2=18"),
    ("gsm_hard.jsonl", 1319, 0, "Janet\u2019s ducks lay 16 eggs", "-9867630", ""),
    ("svamp.json", 1000, 1000, "Each pack of dvds costs 76 dollars. If", "51", "76-25=51"),
    ("multiarith.json", 600, 600, "For Halloween Debby", "39", "(32+42)-35=39"),
    ("math500_test.jsonl", 500, 500, "Convert the point $(0,3)$", r"\left( 3, \frac{\pi}{2} \right)", "We have that"),
    ("aime24_test.jsonl", 30, 0, "Every morning Aya", "204", ""),
]


@pytest.mark.parametrize(
    ("name", "count", "chains", "prompt", "answer", "chain"), REAL_FILES, ids=[case[0] for case in REAL_FILES]
)
def test_real_file(name: str, count: int, chains: int, prompt: str, answer: str, chain: str) -> None:
    rows = load_rows(shared(name))
    assert len(rows) == count
    assert sum("chain" in row for row in rows) == chains
    assert all(isinstance(row["prompt"], str) and row["prompt"] and row["answer"] for row in rows)
    assert rows[0]["prompt"].startswith(prompt)
    assert rows[0]["answer"] == answer
    assert rows[0].get("chain", "").startswith(chain)


@pytest.mark.parametrize("name", ["gsm8k_train.jsonl", "gsm8k_test.jsonl"])
def test_gsm8k_answers_are_integers_and_chains_have_no_marks(name: str) -> None:
    for row in load_rows(shared(name)):
        assert str(int(row["answer"])) == row["answer"]
        assert "<<" not in row["chain"]
        assert "####" not in row["chain"]


def test_gsm_hard_answers_keep_every_digit() -> None:
    path = shared("gsm_hard.jsonl")
    targets = [json.loads(line)["target"] for line in Path(path).read_text(encoding="utf-8").splitlines()]
    answers = [row["answer"] for row in load_rows(path)]
    assert [float(answer) for answer in answers] == targets
    assert not any("e" in answer or answer.endswith(".0") for answer in answers)


FORMATS = {
    "gsm8k without marks": (
        {"question": "q", "answer": "He has one thousand.\n#### 1,000"},
        {"prompt": "q", "answer": "1000", "chain": "He has one thousand."},
    ),
    "question with a bare answer": ({"question": "q", "answer": "7"}, {"prompt": "q", "answer": "7"}),
    "gsm8k-aug, step list": (
        {"question": "q", "steps": ["<<1+2=3>>", "<<3*4=12>>"], "answer": "12"},
        {"prompt": "q", "answer": "12", "chain": "1+2=3 3*4=12"},
    ),
    "gsm8k-aug, step text": (
        {"question": "q", "steps": "add, then double", "answer": 6.0},
        {"prompt": "q", "answer": "6", "chain": "add, then double"},
    ),
    "gsm8k-aug, no steps": ({"question": "q", "steps": [], "answer": "1"}, {"prompt": "q", "answer": "1"}),
    "gsm8k-aug, cot": (
        {"question": "q", "cot": "<<1+2=3>> <<3*4=12>> #### 12", "answer": "#### 12"},
        {"prompt": "q", "answer": "12", "chain": "1+2=3 3*4=12"},
    ),
    "gsm-hard, small float": (
        {"input": "q", "code": "", "target": 2.0107e-06},
        {"prompt": "q", "answer": "0.0000020107"},
    ),
    "svamp, no equation": (
        {"Body": "b", "Question": "q?", "Equation": "", "Answer": "145.0"},
        {"prompt": "b q?", "answer": "145"},
    ),
    "multiarith, two brackets": (
        {"sQuestion": " q ", "lEquations": ["X=((1.0+2.5)*(4.0-2.0))"], "lSolutions": [7.0]},
        {"prompt": "q", "answer": "7", "chain": "(1+2.5)*(4-2)=7"},
    ),
    "multiarith on the hub": ({"question": "q", "final_ans": "7"}, {"prompt": "q", "answer": "7"}),
    "aime": ({"id": 1, "problem": "p", "answer": "025"}, {"prompt": "p", "answer": "025"}),
    "aime on the hub": (
        {"Problem": "p", "Answer": 25, "Solution": "s"},
        {"prompt": "p", "answer": "25", "chain": "s"},
    ),
    "plain": (
        {"prompt": " p ", "answer": "a", "chain": "c", "other": 1},
        {"prompt": "p", "answer": "a", "chain": "c"},
    ),
    "plain, chat": (
        {"prompt": [{"role": "user", "content": "p", "name": None}], "answer": 3, "chain": None},
        {"prompt": [{"role": "user", "content": "p"}], "answer": "3"},
    ),
}


@pytest.mark.parametrize(("source", "row"), FORMATS.values(), ids=FORMATS)
def test_format(tmp_path: Path, source: dict[str, Any], row: dict[str, Any]) -> None:
    assert load_rows(write_lines(tmp_path / "data.jsonl", source)) == [row]


def test_verl_parquet(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}]
    source = {
        "data_source": "gsm8k",
        "prompt": messages,
        "reward_model": {"ground_truth": "1,234", "style": "rule"},
        "extra_info": {"index": 0, "answer": "So <<1200+34=1234>>1,234.\n#### 1,234"},
    }
    rows = load_rows(write_parquet(tmp_path / "train.parquet", [source]))
    assert rows == [{"prompt": messages, "answer": "1234", "chain": "1200+34=1234"}]


def test_gpqa_choices_are_shuffled_the_same_way_every_time(tmp_path: Path) -> None:
    sources = [{**GPQA_ROW, "Question": f"Which gas is noble, {i}?"} for i in range(200)]
    rows = load_rows(write_lines(tmp_path / "forward.jsonl", *sources))
    for row in rows:
        choices = dict(line.split(". ", 1) for line in row["prompt"].splitlines()[2:6])
        assert list(choices) == list("ABCD")
        assert sorted(choices.values()) == ["chlorine", "neon", "nitrogen", "oxygen"]
        assert choices[row["answer"]] == "neon"
        assert "letter" in row["prompt"]
    # 50 rows are expected per letter, and 25 are four standard deviations away.
    assert all([row["answer"] for row in rows].count(letter) > 25 for letter in "ABCD")
    assert load_rows(write_lines(tmp_path / "backward.jsonl", *reversed(sources)))[::-1] == rows


def test_json_file_has_a_list_or_lines(tmp_path: Path) -> None:
    rows = [{"prompt": "1+1?", "answer": "2"}, {"prompt": "2+2?", "answer": "4"}]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    assert load_rows(str(tmp_path / "list.json")) == rows
    assert load_rows(write_lines(tmp_path / "lines.json", *rows)) == rows


def test_byte_order_mark_blank_lines_and_unicode_separators(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes('\ufeff{"prompt": "a\u2028b", "answer": "1"}\r\n\r\n{"prompt": "c", "answer": "2"}'.encode())
    assert [row["prompt"] for row in load_rows(str(path))] == ["a\u2028b", "c"]


def test_columns_override_the_format(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", {"text": "p", "label": 2.0, "why": "c", "question": "q", "answer": "a"})
    assert load_rows(path, prompt_column="text", answer_column="label", chain_column="why") == [
        {"prompt": "p", "answer": "2", "chain": "c"}
    ]
    assert load_rows(path, prompt_column="text") == [{"prompt": "p", "answer": "a"}]


def test_limit(tmp_path: Path) -> None:
    good = [{"prompt": str(i), "answer": "1"} for i in range(3)]
    path = write_lines(tmp_path / "data.jsonl", *good, {"prompt": None, "answer": "1"})
    assert [row["prompt"] for row in load_rows(path, limit=2)] == ["0", "1"]


def check_error(source: str, *parts: str, **options: Any) -> None:
    """Assert that ``load_rows`` refuses the source in one line that contains every part."""
    with pytest.raises(DataError) as caught:
        load_rows(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


GOOD = {"prompt": "p", "answer": "1"}
BAD_ROWS = {
    "missing field": ({"prompt": "p", "result": "1"}, ["'answer'", "[prompt, result]", "--answer_column"]),
    "null prompt": ({"prompt": None, "answer": "1"}, ["prompt is empty", "remove the row"]),
    "blank prompt": ({"prompt": " \n", "answer": "1"}, ["prompt is empty"]),
    "no messages": ({"prompt": [], "answer": "1"}, ["prompt is empty"]),
    "number as prompt": ({"prompt": 3, "answer": "1"}, ["prompt is a int"]),
    "message without content": ({"prompt": [{"role": "user"}], "answer": "1"}, ["role and a content"]),
    "null answer": ({"prompt": "p", "answer": None}, ["answer is empty"]),
    "blank answer": ({"prompt": "p", "answer": " #### "}, ["answer is empty"]),
    "infinite answer": ({"prompt": "p", "answer": float("inf")}, ["answer is inf"]),
    "list as answer": ({"prompt": "p", "answer": ["1"]}, ["answer is a list"]),
    "not an object": (["p", "1"], ["a list, not an object"]),
}


@pytest.mark.parametrize(("row", "parts"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_row_is_named(tmp_path: Path, row: Any, parts: list[str]) -> None:
    check_error(write_lines(tmp_path / "data.jsonl", GOOD, row, GOOD), "data.jsonl: row 2", *parts)


@pytest.mark.parametrize("name", ["Question", "Incorrect Answer 2"])
def test_gpqa_row_without_a_choice(tmp_path: Path, name: str) -> None:
    path = write_lines(tmp_path / "gpqa.jsonl", {**GPQA_ROW, name: None})
    check_error(path, "gpqa.jsonl: row 1", "question or one of its four choices is empty")


def test_format_rows_without_content(tmp_path: Path) -> None:
    svamp = {"Body": "b", "Question": None, "Equation": None, "Answer": 1}
    check_error(write_lines(tmp_path / "svamp.jsonl", svamp), "row 1", "prompt is empty")
    arith = {"sQuestion": "q", "lEquations": [], "lSolutions": []}
    check_error(write_lines(tmp_path / "arith.jsonl", arith), "row 1", "answer is empty")
    verl = {"prompt": "p", "reward_model": None}
    check_error(write_lines(tmp_path / "verl.jsonl", verl), "row 1", "answer is empty")


def test_unknown_format(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", {"text": "p", "label": "1"})
    check_error(path, "row 1", "[text, label]", "no known format", "GSM8K", "--prompt_column", "--answer_column")
    check_error(path, "row 1", "--answer_column", prompt_column="text")
    check_error(path, "row 1", "no field 'solution'", prompt_column="text", answer_column="solution")


def test_broken_json_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "p", "answer": "1"}\n\n{"prompt": "p", "answer"\n', encoding="utf-8")
    check_error(str(path), "data.jsonl:3", "not valid JSON")
    path.write_text("[" * 100_000, encoding="utf-8")
    check_error(str(path), "data.jsonl:1", "JSON")
    listed = tmp_path / "data.json"
    listed.write_text('[\n{"prompt": "p", "answer": "1"},\n{"prompt": }\n]', encoding="utf-8")
    check_error(str(listed), "data.json:3", "not valid JSON")


@pytest.mark.parametrize("text", ["", "\n \n", "[]"])
def test_empty_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "data.json").write_text(text, encoding="utf-8")
    check_error(str(tmp_path / "data.json"), "data.json", "no rows")


def test_unreadable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_error(str(tmp_path), str(tmp_path), "is a directory")
    check_error(str(tmp_path / "none.jsonl"), "none.jsonl", "no such file")
    check_error("data/none.parquet", "none.parquet", "no such file")
    (tmp_path / "data.txt").write_text("prompt,answer\n", encoding="utf-8")
    check_error(str(tmp_path / "data.txt"), "data.txt", "'.txt'", ".jsonl")
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "p", "answer": "1"}\n{"prompt": "é"}'.encode("latin-1"))
    check_error(str(tmp_path / "latin.jsonl"), "latin.jsonl:2", "UTF-8")
    (tmp_path / "data.parquet").write_bytes(b"PAR1 and nothing else")
    check_error(str(tmp_path / "data.parquet"), "data.parquet", "not a readable parquet file")

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)  # chmod would not stop the user root
    check_error(str(tmp_path / "latin.jsonl"), "latin.jsonl", "Permission denied", "permissions")


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_below_one(limit: int) -> None:
    check_error("data.jsonl", f"limit is {limit}", "at least 1", limit=limit)


def test_hub_name_and_config(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str) -> list[dict[str, str]]:
        requests.append((name, config, split))
        return [{"question": "q", "answer": "so <<1+1=2>>2\n#### 2"}] * 3

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    rows = load_rows("openai/gsm8k:main", split="test", limit=2)
    assert rows == [{"prompt": "q", "answer": "2", "chain": "1+1=2"}] * 2
    load_rows("org/set-v1.5")
    assert requests == [("openai/gsm8k", "main", "test"), ("org/set-v1.5", None, "train")]


def test_hub_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("could not reach the hub\nand much more")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    check_error("org/none", "org/none", "'train'", "ConnectionError: could not reach the hub", "local .json")
