"""One optimizer step as both trainers take it: clipping, skipping of non-finite gradients, the schedule."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import get_scheduler

from latent_grpo.adapters import has_adapters
from latent_grpo.config import ConfigError, RunOptions
from latent_grpo.model import embedding_table


class Updater:
    """AdamW over the trainable parameters of a model, its schedule, and a count of skipped updates.

    With `args.master_weights`, 16-bit parameters have float32 copies: gradients add up and updates happen there.
    """

    def __init__(self, model: Any, args: RunOptions, total_steps: int, freeze_embeddings: bool) -> None:
        if not has_adapters(model):  # which alone are trained where there are any
            model.requires_grad_(True)
            if freeze_embeddings:
                embedding_table(model).requires_grad_(False)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ConfigError("the model has adapters that are not trainable; merge them, or resume their own run")
        self.masters = [master(p) if args.master_weights else p for p in self.parameters]
        self.optimizer = make_optimizer(self.masters, args)
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

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` to those of the micro-batches before it."""
        loss.backward()
        for parameter, copy in self.copies():
            if parameter.grad is not None:
                gradient = parameter.grad.float()
                copy.grad = gradient if copy.grad is None else copy.grad.add_(gradient)
                parameter.grad = None

    def step(self) -> float:
        """Clip, update and clear the gradients; their norm before clipping. Not finite: no update, a warning, a
        count."""
        norm = float(torch.nn.utils.clip_grad_norm_(self.masters, self.max_grad_norm))
        if math.isfinite(norm):
            self.optimizer.step()
            self.write_back()
        else:
            self.skipped += 1
            warnings.warn(f"gradient norm is {norm}: update skipped ({self.skipped} so far)", stacklevel=2)
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def copies(self) -> list[tuple[Tensor, Tensor]]:
        """(parameter, its float32 copy) of all that have one."""
        return [(p, m) for p, m in zip(self.parameters, self.masters, strict=True) if m is not p]

    @torch.no_grad()
    def write_back(self) -> None:
        """The float32 copies into their parameters."""
        for parameter, copy in self.copies():
            parameter.copy_(copy)

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {
            "optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict(),
            "skipped": self.skipped, "masters": [copy.detach() for _, copy in self.copies()],
        }  # fmt: skip

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.skipped = state["skipped"]
        for (_, copy), saved in zip(self.copies(), state["masters"], strict=True):
            copy.copy_(saved)
        self.write_back()


def master(parameter: Tensor) -> Tensor:
    """A float32 copy of a 16-bit parameter; a float32 parameter itself."""
    if parameter.dtype == torch.float32:
        return parameter
    return torch.nn.Parameter(parameter.detach().float())


def make_optimizer(parameters: list[Tensor], args: RunOptions) -> Any:
    """The optimizer that `args.optim` names; ConfigError where its library is not installed."""
    options: dict[str, Any] = dict(
        lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), weight_decay=args.weight_decay
    )
    if args.optim == "adamw_torch":
        return torch.optim.AdamW(parameters, **options)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(f"optim is {args.optim!r}: pip install 'latent-grpo[bitsandbytes]'") from error
    return AdamW8bit(parameters, **options)
