"""Responses as a person reads them: every latent step as its mixture."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from latent_grpo.rollout.trajectory import Rollout, visible_text


def mixture_line(tokenizer: Any, rollout: Rollout, row: int, step: int, top: int) -> str:
    """A latent step's components by weight, as `0.61 '12' + 0.39 '7'`."""
    weights = (rollout.scores[row, step] / rollout.tau).softmax(-1)
    order = weights.argsort(descending=True)[:top]
    parts = [f"{float(weights[i]):.2f} {tokenizer.decode([int(rollout.ids[row, step, i])])!r}" for i in order]
    return " + ".join(parts) + (" + ..." if len(weights) > top else "")


def response_lines(tokenizer: Any, rollout: Rollout, row: int, end_marker: str, top: int = 4) -> list[str]:
    """A line for every latent step, then the visible answer."""
    steps = rollout.is_latent[row].nonzero().squeeze(-1).tolist()
    lines = [f"latent {n}: {mixture_line(tokenizer, rollout, row, step, top)}" for n, step in enumerate(steps, 1)]
    text = visible_text(tokenizer, rollout, end_marker)[row]
    return [*lines, f"answer: {text}" + ("" if bool(rollout.finished[row]) else "  (cut off by the limit)")]


def print_response(tokenizer: Any, rollout: Rollout, row: int, end_marker: str, top: int = 4) -> None:
    """Print `response_lines`, latent steps dimmed."""
    console = Console(highlight=False)
    for line in response_lines(tokenizer, rollout, row, end_marker, top):
        console.print(Text(line, style="dim" if line.startswith("latent") else "bold"))
