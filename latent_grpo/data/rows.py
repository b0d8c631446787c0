"""Question-answer data sets, read from a local file or the Hugging Face Hub into one row shape.

Every source becomes a list of rows ``{"prompt": str | list of chat messages, "answer": str}``. A row has a third key
``"chain"``, the chain of thought as a string, if the source has one. The format is recognised by the field names of the
first row (``FORMATS``). ``prompt_column``, ``answer_column`` and ``chain_column`` read every other format.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

from latent_grpo.errors import DataError, first_line

FILE_SUFFIXES = (".json", ".jsonl", ".parquet")
# Suffixes that mark a source as a file. They are listed because a Hub name may contain a dot too ("org/set-v1.5").
_FILE_LIKE = (*FILE_SUFFIXES, ".arrow", ".csv", ".gz", ".ndjson", ".tsv", ".txt", ".yaml", ".yml", ".zip")
_COLUMN_REMEDY = "name the fields with --prompt_column and --answer_column"

_CALCULATOR_MARK = re.compile(r"<<(.*?)>>", re.DOTALL)  # <<48/2=24>> in GSM8K
_GROUPED_NUMBER = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_INTEGRAL_DECIMAL = re.compile(r"([-+]?\d+)\.0+")
_INTEGRAL_IN_EQUATION = re.compile(r"(?<![\d.])(\d+)\.0+(?!\d)")


@dataclass(frozen=True)
class Fields:
    """The values of one source row as the source has them, before they are checked."""

    prompt: Any
    answer: Any
    chain: Any = None


@dataclass(frozen=True)
class Format:
    """One upstream format: the field names that identify it, and the function that reads a row of it."""

    name: str
    required: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Fields]


@dataclass(frozen=True)
class _Record:
    """A source row, and the place that error messages name for it, such as ``train.jsonl: row 3``."""

    place: str
    value: Any


@dataclass(frozen=True)
class _Columns:
    """The fields that the user has chosen. None leaves the choice to the recognised format."""

    prompt: str | None
    answer: str | None
    chain: str | None

    def named(self) -> list[str]:
        return [name for name in (self.prompt, self.answer, self.chain) if name is not None]


def load_rows(
    source: str,
    *,
    split: str = "train",
    prompt_column: str | None = None,
    answer_column: str | None = None,
    chain_column: str | None = None,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Read a data set into rows of ``prompt``, ``answer`` and, if the source has one, ``chain``.

    Args:
        source: a ``.json`` (a list of objects, or JSON lines), ``.jsonl`` or ``.parquet`` file, or the name of a Hub
            data set, with a configuration as ``name:config``.
        split: the split of a Hub data set. A local file is read as a whole.
        prompt_column, answer_column, chain_column: the fields to read instead of those that the format has.
        limit: the number of rows to read from the start; None reads all.

    Returns:
        One dict per row, in source order. ``prompt`` is a string, or a list of ``{"role", "content"}`` messages if the
        source has messages. ``answer`` is only the final answer: N of a text with ``#### N``, and numbers without
        thousands commas and without ``.0``. ``chain`` is the contents of the calculator marks (``48/2=24 48+24=72``) if
        the source has marks, else the text of the rationale.

    Raises:
        DataError: ``limit`` is below 1, the source cannot be read, it is empty or of no known format, or a row has no
            prompt or no answer.
    """
    if limit is not None and limit < 1:
        raise DataError(f"{source}: limit is {limit}; give at least 1, or leave it out for all rows")
    columns = _Columns(prompt_column, answer_column, chain_column)
    path = Path(os.path.expanduser(source))
    records = list(islice(_read_file(path) if _is_file_like(path, source) else _read_hub(source, split), limit))
    if not records:
        raise DataError(f"{source}: has no rows; give a source with at least one row")
    source_format = _recognise(records[0], columns)
    return [_row(record, source_format, columns) for record in records]


def _is_file_like(path: Path, source: str) -> bool:
    # A missing file must be reported as one, and not be looked for on the Hub. A Hub name has at most one slash.
    return (
        os.path.exists(path)  # Path.exists would raise an error for a path in a folder without permission
        or path.suffix.lower() in _FILE_LIKE
        or source.startswith((".", "/", "~"))
        or "\\" in source
        or source.count("/") > 1
    )


