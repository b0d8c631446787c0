"""Runs of two small steps, for tests of what a run leaves and of what ends it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latent_grpo import LatentGRPOConfig, LatentGRPOTrainer
from latent_grpo.quickstart.toy_task import make_model, make_problems, make_tokenizer

ROWS = make_problems(20, seed=1)


def grpo(out: Path, rows: Any = ROWS, model: Any = None, reward: Any = "accuracy", **options: Any) -> LatentGRPOTrainer:
    """Return a trainer of two steps with a checkpoint after each."""
    base: dict[str, Any] = dict(
        output_dir=str(out),
        latent_top_k=2,
        num_generations=4,
        generation_batch_size=8,
        max_completion_length=4,
        group_filter=False,
        max_steps=2,
        save_steps=1,
    )
    tokenizer = make_tokenizer()
    model = model or make_model(tokenizer, seed=0)
    return LatentGRPOTrainer(model, reward, LatentGRPOConfig(**{**base, **options}), rows, None, tokenizer)
