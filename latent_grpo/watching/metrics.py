"""Where the metrics of a run go: a table and a progress bar on the terminal, a JSONL file, trackers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from latent_grpo.config import RunOptions
from latent_grpo.errors import ConfigError, SaveError
from latent_grpo.parallel.process_group import on_rank_zero, rank
from latent_grpo.saving.atomic_files import write_whole
from latent_grpo.saving.integrity import checkpoints_in
from latent_grpo.watching.alarms import Alarms
from latent_grpo.watching.names import renamed
from latent_grpo.watching.trackers import open_trackers, tracked_name

# Lines and bar share one console, so that the lines are printed above the bar. They go to standard error, because
# standard output is for results.
CONSOLE = Console(stderr=True, highlight=False)

# Metric, its heading in the table, its format. Fixed widths keep the columns of a log file aligned.
TABLE = (
    ("step", "step", "6d"),
    ("loss", "loss", "9.4f"),
    ("ce", "ce", "8.4f"),
    ("reward", "reward", "7.3f"),
    ("reward_std", "std", "6.3f"),
    ("groups_kept", "kept", "5.2f"),
    ("completions/mean_length", "length", "7.1f"),
    ("latent/mean_length", "latent", "7.1f"),
    ("latent/mixture_entropy", "entropy", "8.3f"),
    ("completions/clipped_ratio", "cut", "5.2f"),
    ("clip_ratio/region_mean", "clip", "6.3f"),
    ("kl", "kl", "8.4f"),
    ("grad_norm", "grad", "8.3f"),
    ("learning_rate", "rate", "9.1e"),
    ("tokens_per_second", "tok/s", "7.0f"),
    ("eval_pass_at_1", "Pass@1", "7.3f"),
    ("latent/read_back", "read back", "10.3f"),
    ("latent/read_answers", "answers", "8.3f"),
)
LINES_PER_HEADING = 20
READ = ("latent/read_back", "latent/read_answers")
EVALUATIONS = {"train": ("eval_pass_at_1",), "encoder": READ, "decoder": READ, "union": READ}  # by phase


class Metrics:
    """Writes the metrics of every logged step to `output_dir/metrics.jsonl`, the terminal and the trackers.

    Collective: every rank makes one and calls its methods, but only rank 0 writes.
    history: the lines of a resumed run up to its checkpoint. They replace the content of the file, which may hold later
    steps. None starts a new run.
    Raises ConfigError if a new run would write into a folder that already holds a run or a model.
    """

    def __init__(self, args: RunOptions, history: list[dict[str, Any]] | None = None) -> None:
        self.history = [renamed(row) for row in history or []]  # a checkpoint may be of an earlier version
        self.alarms = Alarms()
        # An alarm that fired before the checkpoint must not fire again.
        for values in self.history:
            self.alarms.update(values)
        self.show = args.log_table
        self.lines = 0
        on_rank_zero(lambda: self.open(args, resumed=history is not None))

    def open(self, args: RunOptions, resumed: bool) -> None:
        """Open the file and the trackers. Raise ConfigError if the folder is taken or cannot be written."""
        folder, path = Path(args.output_dir), Path(args.output_dir) / "metrics.jsonl"
        # An empty file is of a run that stopped before its first logged step: there is nothing to lose.
        has_metrics = path.is_file() and path.stat().st_size > 0
        if not resumed and (has_metrics or checkpoints_in(folder)):
            raise ConfigError(f"output_dir {str(folder)!r} already holds a run; resume it or choose another folder")
        # A run writes its final model into the folder itself.
        if not resumed and any(folder.glob("*.safetensors")):
            raise ConfigError(f"output_dir {str(folder)!r} already holds a model; choose another folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Before the first write, because a missing library is an error.
            self.trackers = open_trackers(args, last_step(self.history) if resumed else None)
            if resumed:
                write_whole(path, "".join(map(json_line, self.history)))
            self.file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"cannot write to output_dir {str(folder)!r}: {error.strerror}; choose another folder"
            ) from error

    def write(self, values: dict[str, Any]) -> None:
        """Write the metrics of one step: a line of JSON, a line of the table, any alarms, and the trackers' numbers."""
        self.history.append(values)
        if rank():
            return
        try:
            self.file.write(json_line(values))
            self.file.flush()  # so that a killed run keeps the line
        except OSError as error:
            what = f"metrics of step {values['step']} could not be written to {self.file.name!r} ({error.strerror})"
            raise SaveError(f"{what}; make room, and resume the newest checkpoint") from error
        if self.show:
            if self.lines % LINES_PER_HEADING == 0:
                CONSOLE.print(heading(values), style="bold", soft_wrap=True, markup=False)
            CONSOLE.print(table_line(values), soft_wrap=True, markup=False)
            self.lines += 1
        for line in self.alarms.update(values):
            CONSOLE.print(f"warning: {line}", style="yellow", soft_wrap=True, markup=False)
        numbers = {
            tracked_name(values["phase"], name): value
            for name, value in values.items()
            if isinstance(value, int | float) and name != "step"
        }
        for tracker in self.trackers:
            tracker.log(numbers, values["step"])

    def close(self) -> None:
        """Close the file and the trackers."""
        if rank():
            return
        self.file.close()
        for tracker in self.trackers:
            tracker.close()


def json_line(values: dict[str, Any]) -> str:
    """Return the line of metrics.jsonl for the metrics of one step. JSON has no NaN and no infinity: they are null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps(finite) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl, without a last line that a killed run left half written. Null is NaN.

    Names of earlier versions are replaced by today's.
    """
    # A complete line ends with a line break, so the last item is either empty or half a line.
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = (json.loads(line) for line in lines[:-1])
    return [renamed({name: math.nan if value is None else value for name, value in row.items()}) for row in rows]


def last_step(history: list[dict[str, Any]]) -> int:
    """Return the step of the last line, 0 without lines."""
    return int(history[-1]["step"]) if history else 0


def heading(values: dict[str, Any]) -> str:
    """Return the headings of the table's columns that `values` has.

    The columns of evaluations are always there, because only few lines have their figures. They are the last columns,
    so that the other lines can leave them out.
    """
    names = {*values, *EVALUATIONS.get(values["phase"], ())}
    return "".join(f"{label:>{width(form)}}" for name, label, form in TABLE if name in names)


def table_line(values: dict[str, Any]) -> str:
    """Return the figures of `values` as a line below `heading`."""
    return "".join(f"{values[name]:{form}}" for name, _, form in TABLE if name in values)


def width(form: str) -> int:
    """Return the width of a format such as 7.3f."""
    return int(form.rstrip("def").split(".")[0])


class Bar:
    """A progress bar with a short line of figures at its end."""

    def __init__(self, progress: Progress, total: int, done: int) -> None:
        self.progress = progress
        self.task = progress.add_task("", total=total, completed=done, figures="")

    def advance(self, figures: str = "") -> None:
        """Move the bar by one step and show `figures` at its end."""
        self.progress.update(self.task, advance=1, figures=figures)


@contextmanager
def progress_bar(label: str, total: int, done: int = 0, *, shown: bool = True) -> Iterator[Bar]:
    """Yield a progress bar on standard error. It draws nothing unless `shown` and on rank 0."""
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    columns = (TextColumn(label), BarColumn(24), MofNCompleteColumn(), *times, TextColumn("{task.fields[figures]}"))
    with Progress(*columns, console=CONSOLE, disable=not shown or rank() > 0) as progress:
        yield Bar(progress, total, done)
