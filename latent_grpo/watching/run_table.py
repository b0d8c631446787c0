"""The table of a run: which columns a terminal of some width has room for, their headings, figures and legend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Column(NamedTuple):
    """A column of the table. A low `rank` keeps it where the terminal is narrow."""

    metric: str
    heading: str
    form: str  # of its figures; the fixed width keeps the columns of a log file aligned
    rank: int
    meaning: str = ""  # for the legend; none where the heading says it

    @property
    def width(self) -> int:
        """The characters of the column: those of a format such as 7.3f."""
        return int(self.form.rstrip("def").split(".")[0])


COLUMNS = (
    Column("step", "step", "6d", 0),
    Column("loss", "loss", "9.4f", 1),
    Column("ce", "ce", "8.4f", 2, "cross-entropy of the text"),
    Column("reward", "reward", "7.3f", 0),
    Column("reward_std", "std", "6.3f", 7, "deviation of the rewards"),
    Column("groups_kept", "kept", "5.2f", 10, "share of groups trained on"),
    Column("completions/mean_length", "length", "7.1f", 2, "steps of a response"),
    Column("latent/mean_length", "latent", "7.1f", 2, "latent ones of them"),
    Column("latent/mixture_entropy", "entropy", "8.3f", 4, "of a mixture, nats"),
    Column("completions/clipped_ratio", "cut", "5.2f", 3, "share cut off by the limit"),
    Column("clip_ratio/region_mean", "clip", "6.3f", 9, "share of clipped ratios"),
    Column("kl", "kl", "8.4f", 5),
    Column("grad_norm", "grad", "8.3f", 6, "norm of the gradient"),
    Column("learning_rate", "rate", "9.1e", 8, "learning rate"),
    Column("tokens_per_second", "tok/s", "7.0f", 11, "sampled steps a second"),
    Column("eval_pass_at_1", "Pass@1", "7.3f", 1),
    Column("latent/read_back", "read back", "10.3f", 3, "share of chain tokens read from latent steps"),
    Column("latent/read_answers", "answers", "8.3f", 3, "share of texts read from them"),
)
READ = ("latent/read_back", "latent/read_answers")
EVALUATIONS = {"train": ("eval_pass_at_1",), "encoder": READ, "decoder": READ, "union": READ}  # by phase


def columns_for(values: Mapping[str, Any], width: int) -> list[Column]:
    """Return the columns of the metrics `values` that fit into `width` characters.

    The columns of evaluations are always there, because only few lines have their figures. They are the last columns,
    so that the other lines can leave them out.
    """
    names = {*values, *EVALUATIONS.get(values["phase"], ())}
    shown = [column for column in COLUMNS if column.metric in names]
    while len(shown) > 3 and sum(column.width for column in shown) > width:
        shown.remove(max(shown, key=lambda column: column.rank))
    return shown


def heading(columns: Sequence[Column]) -> str:
    """Return the line of headings."""
    return "".join(f"{column.heading:>{column.width}}" for column in columns)


def table_line(columns: Sequence[Column], values: Mapping[str, Any]) -> str:
    """Return the figures of `values` as a line below `heading`."""
    return "".join(f"{values[column.metric]:{column.form}}" for column in columns if column.metric in values)


def legend(columns: Sequence[Column]) -> str:
    """Return what the headings mean, as one line; "" if they say it themselves."""
    return "; ".join(f"{column.heading}: {column.meaning}" for column in columns if column.meaning)
