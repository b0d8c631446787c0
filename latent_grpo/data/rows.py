"""Question-answer data sets, read from a local file or the Hugging Face Hub into one row shape.

Every source becomes a list of rows ``{"prompt": str | list of chat messages, "answer": str}``. A row has a third key
``"chain"``, the chain of thought as a string, if the source has one, and a fourth key ``"answer_text"`` if the source
has the visible answer of a training text. The format is recognised by the field names of the first row (``FORMATS``).
``prompt_column``, ``answer_column`` and ``chain_column`` read every other format.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain as chained
from itertools import islice
from pathlib import Path
from typing import Any

from latent_grpo.config import DataOptions
from latent_grpo.data.formats import FORMATS, Fields, Format, chain_text, final_answer
from latent_grpo.errors import DataError, first_line

FILE_SUFFIXES = (".json", ".jsonl", ".parquet")
# Suffixes that mark a source as a file. They are listed because a Hub name may contain a dot too ("org/set-v1.5").
_FILE_LIKE = (*FILE_SUFFIXES, ".arrow", ".csv", ".gz", ".ndjson", ".tsv", ".txt", ".yaml", ".yml", ".zip")
_COLUMN_REMEDY = "name the fields with --prompt_column and --answer_column"
# Behind the colon of a Hub name stands a file if it ends like one, else a configuration.
_HUB_FILE = re.compile(r"(?P<name>[\w.-]+/[\w.-]+):(?P<file>[^:]+\.(?:parquet|jsonl?))", re.IGNORECASE)


@dataclass(frozen=True)
class Record:
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
    expected_columns: Sequence[str] = (),
    deduplicate: bool = False,
    repeated_prompts: float = 0.1,
) -> list[dict[str, Any]]:
    """Read a data set into rows of ``prompt``, ``answer`` and, if the source has them, ``chain`` and ``answer_text``.

    Warns, with the counts, if a larger share of the prompts than ``repeated_prompts`` is a repetition.

    Args:
        source: a ``.json`` (a list of objects, or JSON lines), ``.jsonl`` or ``.parquet`` file, or the name of a Hub
            data set, with a configuration as ``name:config`` or one of its files as ``name:file.parquet``.
        split: the split of a Hub data set. A local file is read as a whole.
        prompt_column, answer_column, chain_column: the fields to read instead of those that the format has.
        limit: the number of rows to read from the start; None reads all.
        expected_columns: fields without which the source is another one than was meant.
        deduplicate: keep only the first row of each prompt, before ``limit`` counts.
        repeated_prompts: the share of repeated prompts above which the warning is printed.

    Returns:
        One dict per row, in source order. ``prompt`` is a string, or a list of ``{"role", "content"}`` messages if the
        source has messages. ``answer`` is only the final answer: N of a text with ``#### N``, and numbers without
        thousands commas and without ``.0``. ``chain`` is the contents of the calculator marks (``48/2=24 48+24=72``) if
        the source has marks, else the text of the rationale.

    Raises:
        DataError: ``limit`` is below 1, the source cannot be read, it is empty, lacks an expected column or is of no
            known format, or a row has no prompt or no answer.
    """
    if limit is not None and limit < 1:
        raise DataError(f"{source}: limit is {limit}; give at least 1, or leave it out for all rows")
    columns = _Columns(prompt_column, answer_column, chain_column)
    records = read_records(source, split)
    first = next(records, None)
    if first is None:
        raise DataError(f"{source}: has no rows; give a source with at least one row")
    missing = [name for name in expected_columns if name not in fields_of(first)]
    if missing:
        raise DataError(
            f"{source}: has the columns {_listed(fields_of(first))} and lacks {_listed(missing)} of expected_columns: "
            "it is another set than was meant; give the set, or name the columns of this one with --expected_columns"
        )
    source_format = _recognise(first, columns)
    rows: Iterator[dict[str, Any]] = (_row(record, source_format, columns) for record in chained((first,), records))
    kept = list(islice(_without_repeats(rows) if deduplicate else rows, limit))
    _warn_of_repeats(source, kept, repeated_prompts)
    return kept


def load_training_rows(options: DataOptions) -> list[dict[str, Any]]:
    """Return the rows that the options of `sft` and `train` describe, as `load_rows` reads them."""
    columns = ("prompt_column", "answer_column", "chain_column")
    checks = ("limit", "expected_columns", "deduplicate", "repeated_prompts")
    chosen: dict[str, Any] = {name: getattr(options, name) for name in (*columns, *checks)}
    return load_rows(options.dataset, split=options.dataset_split, **chosen)


def _prompt_key(row: Mapping[str, Any]) -> Any:
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else tuple((m["role"], m["content"]) for m in prompt)


def _without_repeats(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    seen = set()
    for row in rows:
        key = _prompt_key(row)
        if key not in seen:
            seen.add(key)
            yield row


def _warn_of_repeats(source: str, rows: Sequence[Mapping[str, Any]], share: float) -> None:
    distinct = len({_prompt_key(row) for row in rows})
    if len(rows) - distinct > share * len(rows):
        known = "; the public upload of DAPO-Math-17k repeats each about a hundred times"
        warnings.warn(
            f"{source} repeats its prompts: {distinct:,} distinct prompts in {len(rows):,} rows"
            f"{known if 'dapo' in source.lower() else ''}; deduplicate: true keeps the first of each",
            stacklevel=3,
        )


def read_records(source: str, split: str) -> Iterator[Record]:
    """Yield the rows of a file or of a split of a Hub data set as they are. Raises as ``load_rows`` does."""
    path = Path(os.path.expanduser(source))
    return iter(_read_file(path) if _is_file_like(path, source) else _read_hub(source, split))


def _is_file_like(path: Path, source: str) -> bool:
    # A missing file must be reported as one, and not be looked for on the Hub. A Hub name has at most one slash.
    if os.path.exists(path):  # Path.exists would raise an error for a path in a folder without permission
        return True
    return not _HUB_FILE.fullmatch(source) and (
        path.suffix.lower() in _FILE_LIKE
        or source.startswith((".", "/", "~"))
        or "\\" in source
        or source.count("/") > 1
    )


def _read_file(path: Path) -> Iterator[Record]:
    suffix = path.suffix.lower()
    if os.path.isdir(path):
        raise DataError(f"{path}: is a directory; give one of the files in it")
    if not os.path.exists(path):
        raise DataError(
            f"{path}: no such file; check the path (a Hub data set is given as name, name:config or "
            "owner/name:file.parquet)"
        )
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


def _read_json(path: Path, text: str) -> Iterator[Record]:
    """Read a JSON array of objects, or JSON lines in a file with the suffix .json."""
    if not text.lstrip().startswith("["):
        return _read_json_lines(path, text)
    values = _parse_json(text, path, start=1)
    return (Record(f"{path}: row {number}", value) for number, value in enumerate(values, start=1))


def _read_json_lines(path: Path, text: str) -> Iterator[Record]:
    # str.splitlines would also cut at U+2028 and similar characters, which JSON strings may contain unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield Record(f"{path}: row {number}", _parse_json(line, path, start=number))


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


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with path.open("rb") as stream:
            values = pyarrow.parquet.read_table(stream).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable parquet file ({first_line(error)}); write it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or first_line(error)}); check the file") from error
    return (Record(f"{path}: row {number}", value) for number, value in enumerate(values, start=1))


def _read_hub(source: str, split: str) -> Iterator[Record]:
    import datasets

    name, _, config = source.partition(":")
    try:
        if _HUB_FILE.fullmatch(source):
            # The name of a single file does not say its split, so it gets the one that is asked for.
            table = datasets.load_dataset(name, data_files={split: config}, split=split)
        else:
            table = datasets.load_dataset(name, config or None, split=split)
    # The client raises errors of many kinds: for the network, gated access, an unknown name, config or split.
    except Exception as error:
        raise DataError(
            f"{source}: the split {split!r} could not be loaded from the Hugging Face Hub "
            f"({type(error).__name__}: {first_line(error)}); check the name, the config or file (name:config, "
            "name:file.parquet), the split and the network, or give a local .json, .jsonl or .parquet file"
        ) from error
    return (Record(f"{source}[{split}]: row {number}", value) for number, value in enumerate(table, start=1))


def _recognise(first: Record, columns: _Columns) -> Format | None:
    """Return the format of the source, or None if the user has named all the fields that a row needs."""
    fields = fields_of(first)
    source_format = next((each for each in FORMATS if all(name in fields for name in each.required)), None)
    if source_format is None and (columns.prompt is None or columns.answer is None):
        raise DataError(
            f"{first.place}: the fields {_listed(fields)} are of no known format "
            f"({', '.join(each.name for each in FORMATS)}); {_COLUMN_REMEDY}"
        )
    # With both fields named, a row need not have the other fields of a format that it happens to resemble.
    return None if columns.prompt is not None and columns.answer is not None else source_format


def _row(record: Record, source_format: Format | None, columns: _Columns) -> dict[str, Any]:
    source = fields_of(record)
    for name in (*(source_format.required if source_format else ()), *columns.named()):
        if name not in source:
            raise DataError(f"{record.place}: no field {name!r}, only {_listed(source)}; {_COLUMN_REMEDY}")
    try:
        fields = source_format.read(source) if source_format else Fields(prompt=None, answer=None)
    except DataError as error:
        raise DataError(f"{record.place}: {error}") from error
    prompt = fields.prompt if columns.prompt is None else source[columns.prompt]
    answer = fields.answer if columns.answer is None else source[columns.answer]
    exact = fields.exact and not columns.named()
    row = {"prompt": _checked_prompt(prompt, record.place, exact), "answer": _checked_answer(answer, record.place)}
    chain = fields.chain if columns.chain is None else source[columns.chain]
    chain = chain if exact else chain_text(chain)
    # An answer column replaces the text that the format has for its own answer.
    visible = fields.answer_text if columns.answer is None else None
    return {**row, **({"chain": chain} if chain else {}), **({"answer_text": visible} if visible else {})}


def fields_of(record: Record) -> Mapping[str, Any]:
    if not isinstance(record.value, Mapping):
        kind = type(record.value).__name__
        raise DataError(f"{record.place}: a {kind}, not an object with fields; write one JSON object per row")
    return record.value


def _listed(fields: Iterable[str]) -> str:
    return "[" + ", ".join(fields) + "]"


def _checked_prompt(prompt: Any, place: str, exact: bool = False) -> str | list[dict[str, str]]:
    if isinstance(prompt, str) and prompt.strip():
        return prompt if exact else prompt.strip()
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
    text = "" if answer is None else final_answer(answer)
    if not text:
        raise DataError(f"{place}: the answer is empty; remove the row, or {_COLUMN_REMEDY}")
    return text
