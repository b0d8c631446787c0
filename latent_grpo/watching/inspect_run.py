"""`latent-grpo inspect RUN`: curves, alarms and responses of a finished, running or killed run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from latent_grpo.config import ConfigError
from latent_grpo.saving.checkpoint import checkpoints_in
from latent_grpo.watching.alarms import Alarms
from latent_grpo.watching.metrics import read_metrics
from latent_grpo.watching.response_log import completion_steps, read_completions

BLOCKS = "▁▂▃▄▅▆▇█"
CURVE_WIDTH, FIGURES_WIDTH = 40, 44  # characters of a curve at most, and of the figures before it
# What a person looks at first; every other metric follows on --all.
CURVES = (
    "loss", "reward", "reward_std", "groups_kept", "eval_pass_at_1", "response_length", "latent_length",
    "mixture_entropy", "truncated", "clip_fraction", "margin_crossed", "kl", "logprob_gap", "grad_norm",
)  # fmt: skip


def inspect_run(
    run: Path, *, samples: int = 3, step: int | None = None, top: int = 4, every_metric: bool = False,
    picture: Path | None = None,
) -> None:  # fmt: skip
    """Print a run's curves, alarms and the first responses of a step (default: the last one logged).

    picture: also draw the curves as a PNG. ConfigError where `run` is no run, or has no responses of that step.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError(f"{str(run)!r} is not a run: it has no metrics.jsonl")
    try:
        rows = read_metrics(path)
    except ValueError as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error}") from error
    if not rows:
        raise ConfigError(f"{str(path)!r} holds no complete line yet")
    console = Console(highlight=False)
    saved = ", ".join(folder.name for folder in checkpoints_in(run)) or "no checkpoint"
    console.print(f"[bold]{run}[/]: {rows[-1]['phase']} step {rows[-1]['step']}; {saved}")
    console.print(curve_table(rows, every_metric, console.width))
    alarms = Alarms()
    for line in [line for row in rows for line in alarms.update(row)]:
        console.print(f"warning: {line}", style="yellow", markup=False)
    logged = completion_steps(run)
    if samples and (logged or step is not None):
        print_responses(console, read_completions(run, logged[-1] if step is None else step)[:samples], top)
    elif samples:
        console.print("no responses were logged; train with --log_completions to see some")
    if picture is not None:
        from latent_grpo.watching.curves import draw_curves

        draw_curves(path, picture, caption=f"Metrics of {run.resolve().name}, every logged step.")
        console.print(f"curves are in {picture}")


def curve_table(rows: list[dict[str, Any]], every_metric: bool, width: int) -> Table:
    """A line of figures and a sparkline for every metric that the run has, in `width` characters."""
    table = Table(box=None, pad_edge=False)
    for heading in ("metric", "first", "last", "lowest", "highest", "curve"):
        table.add_column(heading, justify="left" if heading in ("metric", "curve") else "right", no_wrap=True)
    found = list(dict.fromkeys(name for row in rows for name in row if name not in ("phase", "step")))
    names = found if every_metric else [name for name in CURVES if name in found]
    room = min(CURVE_WIDTH, max(8, width - FIGURES_WIDTH - max(map(len, names), default=0)))
    for name in names:
        values = [float(row[name]) for row in rows if isinstance(row.get(name), int | float)]
        finite = [value for value in values if math.isfinite(value)]
        if finite:
            figures = (f"{value:.3g}" for value in (values[0], values[-1], min(finite), max(finite)))
            table.add_row(name, *figures, sparkline(values, room))
    return table


def sparkline(values: list[float], width: int) -> str:
    """Block characters from the lowest to the highest value, means of neighbours where there are more than `width`; a
    space where a value is not finite."""
    size = -(-len(values) // width)
    means = [sum(part) / len(part) for part in (values[i : i + size] for i in range(0, len(values), size))]
    finite = [value for value in means if math.isfinite(value)]
    low, span = (min(finite), max(finite) - min(finite)) if finite else (0.0, 0.0)

    def block(value: float) -> str:
        if not math.isfinite(value):
            return " "
        return BLOCKS[round((value - low) / span * (len(BLOCKS) - 1))] if span > 0 else BLOCKS[0]

    return "".join(map(block, means))


def print_responses(console: Console, responses: list[dict[str, Any]], top: int) -> None:
    """Prompt, latent steps and answer of every response."""
    for response in responses:
        facts = f"reward {response['reward']:.2f}, advantage {response['advantage']:+.2f}"
        console.print(Text(f"\nstep {response['step']}: {response['prompt']}", style="bold"), soft_wrap=True)
        for number, entries in enumerate(response["latent_steps"], 1):
            mixture = " + ".join(f"{entry['weight']:.2f} {entry['token']!r}" for entry in entries[:top])
            console.print(Text(f"  latent {number}: {mixture}", style="dim"), soft_wrap=True)
        cut = "" if response["finished"] else "  (cut off by the limit)"
        true = "" if response["answer"] is None else f"; true answer {response['answer']}"
        console.print(Text(f"  answer: {response['completion']}{cut}  [{facts}{true}]"), soft_wrap=True)
