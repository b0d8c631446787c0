"""Question-answer data sets, read from a local file or the Hugging Face Hub into one row shape.

Every source becomes a list of rows ``{"prompt": str | list of chat messages, "answer": str}``. A row has a third key
``"chain"``, the chain of thought as a string, if the source has one, and a fourth key ``"answer_text"`` if the source
has the visible answer of a training text. Reward functions need the other fields of the source too, which stay as they
are on request. The format is recognised by the names of the fields (``FORMATS``). ``prompt_column``,
``answer_column`` and ``chain_column`` read every other format.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from typing import Any

from latent_grpo.config import DataOptions
from latent_grpo.data.files import Record, Unreadable, fields_of, read_records
from latent_grpo.data.formats import FORMATS, Fields, Format, chain_text, final_answer
from latent_grpo.errors import DataError

ROW_KEYS = ("prompt", "answer", "chain", "answer_text", "latent_steps")
_COLUMN_REMEDY = "name the fields with --prompt_column and --answer_column"


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
    keep_columns: bool = False,
) -> list[dict[str, Any]]:
    """Read a data set into rows of ``prompt``, ``answer`` and, if the source has them, ``chain`` and ``answer_text``.

    Warns, with the counts, if a larger share of the prompts than ``repeated_prompts`` is a repetition.

    Args:
        source: a ``.json`` (a list of objects, or JSON lines), ``.jsonl``, ``.csv``, ``.parquet`` or ``.arrow`` file,
            or the name of a Hub data set, with a configuration as ``name:config`` or one of its files as
            ``name:file.parquet``.
        split: the split of a Hub data set. A local file is read as a whole.
        prompt_column, answer_column, chain_column: the fields to read instead of those that the format has.
        limit: the number of rows to read from the start; None reads all.
        expected_columns: fields without which the source is another one than was meant.
        deduplicate: keep only the first row of each prompt, before ``limit`` counts.
        repeated_prompts: the share of repeated prompts above which the warning is printed.
        keep_columns: keep every other field of a row as it is, under its own name. Warns of a field that has the name
            of one of the keys above and is not what was read for it.

    Returns:
        One dict per row, in source order. ``prompt`` is a string, or a list of ``{"role", "content"}`` messages if the
        source has messages. ``answer`` is only the final answer: N of a text with ``#### N``, and numbers without
        thousands commas and without ``.0``. ``chain`` is the contents of the calculator marks (``48/2=24 48+24=72``) if
        the source has marks, else the text of the rationale.

    Raises:
        DataError: ``limit`` is below 1, the source cannot be read, it is empty, lacks an expected column or is of no
            known format, a row has no prompt or no answer, or some prompts are messages and others are not.
    """
    if limit is not None and limit < 1:
        raise DataError(f"{source}: limit is {limit}; give at least 1, or leave it out for all rows")
    columns = _Columns(prompt_column, answer_column, chain_column)
    records = list(islice(read_records(source, split), None if deduplicate else limit))
    if not records:
        raise DataError(f"{source}: has no rows; give a source with at least one row")
    # Of all rows, because any of them may lack a field.
    names = list(dict.fromkeys(name for record in records for name in fields_of(record)))
    _check_expected(source, names, expected_columns)
    source_format = _recognise(records[0], names, columns)
    read: Iterator[dict[str, Any]] = (_row(record, source_format, columns) for record in records)
    rows = read
    if keep_columns:
        _warn_of_shadowed(source, names, source_format, columns)
        _warn_of_unreadable(records)
        rows = ({**_other_fields(record), **row} for record, row in zip(records, read, strict=True))
    kept = list(islice(_without_repeats(rows) if deduplicate else rows, limit))
    _check_kinds(records, kept)
    _warn_of_repeats(source, kept, repeated_prompts)
    return kept


def load_training_rows(options: DataOptions, *, keep_columns: bool = False) -> list[dict[str, Any]]:
    """Return the rows that the options of `sft` and `train` describe, as `load_rows` reads them."""
    columns = ("prompt_column", "answer_column", "chain_column")
    checks = ("limit", "expected_columns", "deduplicate", "repeated_prompts")
    chosen: dict[str, Any] = {name: getattr(options, name) for name in (*columns, *checks)}
    return load_rows(options.dataset, split=options.dataset_split, keep_columns=keep_columns, **chosen)


def with_own_columns(options: DataOptions, **data: Any) -> list[Any]:
    """Return data sets given in Python, by name, with `prompt` and `answer`, read as `load_rows` reads a file.

    Rows that have `prompt` already stay as they are, unless the options name columns; so does what is no list of rows.
    """
    return [_with_own_columns(name, rows, options) for name, rows in data.items()]


def _with_own_columns(name: str, rows: Any, options: DataOptions) -> Any:
    columns = _Columns(options.prompt_column, options.answer_column, options.chain_column)
    listed = all(hasattr(rows, x) for x in ("__len__", "__getitem__")) and not isinstance(rows, str | Mapping)
    if not listed or hasattr(rows, "iloc") or not len(rows) or not isinstance(rows[0], Mapping):
        return rows
    if not columns.named() and "prompt" in rows[0]:
        return rows
    records = [Record(f"{name}: row {number}", row) for number, row in enumerate(rows, 1)]
    names = list(dict.fromkeys(field for record in records for field in fields_of(record)))
    chosen = _recognise(records[0], names, columns)
    return [{**_other_fields(record), **_row(record, chosen, columns)} for record in records]


def _check_expected(source: str, names: Sequence[str], expected: Sequence[str]) -> None:
    missing = [name for name in expected if name not in names]
    if missing:
        raise DataError(
            f"{source}: has the columns {_listed(names)} and lacks {_listed(missing)} of expected_columns: "
            "it is another set than was meant; give the set, or name the columns of this one with --expected_columns"
        )


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


def _recognise(first: Record, names: Sequence[str], columns: _Columns) -> Format | None:
    """Return the format of a source with fields of these names, or None if the user has named what a row needs.

    Raises:
        DataError: there is no such format, or no row has the chain column that the user has named.
    """
    source_format = next((each for each in FORMATS if all(name in names for name in each.required)), None)
    if source_format is None and (columns.prompt is None or columns.answer is None):
        raise DataError(
            f"{first.place}: the fields {_listed(names)} are of no known format "
            f"({', '.join(each.name for each in FORMATS)}); {_COLUMN_REMEDY}"
        )
    if columns.chain is not None and columns.chain not in names:
        raise DataError(
            f"{first.place}: no field {columns.chain!r}, nor in another row, only {_listed(names)}; "
            "name the field with --chain_column"
        )
    # With both fields named, a row need not have the other fields of a format that it happens to resemble.
    return None if columns.prompt is not None and columns.answer is not None else source_format


def _row(record: Record, source_format: Format | None, columns: _Columns) -> dict[str, Any]:
    source = fields_of(record)
    needed = [name for name in source_format.required if name not in source_format.optional] if source_format else []
    for name in (*needed, columns.prompt, columns.answer):
        if name is not None and name not in source:
            raise DataError(f"{record.place}: no field {name!r}, only {_listed(source)}; {_COLUMN_REMEDY}")
    optional = source_format.optional if source_format else ()
    for name in (*needed, *optional, *columns.named()):
        if isinstance(value := source.get(name), Unreadable):
            raise DataError(f"{record.place}: {value.problem}")
    try:
        fields = source_format.read(source) if source_format else Fields(prompt=None, answer=None)
        chain = fields.chain if columns.chain is None else source.get(columns.chain)
        exact = fields.exact and not columns.named()
        chain = chain if exact else chain_text(chain)
    except DataError as error:
        raise DataError(f"{record.place}: {error}") from error
    prompt = fields.prompt if columns.prompt is None else source[columns.prompt]
    answer = fields.answer if columns.answer is None else source[columns.answer]
    # An answer column replaces the text that the format has for its own answer.
    visible = fields.answer_text if columns.answer is None else None
    row: dict[str, Any] = {"prompt": _checked_prompt(prompt, record.place, exact)}
    row["answer"] = _checked_answer(answer, record.place)
    for name, text in (("chain", chain), ("answer_text", visible)):
        if text:
            row[name] = _checked_text(text, name, record.place)
    if source.get("latent_steps") is not None:
        row["latent_steps"] = _checked_steps(source["latent_steps"], record.place)
    return row


def _checked_steps(steps: Any, place: str) -> list[str]:
    """Return the texts of a row's latent steps. DataError if they are anything else."""
    if not isinstance(steps, list) or not steps or not all(isinstance(step, str) and step.strip() for step in steps):
        raise DataError(f"{place}: latent_steps is {steps!r:.60}; give a list of texts, one for each latent step")
    return [_checked_text(step, "latent_steps", place) for step in steps]


