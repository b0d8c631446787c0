"""The optimizer step of both trainers: clipping, skipping of gradients that are not finite, the learning rate.

With a sharded model, each rank updates its part of the parameters. Clipping uses the norm of the full gradient.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import get_scheduler

from latent_grpo.config import RunOptions
from latent_grpo.errors import ConfigError
from latent_grpo.model import freeze_table
from latent_grpo.model.finite import first_not_finite
from latent_grpo.parallel.fsdp import full_tensor
from latent_grpo.parallel.process_group import world_size
from latent_grpo.update.lora import has_adapters

MASTER = "master"  # prefix of the float32 copies in a checkpoint


class Updater:
    """AdamW over the trainable parameters of a model, with its schedule and a count of skipped updates.

    With `args.master_weights`, 16-bit parameters have float32 copies ("master weights"). Gradients are added up and
    updates are made in the copies, since an update is often smaller than the precision of the parameter.

    Args:
        model: the model to train. Its parameters' `requires_grad` is set here, unless the model has adapters or
            `freeze_embeddings` is None.
        args: the options of optimizer and schedule.
        total_steps: number of optimizer steps that the schedule covers.
        freeze_embeddings: keep the embedding table, and an LM head that is tied to it, with its bias. None: train the
            parameters whose `requires_grad` is set already.

    Raises:
        ConfigError: nothing is trainable, the schedule is unknown, or the optimizer's library is not installed.
    """

    def __init__(self, model: Any, args: RunOptions, total_steps: int, freeze_embeddings: bool | None) -> None:
        # Of a model with adapters, only the adapters are trained.
        if freeze_embeddings is not None and not has_adapters(model):
            model.requires_grad_(True)
            if freeze_embeddings:
                freeze_table(model)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.names, self.parameters = list(trained), list(trained.values())
        if not self.parameters:
            raise ConfigError("the model has adapters that are not trainable; merge them, or resume their own run")
        self.masters = [master(p) if args.master_weights else p for p in self.parameters]
        self.optimizer = make_optimizer(self.masters, args)
        try:
            warmup = args.warmup_of(total_steps)
            self.scheduler = get_scheduler(args.lr_scheduler_type, self.optimizer, warmup, total_steps)
        except ValueError as error:
            raise ConfigError(f"lr_scheduler_type is {args.lr_scheduler_type!r}: {error}") from error
        self.max_grad_norm = args.max_grad_norm or math.inf  # 0 stands for no clipping; the norm is logged all the same
        self.skipped = self.skipped_in_row = 0
        self.most_in_row = 0  # skipped updates since whoever reads this has set it back
        self.bad_gradient: str | None = None  # the parameter that the last skipped update names

    @property
    def learning_rate(self) -> float:
        """The current learning rate."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def updates(self) -> int:
        """The number of updates so far, skipped ones included. A checkpoint keeps it."""
        return int(self.scheduler.last_epoch)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` (0-d) to those of earlier micro-batches; losses of the ranks are added up."""
        # A sharded model averages the gradients over the ranks, so the factor makes the average a sum.
        (loss * world_size()).backward()
        for parameter, copy in self.copies():
            if parameter.grad is not None:
                gradient = parameter.grad.float()
                copy.grad = gradient if copy.grad is None else copy.grad.add_(gradient)
                parameter.grad = None  # a second gradient per parameter would stay in memory

    def step(self) -> float:
        """Clip the gradients, update and clear them. Return their norm before clipping.

        If the norm is not finite, skip the update, warn and count it. The learning rate moves on in any case.
        """
        # The norm of sharded gradients is a DTensor with a partial norm per rank. full_tensor combines them.
        norm = float(full_tensor(torch.nn.utils.clip_grad_norm_(self.masters, self.max_grad_norm)))
        if math.isfinite(norm):
            self.optimizer.step()
            self.write_back()
            self.skipped_in_row = 0
        else:
            self.skipped, self.skipped_in_row = self.skipped + 1, self.skipped_in_row + 1
            self.most_in_row = max(self.most_in_row, self.skipped_in_row)
            gradients = ((name, copy.grad) for name, copy, _ in self.trained() if copy.grad is not None)
            self.bad_gradient = first_not_finite(gradients)
            warnings.warn(f"gradient norm is {norm}: update skipped ({self.skipped} so far)", stacklevel=2)
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def copies(self) -> list[tuple[Tensor, Tensor]]:
        """Return (parameter, its float32 copy) of the parameters that have a copy."""
        return [(p, m) for p, m in zip(self.parameters, self.masters, strict=True) if m is not p]

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the float32 copies into their parameters."""
        for parameter, copy in self.copies():
            parameter.copy_(copy)

    def tensors(self) -> dict[str, Tensor]:
        """Return the large tensors for a checkpoint, by names like `exp_avg.NAME`. Each rank has its part of them."""
        large = {f"{MASTER}.{name}": m.detach() for name, m, p in self.trained() if m is not p}
        for name, copy, _ in self.trained():
            state = self.optimizer.state.get(copy, {})
            large |= {f"{key}.{name}": value for key, value in state.items() if _is_sharded(value, copy)}
        return large

    def state_dict(self) -> dict[str, Any]:
        """Return the rest of the state, which is small and the same on every rank."""
        # By name: PyTorch's own state_dict numbers the parameters, and it mixes large and small values.
        small = {
            name: {k: v for k, v in self.optimizer.state.get(copy, {}).items() if not _is_sharded(v, copy)}
            for name, copy, _ in self.trained()
        }
        counts = {"skipped": self.skipped, "skipped_in_row": self.skipped_in_row}
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        return {"state": small, "groups": groups, "scheduler": self.scheduler.state_dict(), **counts}

    def empty(self, name: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
        """Allocate the tensor into which a tensor of a checkpoint is read, sharded like its parameter.

        Raises:
            ValueError: the parameter does not have that size.
        """
        parameter = self.masters[self.names.index(name.partition(".")[2])]
        if parameter.shape != size:
            raise ValueError(f"{name} is {list(size)} there and {list(parameter.shape)} here")
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)

    @torch.no_grad()
    def load(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Restore what `state_dict` and `tensors` returned."""
        values = {name: dict(state["state"][name]) for name in self.names}
        for full_name, value in tensors.items():
            key, _, name = full_name.partition(".")
            values[name][key] = value
        for name, copy, parameter in self.trained():
            if copy is not parameter:
                copy.copy_(values[name].pop(MASTER))
            if values[name]:  # empty before the first update
                self.optimizer.state[copy] = values[name]
        for group, saved in zip(self.optimizer.param_groups, state["groups"], strict=True):
            group.update(saved)
        self.scheduler.load_state_dict(state["scheduler"])
        self.skipped, self.skipped_in_row = state["skipped"], state.get("skipped_in_row", 0)
        self.write_back()

    def trained(self) -> list[tuple[str, Tensor, Tensor]]:
        """Return (name, float32 copy or the parameter itself, parameter) of the trained parameters."""
        return list(zip(self.names, self.masters, self.parameters, strict=True))


def _is_sharded(value: Any, parameter: Tensor) -> bool:
    """Tell whether a value has the parameter's shape and is sharded with it. Counts and 8-bit tables do not."""
    return isinstance(value, Tensor) and value.shape == parameter.shape


def master(parameter: Tensor) -> Tensor:
    """Return a float32 copy of a 16-bit parameter; return a float32 parameter itself."""
    if parameter.dtype == torch.float32:
        return parameter
    return torch.nn.Parameter(parameter.detach().float())


def make_optimizer(parameters: list[Tensor], args: RunOptions) -> Any:
    """Make the optimizer that `args.optim` names.

    Raises:
        ConfigError: its library is not installed, or it cannot be sharded and there are several processes.
    """
    options: dict[str, Any] = dict(
        lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), weight_decay=args.weight_decay
    )
    if args.optim == "adamw_torch":
        return torch.optim.AdamW(parameters, **options)
    if world_size() > 1:
        raise ConfigError(f"optim is {args.optim!r}: several processes shard the optimizer; use adamw_torch")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(f"optim is {args.optim!r}: pip install bitsandbytes") from error
    return AdamW8bit(parameters, **options)
