"""GPQA as the released evaluation asks it: lettered options in a seeded order, and a line that asks for the letter."""

from __future__ import annotations

import random
from itertools import islice
from typing import Any

from latent_grpo.data.files import fields_of, read_records
from latent_grpo.data.formats import GPQA_CHOICES
from latent_grpo.errors import DataError
from latent_grpo.prompts import LETTER_SUFFIX

SEED = 42  # of the order of the options, plus the number of the row from 0


def load_released_gpqa(
    source: str, *, split: str, limit: int | None = None, **columns: str | None
) -> list[dict[str, Any]]:
    """Return rows of `prompt` and `answer`, a letter, of a file or Hub data set with the columns of GPQA.

    The order depends on the number of the row, so it is that of the paper only if the source has the rows of the
    released file in their order.

    columns: must be None, because the columns of GPQA are the format.

    Raises:
        DataError: a column is named, the source cannot be read or has no rows, or a row lacks its question or its
            correct answer.
    """
    named = [name for name, column in columns.items() if column is not None]
    if named:
        raise DataError(f"{source}: {named[0]} is {columns[named[0]]!r}, but GPQA has columns of its own; leave it out")
    rows = []
    for number, record in enumerate(islice(read_records(source, split), limit)):
        values = fields_of(record)
        question, *choices = (str(values.get(name) or "").strip() for name in ("Question", *GPQA_CHOICES))
        if not question or not choices[0]:
            raise DataError(f"{record.place}: the question or its correct answer is empty; give the columns of GPQA")
        order = list(range(4))
        random.Random(SEED + number).shuffle(order)
        lines = [f"({letter}) {choices[i]}" for letter, i in zip("ABCD", order, strict=True)]
        prompt = "\n".join([question, *lines]) + LETTER_SUFFIX
        rows.append({"prompt": prompt, "answer": "ABCD"[order.index(0)]})
    if not rows:
        raise DataError(f"{source}: has no rows; give a source with at least one row")
    return rows
