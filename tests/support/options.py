"""Short runs for tests of options: rows, a reward, and records of what a run did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from latent_grpo.quickstart.toy_task import make_problems
from latent_kernels import LatentStepOptions

ROWS = make_problems(16, seed=1)
BOTH_TRAINERS = pytest.mark.parametrize("kind", ["train", "sft"])
LEARNING_RATE = 1e-3


def reward_by_position(prompts: list[str], **columns: Any) -> list[float]:
    """Return rewards that differ within every group of four, so that no advantage of a group is 0 by chance."""
    return [float(i % 4) for i in range(len(prompts))]


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def record_optimizer_steps(trainer: Any) -> list[tuple[float, float]]:
    """Return a list that receives the learning rate and the gradient norm of every optimizer step of `trainer`."""
    steps = []

    def record(optimizer, args, kwargs):
        (group,) = optimizer.param_groups
        gradients = [p.grad.flatten() for p in group["params"] if p.grad is not None]
        steps.append((group["lr"], float(torch.cat(gradients).norm())))

    trainer.updater.optimizer.register_step_pre_hook(record)
    return steps


def record_calls(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[tuple[tuple, dict[str, Any], Any]]:
    """Return a list that receives (positional arguments, options, result) of every call of a module's function.

    The options include the fields of a LatentStepOptions argument.
    """
    calls = []
    function = getattr(module, name)

    def call(*args, **keywords):
        options = keywords | {k: v for x in args if isinstance(x, LatentStepOptions) for k, v in vars(x).items()}
        # The decoder overwrites its tensors in place at the next step.
        copies = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        inputs = tuple(x.clone() if type(x) is torch.Tensor else x for x in args)  # no parameters
        result = function(*args, **keywords)
        calls.append((inputs, copies, result))
        return result

    monkeypatch.setattr(module, name, call)
    return calls