def _read_file(path: Path) -> Iterator[_Record]:
    suffix = path.suffix.lower()
    if os.path.isdir(path):
        raise DataError(f"{path}: is a directory; give one of the files in it")
    if not os.path.exists(path):
        raise DataError(f"{path}: no such file; check the path (a Hub data set is given as name or name:config)")
    if suffix not in FILE_SUFFIXES:
        raise DataError(f"{path}: the suffix {suffix!r} is not one of {', '.join(FILE_SUFFIXES)}; convert the file")
    if suffix == ".parquet":
        return _read_parquet(path)
    text = _read_text(path)
    return _read_json(path, text) if suffix == ".json" else _read_json_lines(path, text)


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from error


def _read_json(path: Path, text: str) -> Iterator[_Record]:
    """Read a JSON array of objects, or JSON lines in a file with the suffix .json."""
    if not text.lstrip().startswith("["):
        return _read_json_lines(path, text)
    values = _parse_json(text, path, start=1)
    return (_Record(f"{path}: row {number}", value) for number, value in enumerate(values, start=1))


def _read_json_lines(path: Path, text: str) -> Iterator[_Record]:
    # str.splitlines would also cut at U+2028 and similar characters, which JSON strings may contain unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _Record(f"{path}: row {number}", _parse_json(line, path, start=number))


