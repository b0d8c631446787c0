"""Which columns of the data reach the reward functions, and whether these are all that the functions need."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from latent_grpo.errors import DataError
from latent_grpo.rewards.answers import reference_text
from latent_grpo.rewards.calls import name_of, required_arguments
from latent_grpo.rewards.functions import accuracy_reward, exact_match_reward

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


def check_columns(functions: Sequence[Callable[..., Any]], rows: Sequence[Any], columns: Sequence[str]) -> None:
    """Raise DataError if a reward function needs an argument that it will not get, or an answer that a row lacks.

    columns: the names of the columns that the functions get. Without this check, a run would end at its first rollout,
    or when the row's turn comes.
    """
    for function in functions:
        known = (*columns, *ARGUMENTS, "completion_ids")
        if missing := [name for name in required_arguments(function) if name not in known]:
            raise DataError(
                f"reward function {name_of(function)!r} needs {missing[0]!r}, which is no column of the data "
                f"([{', '.join(columns)}]); rename a column, or give the argument a default"
            )
        if function not in (accuracy_reward, exact_match_reward):
            continue
        for number, row in enumerate(rows, 1):
            try:
                reference_text(row.get("answer"))
            except ValueError as error:
                raise DataError(
                    f"row {number} has the answer {row.get('answer')!r}, with which {name_of(function)!r} can compare "
                    "no response; remove the row, or give a reward function of your own"
                ) from error
