"""Where metrics can be reported to besides metrics.jsonl. Each library is an extra, imported when it is asked for."""

from __future__ import annotations

import importlib
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from latent_grpo.config import ConfigError, RunOptions


class Tracker(Protocol):
    """A sink of numbers by step."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Report the numbers of one step, named `phase/metric`."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoard:
    """Event files in `output_dir/tensorboard`; a resumed run hides what its lost part wrote."""

    def __init__(self, args: RunOptions, resumed_step: int | None) -> None:
        library = import_extra("torch.utils.tensorboard", "tensorboard")
        purge = None if resumed_step is None else resumed_step + 1
        self.writer = library.SummaryWriter(str(Path(args.output_dir) / "tensorboard"), purge_step=purge)

    def log(self, values: dict[str, float], step: int) -> None:
        """One scalar each."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the event file."""
        self.writer.close()


class Wandb:
    """Weights & Biases. A resumed run goes on under its id; the service keeps the first of a step's equal values."""

    def __init__(self, args: RunOptions, resumed_step: int | None) -> None:
        library = import_extra("wandb", "wandb")
        id_file = Path(args.output_dir) / "wandb_run_id.txt"
        if resumed_step is None or not id_file.exists():
            id_file.write_text(secrets.token_hex(8))
        self.run = library.init(
            project=args.project, name=run_name(args), dir=args.output_dir, config=asdict(args),
            id=id_file.read_text(), resume="allow",
        )  # fmt: skip

    def log(self, values: dict[str, float], step: int) -> None:
        """All of a step at once."""
        self.run.log(values, step=step)

    def close(self) -> None:
        """Upload what is left."""
        self.run.finish()


class Trackio:
    """Trackio, local first. A resumed run goes on under its name; steps done twice appear twice, with equal values."""

    def __init__(self, args: RunOptions, resumed_step: int | None) -> None:
        self.library = import_extra("trackio", "trackio")
        self.library.init(
            project=args.project, name=run_name(args), config=asdict(args),
            resume="never" if resumed_step is None else "allow",
        )  # fmt: skip

    def log(self, values: dict[str, float], step: int) -> None:
        """All of a step at once."""
        self.library.log(values, step=step)

    def close(self) -> None:
        """Write what is left."""
        self.library.finish()


TRACKERS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


def open_trackers(args: RunOptions, resumed_step: int | None) -> list[Tracker]:
    """The sinks of `args.report_to`; ConfigError where a library is not installed."""
    return [TRACKERS[name](args, resumed_step) for name in args.report_to]


def run_name(args: RunOptions) -> str:
    """`args.run_name`, or the name of the output folder."""
    return args.run_name or Path(args.output_dir).resolve().name


def import_extra(module: str, extra: str) -> Any:
    """The module, or a ConfigError that names the extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"report_to is {extra!r}: pip install 'latent-grpo[{extra}]'") from error