def _other_fields(record: Record) -> dict[str, Any]:
    """Return the fields of a record that are kept as they are, without those of a type that Python does not have."""
    kept = {name: value for name, value in fields_of(record).items() if name not in ROW_KEYS}
    for name, value in kept.items():
        _check_texts(value, f"field {name!r}", record.place)
    return {name: value for name, value in kept.items() if not isinstance(value, Unreadable)}


def _check_texts(value: Any, name: str, place: str) -> None:
    """Check every text in a value as `_checked_text` does."""
    if isinstance(value, str):
        _checked_text(value, name, place)
    elif isinstance(value, list | Mapping):
        for part in value.values() if isinstance(value, Mapping) else value:
            _check_texts(part, name, place)


def _warn_of_unreadable(records: Sequence[Record]) -> None:
    """Warn of the first value that reward functions do not get because Python has no type for it."""
    for record in records:
        for value in fields_of(record).values():
            if isinstance(value, Unreadable):
                warnings.warn(f"{record.place}: {value.problem}; reward functions get None there", stacklevel=3)
                return


def _warn_of_shadowed(source: str, names: Sequence[str], source_format: Format | None, columns: _Columns) -> None:
    """Warn of a field whose name stands for something else in a row, so that no reward function gets it."""
    own = (*source_format.required, *source_format.optional) if source_format else ()
    for name in ROW_KEYS:
        if name in names and name not in (*own, *columns.named()):
            warnings.warn(
                f"{source}: reward functions do not get its column {name!r}, because the rows have what was read as "
                f"{name} under that name; rename the column",
                stacklevel=3,
            )


