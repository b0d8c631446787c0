"""Records of data sets as their files or the Hugging Face Hub have them, each with the place that errors name."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latent_grpo.errors import DataError, first_line

FILE_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".arrow")
# Suffixes that mark a source as a file. They are listed because a Hub name may contain a dot too ("org/set-v1.5").
_FILE_LIKE = (*FILE_SUFFIXES, ".gz", ".ndjson", ".tsv", ".txt", ".yaml", ".yml", ".zip")
# Behind the colon of a Hub name stands a file if it ends like one, else a configuration.
_HUB_FILE = re.compile(r"(?P<name>[\w.-]+/[\w.-]+):(?P<file>[^:]+\.(?:parquet|jsonl?|csv|arrow))", re.IGNORECASE)
_LONGEST_CELL = 2**31 - 1  # of a CSV file, in characters


@dataclass(frozen=True)
class Record:
    """A source row, and the place that error messages name for it, such as ``train.jsonl: row 3``."""

    place: str
    value: Any


class RepeatedKey(dict[str, Any]):
    """A JSON object that has a key twice, or holds one that has. Which value is meant, nobody can say."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key


def fields_of(record: Record) -> Mapping[str, Any]:
    """Return the fields of a record. DataError if it is no object with fields, or has one of them twice."""
    if not isinstance(record.value, Mapping):
        kind = type(record.value).__name__
        raise DataError(f"{record.place}: a {kind}, not an object with fields; write one JSON object per row")
    if isinstance(record.value, RepeatedKey):
        raise DataError(f"{record.place}: the key {record.value.key!r} occurs twice; remove one of them")
    return record.value


def read_records(source: str, split: str) -> Iterator[Record]:
    """Yield the rows of a file or of a split of a Hub data set as they are.

    Raises:
        DataError: the source cannot be read. The message names the file and the row or line.
    """
    path = Path(os.path.expanduser(source))
    return iter(_read_file(path) if _is_file_like(path, source) else _read_hub(source, split))


def check_source(source: str) -> None:
    """Raise DataError if a source is a file that does not exist, or a folder. Nothing is read, no library imported."""
    path = Path(os.path.expanduser(source))
    if _is_file_like(path, source):
        check_file(path)


def check_file(path: Path) -> None:
    """Raise DataError unless a path is that of a file."""
    if os.path.isdir(path):
        raise DataError(f"{path}: is a directory; give one of the files in it")
    if not os.path.exists(path):
        raise DataError(
            f"{path}: no such file; check the path (a Hub data set is given as name, name:config or "
            "owner/name:file.parquet)"
        )


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
    check_file(path)
    if suffix not in FILE_SUFFIXES:
        raise DataError(f"{path}: the suffix {suffix!r} is not one of {', '.join(FILE_SUFFIXES)}; convert the file")
    if suffix in (".parquet", ".arrow"):
        return _read_table(path)
    text = _read_text(path)
    return {".json": _read_json, ".jsonl": _read_json_lines, ".csv": _read_csv}[suffix](path, text)


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
    if text.lstrip().startswith("["):
        values = _parse_json(text, path, start=1)
        return (Record(f"{path}: row {number}", value) for number, value in enumerate(values, start=1))
    whole = _whole_object(text)
    if whole is not None:
        raise DataError(
            f"{path}: holds one JSON object with the keys {_listed(whole)}; write a list of objects, one for each row"
        )
    return _read_json_lines(path, text)


def _whole_object(text: str) -> dict[str, Any] | None:
    """Return the object that a text of several lines is, or None if it is anything else."""
    if "\n" not in text.strip():
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _read_json_lines(path: Path, text: str) -> Iterator[Record]:
    # str.splitlines would also cut at U+2028 and similar characters, which JSON strings may contain unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield Record(f"{path}: row {number}", _parse_json(line, path, start=number))


def _parse_json(text: str, path: Path, *, start: int) -> Any:
    """Return the value of JSON text that starts at line `start` of a file."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line = start + error.lineno - 1
        raise DataError(
            f"{path}:{line}: not valid JSON ({error.msg} at column {error.colno}); "
            "correct the line: a file has one JSON object per line, or one list of objects"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or thousands of brackets
        raise DataError(f"{path}:{start}: JSON that cannot be read ({first_line(error)}); correct it") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        return RepeatedKey(next(name for name in names if names.count(name) > 1))
    for inner in value.values():
        for part in inner if isinstance(inner, list) else [inner]:
            if isinstance(part, RepeatedKey):
                return part
    return value


def _read_csv(path: Path, text: str) -> Iterator[Record]:
    """Read a CSV file whose first line names the columns. An empty cell is a missing value."""
    csv.field_size_limit(_LONGEST_CELL)
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    number = 0
    while True:
        try:
            cells = next(lines, None)
        except csv.Error as error:
            raise DataError(f"{path}:{lines.line_num}: not valid CSV ({error}); correct the line") from error
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = _distinct(cells, path)
            continue
        number += 1
        if len(cells) != len(header):
            raise DataError(
                f"{path}: row {number} (line {lines.line_num}) has {len(cells)} cells, the header has {len(header)}; "
                "correct the line"
            )
        yield Record(f"{path}: row {number}", {name: cell or None for name, cell in zip(header, cells, strict=True)})


def _read_table(path: Path) -> Iterator[Record]:
    """Read a Parquet file, or an Arrow file or stream."""
    import pyarrow
    import pyarrow.parquet

    kind = path.suffix[1:].lower()
    try:
        with path.open("rb") as stream:
            table = pyarrow.parquet.read_table(stream) if kind == "parquet" else _read_arrow(stream)
    except (pyarrow.ArrowException, ValueError, NotImplementedError) as error:
        raise DataError(f"{path}: not a readable {kind} file ({first_line(error)}); write it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or first_line(error)}); check the file") from error
    _distinct(table.column_names, path)
    return _table_records(table, path)


def _read_arrow(stream: Any) -> Any:
    """Return the table of an Arrow stream, which `datasets` saves, or of an Arrow file, which begins with ARROW1."""
    from pyarrow import ipc

    is_file = stream.read(6) == b"ARROW1"
    stream.seek(0)
    return (ipc.open_file if is_file else ipc.open_stream)(stream).read_all()


def _table_records(table: Any, path: Path) -> Iterator[Record]:
    start = 0
    for batch in table.to_batches():
        try:
            values = batch.to_pylist()
        except Exception:  # a value that Python has no type for; one by one, the others are found
            values = [_converted(batch, row) for row in range(len(batch))]
        for number, value in enumerate(values, start=start + 1):
            yield Record(f"{path}: row {number}", value)
        start += len(batch)


@dataclass(frozen=True)
class Unreadable:
    """A value of a table that Python has no type for. It is an error only where the field is used."""

    problem: str


def _converted(batch: Any, row: int) -> dict[str, Any]:
    values = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            values[name] = column[row].as_py()
        except Exception as error:
            problem = f"the column {name!r} of type {column.type} cannot be read ({first_line(error)}); correct it"
            values[name] = Unreadable(problem)
    return values


def _distinct(names: list[str], path: Path) -> list[str]:
    """Return the names of columns. DataError if one occurs twice."""
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DataError(f"{path}: the column {twice[0]!r} occurs twice; rename one of them")
    return names


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


def _listed(names: Any) -> str:
    return "[" + ", ".join(map(str, names)) + "]"
