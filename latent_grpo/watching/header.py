"""The line above the table of a run: where it runs, on what, and how much of it a step takes."""

from __future__ import annotations

from typing import Any

from latent_grpo.config import LatentGRPOConfig, WarmStartOptions
from latent_grpo.parallel.process_group import world_size
from latent_grpo.watching.environment import device_name


def place(model: Any) -> str:
    """Return device and dtype of a model, and the number of processes if there are several."""
    device = model.device
    name = f"{device} ({device_name(device)})" if device.type == "cuda" else str(device)
    processes = f", {world_size()} processes" if world_size() > 1 else ""
    return f"{name}, {str(next(model.parameters()).dtype).removeprefix('torch.')}{processes}"


def train_header(args: LatentGRPOConfig, model: Any, rows: int, steps: int, note: str | None) -> str:
    """Return the line of a run of `train`. note: a remark on the number of steps, a line of its own."""
    latent = f"; K {args.latent_top_k}, tau {args.tau:g}" if args.latent else ""
    prompts, kind = args.generation_batch_size // args.num_generations, "steps" if args.latent else "tokens"
    line = (
        f"{args.label()} on {place(model)}: {rows} rows; {steps} steps, each of {prompts} prompts x "
        f"{args.num_generations} responses of at most {args.max_completion_length} {kind}{latent}"
    )
    return line if note is None else f"{line}\n{note}"


def warm_start_header(args: WarmStartOptions, label: str, model: Any, rows: int, steps: int) -> str:
    """Return the line of a warm start."""
    return f"{label} on {place(model)}: {rows} rows; {steps} steps, each of {args.update_size(world_size())} examples"