def _parse_json(text: str, path: Path, *, start: int) -> Any:
    """Return the value of JSON text that starts at line `start` of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = start + error.lineno - 1
        raise DataError(
            f"{path}:{line}: not valid JSON ({error.msg} at column {error.colno}); "
            "correct the line: a file has one JSON object per line, or one list of objects"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or thousands of brackets
        raise DataError(f"{path}:{start}: JSON that cannot be read ({first_line(error)}); correct it") from error


def _read_parquet(path: Path) -> Iterator[_Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with path.open("rb") as stream:
            values = pyarrow.parquet.read_table(stream).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable parquet file ({first_line(error)}); write it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or first_line(error)}); check the file") from error
    return (_Record(f"{path}: row {number}", value) for number, value in enumerate(values, start=1))


def _read_hub(source: str, split: str) -> Iterator[_Record]:
    import datasets

    name, _, config = source.partition(":")
    try:
        table = datasets.load_dataset(name, config or None, split=split)
    # The client raises errors of many kinds: for the network, gated access, an unknown name, config or split.
    except Exception as error:
        raise DataError(
            f"{source}: the split {split!r} could not be loaded from the Hugging Face Hub "
            f"({type(error).__name__}: {first_line(error)}); check the name, the config (name:config), the split "
            "and the network, or give a local .json, .jsonl or .parquet file"
        ) from error
    return (_Record(f"{source}[{split}]: row {number}", value) for number, value in enumerate(table, start=1))


def _recognise(first: _Record, columns: _Columns) -> Format | None:
    """Return the format of the source, or None if the user has named all the fields that a row needs."""
    fields = _mapping(first)
    source_format = next((each for each in FORMATS if all(name in fields for name in each.required)), None)
    if source_format is None and (columns.prompt is None or columns.answer is None):
        raise DataError(
            f"{first.place}: the fields {_listed(fields)} are of no known format "
            f"({', '.join(each.name for each in FORMATS)}); {_COLUMN_REMEDY}"
        )
    # With both fields named, a row need not have the other fields of a format that it happens to resemble.
    return None if columns.prompt is not None and columns.answer is not None else source_format


def _row(record: _Record, source_format: Format | None, columns: _Columns) -> dict[str, Any]:
    source = _mapping(record)
    for name in (*(source_format.required if source_format else ()), *columns.named()):
        if name not in source:
            raise DataError(f"{record.place}: no field {name!r}, only {_listed(source)}; {_COLUMN_REMEDY}")
    try:
        fields = source_format.read(source) if source_format else Fields(prompt=None, answer=None)
    except DataError as error:
        raise DataError(f"{record.place}: {error}") from error
    prompt = fields.prompt if columns.prompt is None else source[columns.prompt]
    answer = fields.answer if columns.answer is None else source[columns.answer]
    chain = _chain_text(fields.chain if columns.chain is None else source[columns.chain])
    row = {"prompt": _checked_prompt(prompt, record.place), "answer": _checked_answer(answer, record.place)}
    return {**row, "chain": chain} if chain else row


def _mapping(record: _Record) -> Mapping[str, Any]:
    if not isinstance(record.value, Mapping):
        kind = type(record.value).__name__
        raise DataError(f"{record.place}: a {kind}, not an object with fields; write one JSON object per row")
    return record.value


def _listed(fields: Iterable[str]) -> str:
    return "[" + ", ".join(fields) + "]"


def _checked_prompt(prompt: Any, place: str) -> str | list[dict[str, str]]:
    if isinstance(prompt, str) and prompt.strip():
        return prompt.strip()
    if isinstance(prompt, list) and prompt:
        return [_checked_message(message, place) for message in prompt]
    if prompt is None or prompt == [] or isinstance(prompt, str):
        raise DataError(f"{place}: the prompt is empty; remove the row, or {_COLUMN_REMEDY}")
    kind = type(prompt).__name__
    raise DataError(f"{place}: the prompt is a {kind}, not a string or a list of messages; {_COLUMN_REMEDY}")


def _checked_message(message: Any, place: str) -> dict[str, str]:
    role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
    if not (isinstance(role, str) and role and isinstance(content, str) and content.strip()):
        raise DataError(f"{place}: a prompt message is {message!r:.80}; give each a role and a content, both non-empty")
    return {"role": role, "content": content}


def _checked_answer(answer: Any, place: str) -> str:
    if isinstance(answer, float) and not math.isfinite(answer):
        raise DataError(f"{place}: the answer is {answer}; remove the row, or {_COLUMN_REMEDY}")
    if answer is not None and not isinstance(answer, str | int | float):
        kind = type(answer).__name__
        raise DataError(f"{place}: the answer is a {kind}, not a string or a number; {_COLUMN_REMEDY}")
    text = "" if answer is None else _answer_text(answer)
    if not text:
        raise DataError(f"{place}: the answer is empty; remove the row, or {_COLUMN_REMEDY}")
    return text


def _answer_text(answer: str | int | float) -> str:
    """Return only the final answer as text, an integer without ``.0`` and commas."""
    if isinstance(answer, float):
        # Without an exponent and with every digit of the shortest exact form: 2.0107e-06 becomes 0.0000020107.
        answer = format(Decimal(repr(answer)), "f")
    text = str(answer).rpartition("####")[2].strip()
    if _GROUPED_NUMBER.fullmatch(text):
        text = text.replace(",", "")
    integral = _INTEGRAL_DECIMAL.fullmatch(text)
    return integral[1] if integral else text


def _chain_text(chain: Any) -> str:
    """Return the chain of thought as one string: the calculator marks if there are any, else the text to ``####``."""
    if chain is None:
        return ""
    steps = [str(step) for step in chain] if isinstance(chain, list | tuple) else [str(chain)]
    marks = [mark.strip() for step in steps for mark in _CALCULATOR_MARK.findall(step)]
    text = " ".join(marks) if marks else " ".join(step.strip() for step in steps)
    return text.partition("####")[0].strip()


def _plain(prompt: str, answer: str, chain: str | None = None) -> Callable[[Mapping[str, Any]], Fields]:
    """Return a reader of a format whose fields need no conversion. A row may lack the field ``chain``."""
    return lambda row: Fields(row[prompt], row[answer], row.get(chain) if chain else None)


def _question_answer(row: Mapping[str, Any]) -> Fields:
    """Read a row of GSM8K. Its answer field contains the rationale too, unless there is no ``####`` in it."""
    answer = row["answer"]
    return Fields(row["question"], answer, answer if isinstance(answer, str) and "####" in answer else None)


