"""Which columns of the data reach the reward functions."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

# Columns that TRL keeps from reward functions too: they get the prompts and the responses under other names.
LEFT_OUT = ("prompt", "completion", "completion_ids")
# Arguments of reward functions that the trainer fills in. TRL fails at a column that has the name of one.
ARGUMENTS = (
    "prompts",
    "completions",
    "visible_text",
    "trainer_state",
    "log_extra",
    "log_metric",
    "max_completion_length",
    "soft_punish_cache",
)


def column_names(rows: Sequence[Any]) -> list[str]:
    """Return the names of the columns of a data set, of which a row may lack some, in order of appearance."""
    names = getattr(rows, "column_names", None)  # of a `datasets.Dataset`, whose rows have all columns
    return list(names if names is not None else dict.fromkeys(name for row in rows for name in row))


def reward_columns(rows: Sequence[Any]) -> list[str]:
    """Return the names of the columns that reach the reward functions: all, apart from LEFT_OUT.

    Warns of a column that has the name of another argument, and leaves it out.
    """
    names = column_names(rows)
    for name in names:
        if name in ARGUMENTS:
            warnings.warn(
                f"reward functions do not get the column {name!r} of the data, because they have an argument of that "
                "name; rename the column",
                stacklevel=2,
            )
    return [name for name in names if name not in (*LEFT_OUT, *ARGUMENTS)]
