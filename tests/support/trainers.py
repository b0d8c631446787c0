"""A short reinforcement on the toy task, and a reward under which its groups disagree."""

from __future__ import annotations

import copy

import torch

from latent_grpo import LatentGRPOConfig, LatentGRPOTrainer
from latent_grpo.quickstart.toy_task import make_model, make_problems

ROWS = make_problems(64, seed=1)


def grpo(tmp_path, tokenizer, reward="accuracy", model=None, rows=ROWS, **options) -> LatentGRPOTrainer:
    base = dict(
        output_dir=str(tmp_path / "run"), latent_top_k=2, generation_batch_size=16, num_generations=4, max_steps=1,
        per_device_train_batch_size=16, max_completion_length=8, max_generation_batches=1, group_filter=False,
    )  # fmt: skip
    args = LatentGRPOConfig(**{**base, **options})
    model = make_model(tokenizer, seed=0) if model is None else copy.deepcopy(model)
    return LatentGRPOTrainer(model, reward, args, rows, None, tokenizer)


def even(completions, **kwargs):
    """A reward with both values in most groups of the warm model."""
    return [float(sum(map(ord, text)) % 2 == 0) for text in completions]


def gradients(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