def _svamp(row: Mapping[str, Any]) -> Fields:
    """Read a row of SVAMP. Its prompt is the story, then the question about it."""
    prompt = f"{str(row['Body'] or '').strip()} {str(row['Question']).strip()}" if row["Question"] else None
    return Fields(prompt, row["Answer"], _equation_chain(row["Equation"], row["Answer"]))


def _multiarith(row: Mapping[str, Any]) -> Fields:
    answer = _first(row["lSolutions"])
    return Fields(row["sQuestion"], answer, _equation_chain(_first(row["lEquations"]), answer))


def _equation_chain(equation: Any, answer: Any) -> str | None:
    """Return an annotated equation as a calculator mark writes it: ``X=((32.0+42.0)-35.0)`` -> ``(32+42)-35=39``."""
    if not isinstance(equation, str) or not isinstance(answer, str | int | float) or not equation.strip():
        return None
    text = _INTEGRAL_IN_EQUATION.sub(r"\1", "".join(equation.split())).removeprefix("X=")
    return f"{_without_outer_brackets(text)}={_answer_text(answer)}"


def _without_outer_brackets(text: str) -> str:
    if not (text.startswith("(") and text.endswith(")")):
        return text
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        # The first bracket is an outer one only if it closes at the end, unlike in (1+2)*(3+4).
        if depth == 0:
            return text[1:-1] if position == len(text) - 1 else text
    return text


def _first(values: Any) -> Any:
    return values[0] if isinstance(values, list) and values else None


def _gpqa(row: Mapping[str, Any]) -> Fields:
    """Read a row of GPQA into a prompt with four lettered choices.

    Their order is that of a hash of the question and the choice. So it is balanced over the rows, and is the same in
    every run, on every Python, and for every selection and order of the rows.
    """
    question, *choices = (str(row[name] or "").strip() for name in ("Question", *_GPQA_CHOICES))
    if not question or not all(choices):
        raise DataError("the question or one of its four choices is empty; remove the row")
    order = sorted(range(4), key=lambda i: hashlib.sha256(f"{question}\0{choices[i]}".encode()).digest())
    lines = [f"{letter}. {choices[i]}" for letter, i in zip("ABCD", order, strict=True)]
    prompt = "\n".join([question, "", *lines, "", "Answer with the letter of the correct choice."])
    return Fields(prompt, "ABCD"[order.index(0)], row.get("Explanation"))


def _verl(row: Mapping[str, Any]) -> Fields:
    """Read a row of the released Latent-GRPO parquet files, whose schema is verl's."""
    reward_model, extra = row["reward_model"], row.get("extra_info")
    answer = reward_model.get("ground_truth") if isinstance(reward_model, Mapping) else None
    original = extra.get("answer") if isinstance(extra, Mapping) else None
    has_rationale = isinstance(original, str) and "####" in original
    return Fields(row["prompt"], answer, original if has_rationale else None)


_GPQA_CHOICES = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")

# The first format whose fields are all present is taken, so a format comes before others that need fewer of its fields.
FORMATS = (
    Format("Latent-GRPO/verl", ("prompt", "reward_model"), _verl),
    Format("GPQA", ("Question", *_GPQA_CHOICES), _gpqa),
    Format("GSM8K-Aug", ("question", "steps", "answer"), _plain("question", "answer", "steps")),
    Format("GSM8K-Aug with cot", ("question", "cot", "answer"), _plain("question", "answer", "cot")),
    Format("GSM8K", ("question", "answer"), _question_answer),
    Format("GSM-Hard", ("input", "code", "target"), _plain("input", "target")),
    Format("SVAMP", ("Body", "Question", "Equation", "Answer"), _svamp),
    Format("MultiArith", ("sQuestion", "lEquations", "lSolutions"), _multiarith),
    Format("MultiArith on the Hub", ("question", "final_ans"), _plain("question", "final_ans")),
    Format("MATH-500 or AIME", ("problem", "answer"), _plain("problem", "answer", "solution")),
    Format("AIME on the Hub", ("Problem", "Answer"), _plain("Problem", "Answer", "Solution")),
    Format("prompt and answer", ("prompt", "answer"), _plain("prompt", "answer", "chain")),
)
