"""Odd and broken data: fields that some rows lack, columns for rewards, and one line with file and row for the rest."""

from __future__ import annotations

import csv
import datetime
import json
import warnings
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from datasets import Dataset

from latent_grpo.data.rows import load_rows
from latent_grpo.errors import DataError

GOOD = {"prompt": "p", "answer": "1"}
# Half of the rows lack a field, in each of the ways in which a row can lack one.
OPTIONAL = [
    {"problem": "1+2?", "answer": "3", "solution": "1+2=3", "level": 1, "tags": ["a"]},
    {"problem": "2+2?", "answer": "4", "solution": None, "level": None, "tags": None},
    {"problem": "3+2?", "answer": "5", "solution": "3+2=5", "level": 2, "tags": []},
    {"problem": "4+2?", "answer": "6"},
]
ORDERS = pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]], ids=str)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write rows in the format of the suffix."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("\r\n".join(map(json.dumps, rows)), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8-sig", newline="") as stream:
            names = list(dict.fromkeys(name for row in rows for name in row))
            writer = csv.DictWriter(stream, names)
            writer.writeheader()
            writer.writerows(rows)
    else:
        table = pyarrow.Table.from_pylist(rows, pyarrow.Table.from_pylist(rows[:1]).schema if len(rows) < 2 else None)
        write_table(path, table)
    return str(path)


def write_table(path: Path, table: pyarrow.Table) -> str:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(str(path), table.schema) as stream:
            stream.write_table(table)
    return str(path)


