"""What a run shows and keeps: a progress bar, a JSONL file, TensorBoard when asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from latent_grpo.config import ConfigError


class Metrics:
    """Appends one JSON object a step to `path`; forwards numbers to TensorBoard where that is reported to."""

    def __init__(self, path: Path, report_to: list[str], *, resume: bool = False) -> None:
        if path.exists() and not resume:
            raise ConfigError(
                f"output_dir {str(path.parent)!r} already holds a run; resume it or choose another folder"
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write to output_dir {str(path.parent)!r}: {error.strerror}") from error
        self.writer = None
        if "tensorboard" in report_to:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ConfigError("report_to is 'tensorboard': pip install 'latent-grpo[tensorboard]'") from error
            self.writer = SummaryWriter(str(path.parent / "tensorboard"))

    def write(self, values: dict[str, Any]) -> None:
        """One line, flushed, so that a killed run keeps it. `values["step"]` is the TensorBoard step."""
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()
        if self.writer is not None:
            for name, value in values.items():
                if isinstance(value, int | float) and name != "step":
                    self.writer.add_scalar(f"{values.get('phase', 'train')}/{name}", value, values["step"])

    def close(self) -> None:
        """Close the sinks."""
        self.file.close()
        if self.writer is not None:
            self.writer.close()


class Bar:
    """A progress bar with a short line of figures at its end."""

    def __init__(self, progress: Progress, total: int, done: int) -> None:
        self.progress = progress
        self.task = progress.add_task("", total=total, completed=done, figures="")

    def advance(self, figures: str = "") -> None:
        """One step further."""
        self.progress.update(self.task, advance=1, figures=figures)


@contextmanager
def progress_bar(label: str, total: int, done: int = 0, *, shown: bool = True) -> Iterator[Bar]:
    """A bar on the terminal's error stream, or one that draws nothing."""
    columns = (
        TextColumn(label), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        yield Bar(progress, total, done)
