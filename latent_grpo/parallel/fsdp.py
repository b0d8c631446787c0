"""A sharded model (FSDP2), whose parameters are spread over the ranks, and a full model with the same values.

FSDP gathers each decoder layer while it computes and averages its gradients over the ranks. So a rank holds only its
part of the parameters, gradients, float32 copies and optimizer state.

The full model serves all work without gradients, such as sampling. Sampling reads all weights at every step, and ranks
take different numbers of steps, so a sharded model could not sample: its collectives need every rank.
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

from latent_grpo.errors import require
from latent_grpo.parallel.process_group import rank, world_size

Result = TypeVar("Result")


def shard(model: Any, *, sampling: bool) -> Any:
    """Spread the parameters of `model` over the ranks, in place. Return the full model, which `copy_to_full` updates.

    Collective: every rank must call it. All ranks get the parameters of rank 0.

    With one process, the full model is `model` itself. With several, it is a copy: on the device of every rank if
    `sampling`, otherwise on the CPU of rank 0 only, for saving (None on the other ranks).

    Raises:
        ConfigError: torchrun started several processes, but there is no process group, or the model is on a GPU that
            is not this process's own.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size() == 1:
        require(processes == 1, "WORLD_SIZE", processes, "train within `with latent_grpo.process_group():`")
        return model
    own = torch.device("cuda", torch.cuda.current_device()) if model.device.type == "cuda" else model.device
    require(model.device == own, "device", str(model.device), "leave it out: every process takes a GPU of its own")
    # A model that every rank made by itself may differ between ranks.
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)
    # The copy comes before fully_shard, which replaces the parameters of the model by shards.
    full_model = copy.deepcopy(model) if sampling or rank() == 0 else None
    if full_model is not None:
        full_model = full_model.requires_grad_(False).to(model.device if sampling else "cpu")
    mesh = init_device_mesh(model.device.type, (world_size(),))
    # Layers compute in the precision of their parameters. Gradients of many ranks are added up in float32.
    options: dict[str, Any] = dict(mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    for layer in [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    # The trainers call the body and the LM head, not the model's forward, which is all that FSDP hooks by itself.
    model.inside = _call
    register_fsdp_forward_method(model, "inside")
    return full_model


def _call(function: Callable[..., Result], *args: Any) -> Result:
    return function(*args)


def call_inside(model: Any, function: Callable[..., Result], *args: Any) -> Result:
    """Return `function(*args)`, within which the embedding table, LM head and layers of a sharded model are usable.

    Collective: every rank must make the same number of calls, with a backward pass after each.
    """
    result: Result = getattr(model, "inside", _call)(function, *args)
    return result


@torch.no_grad()
def copy_to_full(full_model: Any, model: Any, *, frozen: bool = False) -> None:
    """Copy the trained parameters of a sharded model into its full model; with `frozen`, copy all parameters.

    Collective: every rank must call it. `full_model` is None on ranks that keep no full copy.
    """
    if full_model is model:
        return
    copies = dict(full_model.named_parameters()) if full_model is not None else {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or frozen:
            value = full_tensor(parameter)  # an all-gather, which ranks without a copy take part in too
            if full_model is not None:
                copies[name].copy_(value)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a sharded tensor put together from all ranks (a collective); return any other tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def assign(parameter: Tensor, full: Tensor) -> None:
    """Set a parameter, sharded or not, from its full value, which every rank must give."""
    if isinstance(parameter, DTensor):
        full = full.to(parameter.device, parameter.dtype)
        # Every rank has the full value, so none needs to send it (src_data_rank=None).
        full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(full)
