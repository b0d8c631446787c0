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
from latent_grpo.saving.run_folder import remove_run
from latent_grpo.watching.alarms import Alarms
from latent_grpo.watching.names import renamed
from latent_grpo.watching.notebook import NotebookBar, NotebookTable, in_notebook
from latent_grpo.watching.run_table import Column, columns_for, heading, legend, table_line
from latent_grpo.watching.trackers import open_trackers, tracked_name

# Lines and bar share one console, so that the lines are printed above the bar. They go to standard error, because
# standard output is for results.
CONSOLE = Console(stderr=True, highlight=False)

LINES_PER_HEADING = 20


class Metrics:
    """Writes the metrics of every logged step to `output_dir/metrics.jsonl`, the terminal and the trackers.

    Collective: every rank makes one and calls its methods, but only rank 0 writes.
    history: the lines of a resumed run up to its checkpoint. They replace the content of the file, which may hold later
    steps. None starts a new run.
    header: a line that is printed before the table, which then has a legend too, and remarks as further lines.
    Default: none of them.
    Raises ConfigError if a new run would write into a folder that already holds a run or a model.
    """

    def __init__(
        self, args: RunOptions, history: list[dict[str, Any]] | None = None, header: str | None = None
    ) -> None:
        self.history = [renamed(row) for row in history or []]  # a checkpoint may be of an earlier version
        self.alarms = Alarms()
        # An alarm that fired before the checkpoint must not fire again.
        for values in self.history:
            self.alarms.update(values)
        self.show = args.log_table
        self.lines, self.header = 0, header
        self.columns: list[Column] = []
        self.table = NotebookTable() if in_notebook() else None
        on_rank_zero(lambda: self.open(args, resumed=history is not None))
        for number, line in enumerate((header or "").splitlines()):
            if rank() == 0 and (self.show or number):  # a remark is for runs without a table too
                CONSOLE.print(line, markup=False, soft_wrap=number > 0)

    def open(self, args: RunOptions, resumed: bool) -> None:
        """Open the file and the trackers. Raise ConfigError if the folder is taken or cannot be written."""
        folder, path = Path(args.output_dir), Path(args.output_dir) / "metrics.jsonl"
        # An empty file is of a run that stopped before its first logged step: there is nothing to lose.
        if args.overwrite and not resumed:
            remove_run(folder)
        has_metrics = path.is_file() and path.stat().st_size > 0
        if not resumed and (has_metrics or checkpoints_in(folder)):
            remedy = "resume it, start anew with overwrite, or choose another folder"
            raise ConfigError(f"output_dir {str(folder)!r} already holds a run; {remedy}")
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
        warnings = [f"warning: {line}" for line in self.alarms.update(values)]
        if self.show and self.table is not None:
            self.table.add(values, warnings)
        else:
            if self.show:
                self.print_line(values)
            for line in warnings:
                CONSOLE.print(line, style="yellow", soft_wrap=True, markup=False)
        numbers = {
            tracked_name(values["phase"], name): value
            for name, value in values.items()
            if isinstance(value, int | float) and name != "step"
        }
        for tracker in self.trackers:
            tracker.log(numbers, values["step"])

    def print_line(self, values: dict[str, Any]) -> None:
        """Print the line of a step, and before it the headings if it is their turn."""
        if self.lines % LINES_PER_HEADING == 0:
            self.columns = columns_for(values, CONSOLE.width)
            if self.header is not None and not self.lines:
                CONSOLE.print(legend(self.columns), style="dim", markup=False)
            CONSOLE.print(heading(self.columns), style="bold", soft_wrap=True, markup=False)
        CONSOLE.print(table_line(self.columns, values), soft_wrap=True, markup=False)
        self.lines += 1

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


class Bar:
    """A progress bar with a short line of figures at its end."""

    def __init__(self, progress: Progress, total: int, done: int) -> None:
        self.progress = progress
        self.task = progress.add_task("", total=total, completed=done, figures="")

    def advance(self, figures: str = "") -> None:
        """Move the bar by one step and show `figures` at its end."""
        self.progress.update(self.task, advance=1, figures=figures)


@contextmanager
def progress_bar(label: str, total: int, done: int = 0, *, shown: bool = True) -> Iterator[Bar | NotebookBar]:
    """Yield a progress bar on standard error or in a notebook. It draws nothing unless `shown` and on rank 0."""
    if shown and rank() == 0 and in_notebook():
        yield NotebookBar(label, total, done)
        return
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    columns = (TextColumn(label), BarColumn(24), MofNCompleteColumn(), *times, TextColumn("{task.fields[figures]}"))
    with Progress(*columns, console=CONSOLE, disable=not shown or rank() > 0) as progress:
        yield Bar(progress, total, done)