def _check_kinds(records: Sequence[Record], rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise DataError for the first prompt that is a text where the first one is messages, or the reverse."""
    if len({isinstance(row["prompt"], str) for row in rows}) < 2:
        return
    number = next(
        n for n, row in enumerate(rows) if isinstance(row["prompt"], str) != isinstance(rows[0]["prompt"], str)
    )
    words = (
        "a text, that of the first row messages"
        if isinstance(rows[number]["prompt"], str)
        else "messages, that of the first row a text"
    )
    place = records[number].place if len(records) == len(rows) else f"prompt {str(rows[number]['prompt'])[:60]!r}"
    raise DataError(f"{place}: the prompt is {words}; write all prompts in one form")


def _listed(fields: Iterable[str]) -> str:
    return "[" + ", ".join(map(str, fields)) + "]"


def _checked_prompt(prompt: Any, place: str, exact: bool = False) -> str | list[dict[str, str]]:
    if isinstance(prompt, str) and prompt.strip():
        return _checked_text(prompt if exact else prompt.strip(), "prompt", place)
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
    return {"role": role, "content": _checked_text(content, "prompt", place)}


def _checked_answer(answer: Any, place: str) -> str:
    if isinstance(answer, float | Decimal) and not math.isfinite(answer):
        raise DataError(f"{place}: the answer is {answer}; remove the row, or {_COLUMN_REMEDY}")
    if answer is not None and not isinstance(answer, str | int | float | Decimal):
        kind = type(answer).__name__
        raise DataError(f"{place}: the answer is a {kind}, not a string or a number; {_COLUMN_REMEDY}")
    text = "" if answer is None else final_answer(answer)
    if text.lower() == "nan":  # what a table writes into a text file for a missing value
        raise DataError(f"{place}: the answer is {text!r}; remove the row, or {_COLUMN_REMEDY}")
    if not text:
        raise DataError(f"{place}: the answer is empty; remove the row, or {_COLUMN_REMEDY}")
    return _checked_text(text, "answer", place)


def _checked_text(text: str, name: str, place: str) -> str:
    """Return the text. DataError if it holds half a surrogate pair, which JSON can spell and no tokenizer can read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise DataError(f"{place}: the {name} holds {half!r}, which is half a character; correct the text") from error
    return text
