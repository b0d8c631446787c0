"""A short run of the trainer on the toy task, a reward under which its groups disagree, and made-up rollouts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from latent_grpo import LatentGRPOConfig, LatentGRPOTrainer, Rollout
from latent_grpo.quickstart.toy_task import make_model, make_problems

ROWS = make_problems(64, seed=1)


def grpo(
    folder: Path,
    tokenizer: Any,
    reward: Any = "accuracy",
    model: Any = None,
    rows: Sequence[Any] = ROWS,
    **options: Any,
) -> LatentGRPOTrainer:
    """Return a trainer of 16 responses per step that writes to `folder/run`. It trains a copy of `model`."""
    base = dict(
        output_dir=str(folder / "run"),
        latent_top_k=2,
        generation_batch_size=16,
        num_generations=4,
        max_steps=1,
        per_device_train_batch_size=16,
        max_completion_length=8,
        max_generation_batches=1,
        group_filter=False,
    )
    args = LatentGRPOConfig(**{**base, **options})
    model = make_model(tokenizer, seed=0) if model is None else copy.deepcopy(model)
    return LatentGRPOTrainer(model, reward, args, rows, None, tokenizer)


def even(completions: list[str], **columns: Any) -> list[float]:
    """Reward 1 or 0 by the parity of a text's code points. Most groups of the warm model get both values."""
    return [float(sum(map(ord, text)) % 2 == 0) for text in completions]


def gradients(model: Any) -> torch.Tensor:
    """Return the gradients of all parameters that have one, as one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_same_gradients(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare gradients that differ in the order of their sums, on the scale of the largest one."""
    assert expected.abs().max() > 0
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def rollout_of(lengths: list[int], prompts: list[int], prompt_length: int = 2) -> Rollout:
    """Return a finished text rollout of responses of `lengths` to the prompts of index `prompts`; all ids are 0."""
    rows, steps, count = len(lengths), max(lengths), max(prompts) + 1
    zeros = torch.zeros(rows, steps)
    return Rollout(
        prompt_ids=torch.zeros(count, prompt_length).long(),
        prompt_mask=torch.ones(count, prompt_length).long(),
        prompt_index=torch.tensor(prompts),
        token=zeros.long(),
        ids=zeros.long().unsqueeze(-1),
        scores=zeros.unsqueeze(-1),
        is_latent=zeros.bool(),
        mask=torch.arange(steps) < torch.tensor(lengths).unsqueeze(-1),
        logprob=zeros,
        finished=torch.ones(rows).bool(),
        tau=1.0,
    )
