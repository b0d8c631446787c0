"""`latent-grpo inspect RUN`: curves, alarms and responses of a finished, running or killed run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from latent_grpo.errors import ConfigError
from latent_grpo.saving.checkpoint import checkpoints_in
from latent_grpo.watching.alarms import Alarms
from latent_grpo.watching.metrics import read_metrics
from latent_grpo.watching.response_log import completion_steps, read_responses
from latent_grpo.watching.responses import print_response
from latent_grpo.watching.run_check import check_run

BLOCKS = "▁▂▃▄▅▆▇█"
CURVE_WIDTH = 40  # the most characters of a curve
FIGURES_WIDTH = 44  # characters of the four columns of figures between a metric's name and its curve
# What a person looks at first. `every_metric` shows the others too.
MAIN_METRICS = (
    "loss",
    "ce",
    "latent/read_back",
    "latent/read_answers",
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "groups_kept",
    "eval_pass_at_1",
    "completions/mean_length",
    "completions/clipped_ratio",
    "entropy",
    "latent/mean_length",
    "latent/share_per_prompt",
    "latent/mixture_entropy",
    "latent/margin_crossed",
    "latent/margins_not_positive",
    "latent/upper_atom",
    "latent/nucleus_overlap",
    "clip_ratio/region_mean",
    "kl",
    "sampling/sampling_logp_difference/mean",
    "grad_norm",
)


def inspect_run(
    run: Path,
    *,
    samples: int = 3,
    step: int | None = None,
    top: int = 4,
    every_metric: bool = False,
    picture: Path | None = None,
) -> None:
    """Print the curves and alarms of a run, and the first responses of a step.

    samples: responses shown. step: whose responses; by default the last logged step. top: components shown of each
    mixture. every_metric: show all metrics, not only MAIN_METRICS. picture: also draw the curves as a PNG.
    Raises ConfigError if `run` is not the folder of a run, or has no responses of that step.
    """
    path = run / "metrics.jsonl"
    rows = read_rows(run, path)
    console = Console(highlight=False)
    checkpoints = ", ".join(folder.name for folder in checkpoints_in(run)) or "no checkpoint"
    console.print(f"[bold]{run}[/]: {rows[-1]['phase']} step {rows[-1]['step']}; {checkpoints}")
    console.print(curve_table(rows, every_metric, console.width))
    # A run prints its alarms but does not keep them. Its metrics set them off again.
    alarms = Alarms()
    for line in [line for row in rows for line in alarms.update(row)]:
        console.print(f"warning: {line}", style="yellow", markup=False)
    logged = completion_steps(run)
    if samples and (logged or step is not None):
        for response in read_responses(run, logged[-1] if step is None else step, samples):
            print_response(console, response, top=top)
    elif samples:
        console.print("No responses were logged. Train with --log_completions to see some.")
    if picture is not None:
        # Imported here: matplotlib takes a second to load, and most calls draw no picture.
        from latent_grpo.watching.curves import draw_curves

        draw_curves(path, picture, caption=f"Metrics of {run.resolve().name}, every logged step.")
        console.print(f"The curves are in {picture}.")


def read_rows(run: Path, path: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl. Raise ConfigError if there is none that can be read."""
    check_run(run)
    try:
        rows = read_metrics(path)
    except ValueError as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error}; choose another run") from error
    if not rows:
        raise ConfigError(f"{str(path)!r} holds no complete line yet; wait for the first logged step")
    return rows


def curve_table(rows: list[dict[str, Any]], every_metric: bool, width: int) -> Table:
    """Return a table of `width` characters: for each metric of the run four figures and a sparkline."""
    table = Table(box=None, pad_edge=False)
    for heading in ("metric", "first", "last", "lowest", "highest", "curve"):
        table.add_column(heading, justify="left" if heading in ("metric", "curve") else "right", no_wrap=True)
    # The metrics of all rows, in order of first appearance: an evaluation, for example, is only in some rows.
    recorded = list(dict.fromkeys(name for row in rows for name in row if name not in ("phase", "step")))
    names = recorded if every_metric else [name for name in MAIN_METRICS if name in recorded]
    curve_width = min(CURVE_WIDTH, max(8, width - FIGURES_WIDTH - max(map(len, names), default=0)))
    for name in names:
        values = [float(row[name]) for row in rows if isinstance(row.get(name), int | float)]
        finite = [value for value in values if math.isfinite(value)]
        if finite:
            figures = (f"{value:.3g}" for value in (values[0], values[-1], min(finite), max(finite)))
            table.add_row(name, *figures, sparkline(values, curve_width))
    return table


def sparkline(values: list[float], width: int) -> str:
    """Return block characters that go from the lowest to the highest value.

    More than `width` values are averaged over neighbours. A value that is not finite is a space.
    """
    size = -(-len(values) // width)
    means = [sum(chunk) / len(chunk) for chunk in (values[i : i + size] for i in range(0, len(values), size))]
    finite = [value for value in means if math.isfinite(value)]
    low, span = (min(finite), max(finite) - min(finite)) if finite else (0.0, 0.0)

    def block(value: float) -> str:
        if not math.isfinite(value):
            return " "
        return BLOCKS[round((value - low) / span * (len(BLOCKS) - 1))] if span > 0 else BLOCKS[0]

    return "".join(map(block, means))
