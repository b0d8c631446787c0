"""One optimizer step as both trainers take it: clipping, skipping of non-finite gradients, the schedule."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from transformers import get_scheduler

from latent_grpo.config import ConfigError, RunOptions
from latent_grpo.model import embedding_table


class Updater:
    """AdamW over the trainable parameters of a model, its schedule, and a count of skipped updates."""

    def __init__(self, model: Any, args: RunOptions, total_steps: int, freeze_embeddings: bool) -> None:
        model.requires_grad_(True)
        if freeze_embeddings:
            embedding_table(model).requires_grad_(False)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        betas = (args.adam_beta1, args.adam_beta2)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=args.learning_rate, betas=betas, weight_decay=args.weight_decay
        )
        try:
            self.scheduler = get_scheduler(args.lr_scheduler_type, self.optimizer, args.warmup_steps, total_steps)
        except ValueError as error:
            raise ConfigError(f"lr_scheduler_type is {args.lr_scheduler_type!r}: {error}") from error
        self.max_grad_norm = args.max_grad_norm or math.inf
        self.skipped = 0

    @property
    def learning_rate(self) -> float:
        """The current learning rate."""
        return float(self.optimizer.param_groups[0]["lr"])

    def step(self) -> float:
        """Clip, update and clear the gradients; their norm before clipping. Not finite: no update, a warning, a
        count."""
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm))
        if math.isfinite(norm):
            self.optimizer.step()
        else:
            self.skipped += 1
            warnings.warn(f"gradient norm is {norm}: update skipped ({self.skipped} so far)", stacklevel=2)
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {
            "optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict(), "skipped": self.skipped
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.skipped = state["skipped"]
