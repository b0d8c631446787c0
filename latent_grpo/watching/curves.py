"""The curves of a run, drawn from its metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latent_grpo.watching.figures import drawn_figure
from latent_grpo.watching.metrics import read_metrics

ENCODE_PHASES = ("encoder", "decoder", "union")
READ = {"latent/read_back": "chain tokens", "latent/read_answers": "texts"}
# Title, phase, the label of each metric, unit of the vertical axis.
PANELS = (
    ("Warm start", "sft", {"loss": "loss"}, "KL and cross-entropy per element (nats)"),
    (
        "Accuracy",
        "train",
        {"reward": "reward while sampling, with noise", "eval_pass_at_1": "Pass@1, noise-free"},
        "share",
    ),
    (
        "Response length",
        "train",
        {"completions/mean_length": "all steps", "latent/mean_length": "latent steps"},
        "steps per response",
    ),
    ("Latent mixtures", "train", {"latent/mixture_entropy": "entropy"}, "nats per latent step"),
    ("Updates", "train", {"clip_ratio/region_mean": "clipped", "latent/margin_crossed": "margins crossed"}, "share"),
    ("Gradient norm", "train", {"grad_norm": "before clipping"}, "norm"),
    *(
        panel
        for phase in ENCODE_PHASES
        for panel in (
            (f"Loss, {phase}", phase, {"loss": "loss"}, "cross-entropy per token (nats)"),
            (f"Read from latent steps, {phase}", phase, READ, "share of held-out rows"),
        )
    ),
)
STEPS_OF = {"sft": "warm start", "train": "training"}  # other phases have plain names


def draw_curves(metrics: Path, picture: Path, *, caption: str) -> None:
    """Draw the panels for which `metrics` (a JSONL file) has figures, over the steps, as a PNG."""
    rows = read_metrics(metrics)
    panels = [p for p in PANELS if any(row["phase"] == p[1] and not p[2].keys().isdisjoint(row) for row in rows)]
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    with drawn_figure(picture, lines, columns, (1 + 4 * columns, 3.5 * lines), caption=caption) as axes:
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        for axis, (name, phase, series, unit) in zip(axes.flat, panels, strict=False):
            for key, label in series.items():
                points = [(row["step"], row[key]) for row in rows if row["phase"] == phase and key in row]
                plot_series(axis, points, label)
            axis.set(title=name, xlabel=f"{STEPS_OF.get(phase, phase)} step", ylabel=unit)
            axis.legend()


def plot_series(axis: Any, points: list[tuple[int, float]], label: str) -> None:
    """Plot (step, value) points as a line, with markers if there are few points."""
    steps, values = [step for step, _ in points], [value for _, value in points]
    axis.plot(steps, values, label=label, marker="o" if len(points) <= 20 else None, linewidth=1.4)
