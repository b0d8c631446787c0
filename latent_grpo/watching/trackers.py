"""Services that metrics are reported to, besides metrics.jsonl. Each library is an extra, imported only on demand."""

from __future__ import annotations

import importlib
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from latent_grpo.config import RunOptions
from latent_grpo.errors import ConfigError


class Tracker(Protocol):
    """A service that takes numbers by step."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Report the numbers of one step, each with its `tracked_name`."""

    def close(self) -> None:
        """Write the rest."""


class TensorBoard:
    """Event files in `output_dir/tensorboard`. A resumed run hides the steps after its checkpoint."""

    def __init__(self, args: RunOptions, resumed_step: int | None) -> None:
        library = import_extra("torch.utils.tensorboard", "tensorboard")
        # TensorBoard hides earlier events from this step on: they are of the steps that the checkpoint does not hold.
        purge = None if resumed_step is None else resumed_step + 1
        self.writer = library.SummaryWriter(str(Path(args.output_dir) / "tensorboard"), purge_step=purge)

    def log(self, values: dict[str, float], step: int) -> None:
        """Add one scalar per number."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the event file."""
        self.writer.close()


class Wandb:
    """Weights & Biases. A resumed run continues under its id.

    The steps after the checkpoint are reported twice, with equal values, and the service keeps the first report.
    """

    def __init__(self, args: RunOptions, resumed_step: int | None) -> None:
        library = import_extra("wandb", "wandb")
        # The id is in a file, so that another process can resume the run.
        id_file = Path(args.output_dir) / "wandb_run_id.txt"
        if resumed_step is None or not id_file.exists():
            id_file.write_text(secrets.token_hex(8))
        self.run = library.init(
            project=args.project,
            name=run_name(args),
            dir=args.output_dir,
            config=asdict(args),
            id=id_file.read_text(),
            resume="allow",
        )

    def log(self, values: dict[str, float], step: int) -> None:
        """Report all numbers of the step in one call."""
        self.run.log(values, step=step)

    def close(self) -> None:
        """Upload the rest."""
        self.run.finish()


class Trackio:
    """Trackio, which keeps its data on this computer. A resumed run continues under its name.

    The steps after the checkpoint appear twice, with equal values.
    """

    def __init__(self, args: RunOptions, resumed_step: int | None) -> None:
        self.library = import_extra("trackio", "trackio")
        resume = "never" if resumed_step is None else "allow"
        self.library.init(project=args.project, name=run_name(args), config=asdict(args), resume=resume)

    def log(self, values: dict[str, float], step: int) -> None:
        """Report all numbers of the step in one call."""
        self.library.log(values, step=step)

    def close(self) -> None:
        """Write the rest."""
        self.library.finish()


TRACKERS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


def open_trackers(args: RunOptions, resumed_step: int | None) -> list[Tracker]:
    """Open the trackers of `args.report_to`. Raise ConfigError if a library is not installed.

    resumed_step: the step of the checkpoint of a resumed run, None for a new run.
    """
    return [TRACKERS[name](args, resumed_step) for name in args.report_to]


def tracked_name(phase: str, name: str) -> str:
    """Return what a tracker calls a metric: `train/reward`, and `eval/pass_at_1` as transformers' trainer does."""
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"{phase}/{name}"


def run_name(args: RunOptions) -> str:
    """Return `args.run_name`, or the name of the output folder if that is not set."""
    return args.run_name or Path(args.output_dir).resolve().name


def import_extra(module: str, extra: str) -> Any:
    """Import and return a module. Raise ConfigError, which names the package to install, if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"report_to is {extra!r}: pip install {extra}") from error
