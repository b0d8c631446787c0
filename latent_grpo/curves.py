"""Curves of a run from its metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PANELS = (
    ("Latent-SFT loss", "sft", {"loss": "loss"}, "KL and cross-entropy an element (nats)"),
    (
        "Accuracy",
        "train",
        {"reward": "reward while sampling, with noise", "eval_pass_at_1": "Pass@1, noise-free"},
        "share",
    ),
    ("Response length", "train", {"response_length": "all steps", "latent_length": "latent steps"}, "steps a response"),
    ("Latent mixtures", "train", {"mixture_entropy": "entropy"}, "nats a latent step"),
    ("Updates", "train", {"clip_fraction": "clipped", "margin_crossed": "margins crossed"}, "share"),
    ("Gradient norm", "train", {"grad_norm": "before clipping"}, "norm"),
)


def draw_curves(metrics: Path, picture: Path, *, title: str) -> None:
    """Six panels over the steps of `metrics` (JSONL) as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for axis, (name, phase, series, unit) in zip(axes.flat, PANELS, strict=True):
        for key, label in series.items():
            points = [(row["step"], row[key]) for row in rows if row["phase"] == phase and key in row]
            plot_series(axis, points, label)
        axis.set(title=name, xlabel=f"{'Latent-SFT' if phase == 'sft' else 'Latent-GRPO'} step", ylabel=unit)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


def plot_series(axis: Any, points: list[tuple[int, float]], label: str) -> None:
    """A line; markers where the points are few."""
    steps, values = [step for step, _ in points], [value for _, value in points]
    axis.plot(steps, values, label=label, marker="o" if len(points) <= 20 else None, linewidth=1.4)
