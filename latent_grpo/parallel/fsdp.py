"""A model whose parameters are spread over the ranks (FSDP2), beside the same model whole.

Each decoder layer is gathered while it computes and its gradients are averaged over the ranks, so that a rank holds
its part of the parameters, gradients, float32 copies and optimizer state. Sampling reads all weights at every step, and
ranks take different numbers of steps: it, and all else without gradients, uses a whole copy on every rank.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from latent_grpo.config import require
from latent_grpo.parallel.process_group import rank, world_size

Result = TypeVar("Result")


def shard(model: Any, *, sampling: bool) -> Any:
    """Spread the parameters over the ranks, in place; the whole model, which `copy_to_full` keeps up to date.

    That is the model itself where there is one process; else a copy, on every rank where `sampling`, and otherwise on
    rank 0's CPU alone, for saving (None on the others). All ranks get rank 0's parameters.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size() == 1:
        require(processes == 1, "WORLD_SIZE", processes, "train within `with latent_grpo.process_group():`")
        return model
    own = torch.device("cuda", torch.cuda.current_device()) if model.device.type == "cuda" else model.device
    require(model.device == own, "device", str(model.device), "leave it out: every process takes a GPU of its own")
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)
    whole = copy.deepcopy(model) if sampling or rank() == 0 else None
    if whole is not None:
        whole = whole.requires_grad_(False).to(model.device if sampling else "cpu")
    mesh = init_device_mesh(model.device.type, (world_size(),))
    # Parameters are computed with in their own precision; gradients of many ranks are added up in float32.
    options: dict[str, Any] = dict(mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    for layer in [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    model.inside = _call
    register_fsdp_forward_method(model, "inside")
    return whole


def _call(function: Callable[..., Result], *args: Any) -> Result:
    return function(*args)


def call_inside(model: Any, function: Callable[..., Result], *args: Any) -> Result:
    """`function(*args)`, in which a sharded model's embedding table, LM head and layers may be used.

    As many calls, with a backward pass after each, are due on every rank.
    """
    result: Result = getattr(model, "inside", _call)(function, *args)
    return result


@torch.no_grad()
def copy_to_full(whole: Any, model: Any, *, frozen: bool = False) -> None:
    """The trained parameters of a sharded model, or all, into its whole copy (None where this rank has none); all ranks
    call."""
    if whole is model:
        return
    copies = dict(whole.named_parameters()) if whole is not None else {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or frozen:
            full = full_tensor(parameter)
            if whole is not None:
                copies[name].copy_(full)


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor with the parts of all ranks; itself where it is not sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def assign(parameter: Tensor, full: Tensor) -> None:
    """Set a parameter, sharded or not, from its whole value."""
    if isinstance(parameter, DTensor):
        full = full.to(parameter.device, parameter.dtype)
        full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(full)


def pad_to_count(parts: list[Any], filler: Any, most: int) -> list[tuple[Any, bool]]:
    """`most` parts, and whether each is one of `parts` or the filler: every rank has as many."""
    return [(part, True) for part in parts] + [(filler, False)] * (most - len(parts))