def message_of(source: str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        load_rows(source, **options)
    assert "\n" not in str(caught.value)
    assert Path(source).name in str(caught.value)
    return str(caught.value)


@ORDERS
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet", ".arrow"])
def test_a_row_may_lack_whatever_is_not_its_prompt_or_answer(suffix, order, tmp_path):
    records = [OPTIONAL[i] for i in order]
    names = ["problem", "answer", "solution", "level", "tags"]
    if suffix in (".parquet", ".arrow"):  # Arrow takes the columns from the first row
        records = [{name: row.get(name) for name in names} for row in records]
    rows = load_rows(write(tmp_path / f"data{suffix}", records), keep_columns=True)
    assert [row["prompt"] for row in rows] == [OPTIONAL[i]["problem"] for i in order]
    for row, i in zip(rows, order, strict=True):
        assert row.get("chain") == OPTIONAL[i].get("solution")
        assert str(row.get("level")) == str(OPTIONAL[i].get("level"))
    plain = [{key: row[key] for key in ("prompt", "answer", "chain") if key in row} for row in rows]
    assert load_rows(str(tmp_path / f"data{suffix}")) == plain


@ORDERS
def test_the_format_does_not_depend_on_the_first_row(order, tmp_path):
    records = [
        {"question": "a", "steps": ["<<1+1=2>>"], "answer": "2"},
        {"question": "b", "answer": "3"},
        {"question": "c", "steps": None, "answer": "4"},
        {"question": "d", "steps": ["<<2+3=5>>"], "answer": "5"},
    ]
    rows = load_rows(write(tmp_path / "data.jsonl", [records[i] for i in order]))
    assert {row["prompt"]: row.get("chain") for row in rows} == {"a": "1+1=2", "b": None, "c": None, "d": "2+3=5"}


def test_a_named_chain_may_be_missing_in_some_rows_and_not_in_all(tmp_path):
    path = write(tmp_path / "data.jsonl", [{**GOOD}, {**GOOD, "why": "c"}])
    assert [row.get("chain") for row in load_rows(path, chain_column="why")] == [None, "c"]
    assert "no field 'because', nor in another row" in message_of(path, chain_column="because")


def test_other_columns_keep_name_and_type(tmp_path):
    extra = {
        "question": "q",
        "ids": [1, 2],
        "info": {"a": [1]},
        "text": "t",
        "completions": 1,
        "score": 0.5,
        "ok": True,
    }
    for suffix in (".json", ".jsonl", ".parquet", ".arrow"):
        path = write(tmp_path / f"data{suffix}", [{**extra, "solution": "2"}])
        (row,) = load_rows(path, keep_columns=True, prompt_column="question", answer_column="solution")
        assert row == {**extra, "solution": "2", "prompt": "q", "answer": "2"}


def test_a_column_whose_name_stands_for_another_one_is_named(tmp_path):
    path = write(tmp_path / "data.jsonl", [{**GOOD, "gold": "7", "chain": "c", "answer_text": "t"}])
    options = dict(prompt_column="prompt", answer_column="gold")
    with pytest.warns(UserWarning, match="reward functions do not get its column") as caught:
        (row,) = load_rows(path, keep_columns=True, **options)
    assert row == {"gold": "7", "prompt": "p", "answer": "7"}
    messages = [str(warning.message) for warning in caught]
    assert [name for name in ("answer", "chain", "answer_text") if any(f"column {name!r}," in m for m in messages)] == [
        "answer",
        "chain",
        "answer_text",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_rows(path, **options)
        load_rows(write(tmp_path / "gsm.jsonl", [{"question": "q", "answer": "#### 1"}]), keep_columns=True)


BROKEN = {
    "utf-16": (".jsonl", json.dumps(GOOD).encode("utf-16"), "data.jsonl:1: not UTF-8"),
    "cut": (".jsonl", b'{"prompt": "p", "answer": "1"}\n{"prompt": "p", "ans', "data.jsonl:2: not valid JSON"),
    "null byte": (".jsonl", b'{"prompt": "p\0", "answer": "1"}', "data.jsonl:1: not valid JSON"),
    "key twice": (
        ".jsonl",
        b'{"prompt": "p", "answer": "1"}\r\n{"prompt": "p", "answer": "1", "answer": "2"}',
        "row 2: the key 'answer' occurs twice",
    ),
    "key twice in a list": (
        ".json",
        b'[{"prompt": "p", "answer": "1"}, {"prompt": "p", "prompt": "q", "answer": "1"}]',
        "row 2: the key 'prompt' occurs twice",
    ),
    "key twice in a message": (
        ".jsonl",
        b'{"prompt": [{"role": "user", "content": "a", "content": "b"}], "answer": "1"}',
        "row 1: the key 'content' occurs twice",
    ),
    "one object": (
        ".json",
        b'{\n "train": [{"prompt": "p", "answer": "1"}]\n}',
        "holds one JSON object with the keys [train]",
    ),
    "no list": (".jsonl", b"3\n", "row 1: a int, not an object"),
    "half a character": (
        ".jsonl",
        b'{"prompt": "p \\ud83d", "answer": "1"}',
        "row 1: the prompt holds '\\ud83d', which is half a character",
    ),
    "half a character in messages": (
        ".jsonl",
        b'{"prompt": [{"role": "user", "content": "\\udc00"}], "answer": "1"}',
        "row 1: the prompt holds",
    ),
    "half a character in the chain": (
        ".jsonl",
        b'{"prompt": "p", "answer": "1", "chain": "\\ud83d"}',
        "row 1: the chain holds",
    ),
    "NaN as answer": (".jsonl", b'{"prompt": "p", "answer": NaN}', "row 1: the answer is nan"),
    "NaN as prompt": (".jsonl", b'{"prompt": NaN, "answer": "1"}', "row 1: the prompt is a float"),
    "number as chain": (
        ".jsonl",
        b'{"prompt": "p", "answer": "1", "chain": 3}',
        "row 1: the chain of thought holds 3, not a text",
    ),
    "objects as chain": (
        ".jsonl",
        b'{"prompt": "p", "answer": "1", "chain": [{"step": "a"}]}',
        "row 1: the chain of thought holds {'step': 'a'}",
    ),
    "text, then messages": (
        ".jsonl",
        b'{"prompt": "p", "answer": "1"}\n{"prompt": [{"role": "user", "content": "q"}], "answer": "1"}',
        "row 2: the prompt is messages, that of the first row a text",
    ),
    "messages, then text": (
        ".jsonl",
        b'{"prompt": [{"role": "user", "content": "q"}], "answer": "1"}\n{"prompt": "p", "answer": "1"}',
        "row 2: the prompt is a text, that of the first row messages",
    ),
    "csv without rows": (".csv", b"prompt,answer\r\n", "has no rows"),
    "csv, nothing": (".csv", b"", "has no rows"),
    "csv, column twice": (".csv", b"prompt,answer,answer\np,1,2\n", "the column 'answer' occurs twice"),
    "csv, short row": (".csv", b"prompt,answer\np,1\n\nq\n", "row 2 (line 4) has 1 cells, the header has 2"),
    "csv, long row": (".csv", b"prompt,answer\np,1,2\n", "row 1 (line 2) has 3 cells"),
    "csv, open quote": (".csv", b'prompt,answer\n"p,1\n', "not valid CSV"),
    "csv, no answer": (".csv", b"prompt,answer\np,\n", "row 1: the answer is empty"),
    "arrow": (".arrow", b"ARROW1 and nothing else", "not a readable arrow file"),
    "arrow, empty": (".arrow", b"", "not a readable arrow file"),
    "parquet, empty": (".parquet", b"", "not a readable parquet file"),
}


@pytest.mark.parametrize(("suffix", "data", "words"), BROKEN.values(), ids=BROKEN)
def test_broken_data_is_one_line_with_file_and_row(suffix, data, words, tmp_path):
    path = tmp_path / f"data{suffix}"
    path.write_bytes(data)
    assert words in message_of(str(path))


STRING = pyarrow.string()
PROMPTS = {
    "large string": pyarrow.array(["p", "q"], pyarrow.large_string()),
    "string view": pyarrow.array(["p", "q"], pyarrow.string_view()),
    "dictionary": pyarrow.array(["p", "q"]).dictionary_encode(),
}
MESSAGES = [[{"role": "user", "content": "p", "name": None}], [{"role": "user", "content": "q", "name": "x"}]]
ANSWERS = {
    "decimal": (pyarrow.array([Decimal("42.00"), Decimal("0.50")]), ["42", "0.50"]),
    "int8": (pyarrow.array([1, 2], pyarrow.int8()), ["1", "2"]),
    "float16": (pyarrow.array([1.0, 2.5], pyarrow.float32()).cast(pyarrow.float16()), ["1", "2.5"]),
    "dictionary": (pyarrow.array(["1", "1"]).dictionary_encode(), ["1", "1"]),
}


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize(("answers", "expected"), ANSWERS.values(), ids=ANSWERS)
def test_types_of_arrow_that_have_a_meaning(prompts, answers, expected, tmp_path):
    path = write_table(tmp_path / "data.parquet", pyarrow.table({"prompt": prompts, "answer": answers}))
    assert load_rows(path) == [{"prompt": p, "answer": a} for p, a in zip("pq", expected, strict=True)]


def test_nested_messages_and_lists_of_structs(tmp_path):
    tags = [[{"name": "a", "weight": 1.0}], []]
    table = pyarrow.table({"prompt": MESSAGES, "answer": ["1", "2"], "tags": tags})
    rows = load_rows(write_table(tmp_path / "data.arrow", table), keep_columns=True)
    assert [row["prompt"] for row in rows] == [[{"role": "user", "content": text}] for text in "pq"]
    assert [row["tags"] for row in rows] == tags


WRONG = {
    "binary prompt": (pyarrow.array([b"p", b"q"]), ["1", "2"], "row 1: the prompt is a bytes"),
    "date as answer": (["p", "q"], [datetime.date(2020, 1, 1)] * 2, "row 1: the answer is a date"),
    "null answer": (["p", "q"], ["1", None], "row 2: the answer is empty"),
    "no column but nulls": (["p", "q"], pyarrow.nulls(2), "row 1: the answer is empty"),
    "not a number": (["p", "q"], [1.0, float("nan")], "row 2: the answer is nan"),
    "infinite decimal": (["p", "q"], [["1"], ["2"]], "row 1: the answer is a list"),
}


@pytest.mark.parametrize(("prompts", "answers", "words"), WRONG.values(), ids=WRONG)
def test_types_of_arrow_that_have_none_are_one_line(prompts, answers, words, tmp_path):
    table = pyarrow.table({"prompt": prompts, "answer": answers})
    assert words in message_of(write_table(tmp_path / "data.parquet", table))


def test_a_value_that_cannot_be_read_is_named_where_its_column_is_used(tmp_path):
    broken = pyarrow.Array.from_buffers(STRING, 2, pyarrow.array([b"ok", b"\xff\xfe"]).buffers())
    table = pyarrow.table({"prompt": ["p", "q"], "answer": ["1", "2"], "note": broken})
    path = write_table(tmp_path / "data.arrow", table)
    with pytest.raises(DataError, match="row 2: the column 'note' of type string cannot be read"):
        load_rows(path, answer_column="note")
    plain = [{"prompt": "p", "answer": "1"}, {"prompt": "q", "answer": "2"}]
    assert load_rows(path) == plain  # nobody uses the column
    with pytest.warns(UserWarning, match="row 2: the column 'note' .* reward functions get None there"):
        assert load_rows(path, keep_columns=True) == [{"note": "ok", **plain[0]}, plain[1]]


def test_half_a_character_in_a_kept_field_is_named(tmp_path):
    path = tmp_path / "data.jsonl"
    row = {"prompt": "p", "answer": "1", "meta": {"tags": ["a", "\ud83d"]}}
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"row 1: the field 'meta' holds '\\ud83d', which is half a character"):
        load_rows(str(path), keep_columns=True)


def test_a_column_that_occurs_twice_is_named(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["p"])] * 3, ["prompt", "answer", "answer"])
    assert "the column 'answer' occurs twice" in message_of(write_table(tmp_path / "data.arrow", table))


def test_a_file_that_datasets_saved_is_read(tmp_path):
    Dataset.from_list([{"question": "q", "answer": "#### 1"}]).save_to_disk(str(tmp_path))
    (file,) = tmp_path.glob("*.arrow")
    assert load_rows(str(file)) == [{"prompt": "q", "answer": "1"}]


def test_a_missing_number_that_a_table_wrote_as_text_is_no_answer(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("question,answer\na,1\nb,NaN\n", encoding="utf-8")
    assert "row 2: the answer is 'NaN'" in message_of(str(path))


def test_latent_steps_are_read_as_a_list_of_texts(tmp_path):
    row = {"prompt": "p", "chain": "d l", "answer": "l"}
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps(r) + "\n" for r in ({**row, "latent_steps": ["d e", "l m"]}, {**row, "prompt": "q"}))
    )
    assert [r.get("latent_steps") for r in load_rows(str(path))] == [["d e", "l m"], None]
    for steps in ("d e", [], ["d", 3], ["d", " "]):
        path.write_text(json.dumps({**row, "latent_steps": steps}) + "\n")
        with pytest.raises(DataError, match=r"latent_steps is .*; give a list of texts"):
            load_rows(str(path))
