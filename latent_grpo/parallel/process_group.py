"""Several processes under torchrun, and one process as the case of a single rank."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from latent_grpo.config import ConfigError

Result = TypeVar("Result")


def rank() -> int:
    """This process's number, 0 where there is one process."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def process_group() -> Iterator[None]:
    """The process group of torchrun's environment: nccl between GPUs, one a rank, and gloo between CPUs.

    Nothing outside torchrun, and where a group exists already. Rank 0 alone warns: the others would say the same.
    Raises ConfigError where a node has more processes than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield
        return
    gpus, local_rank = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
    if gpus:
        if local_rank >= gpus:
            local = os.environ.get("LOCAL_WORLD_SIZE", "?")
            raise ConfigError(f"torchrun started {local} processes on a node with {gpus} GPUs; give one a GPU")
        torch.cuda.set_device(local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
    if rank():
        warnings.simplefilter("ignore")
    yield
    dist.destroy_process_group()  # not after an error: it would wait for the others, which torchrun is to end


def all_gather(values: list[Any]) -> list[Any]:
    """The lists of all ranks one after another, on every rank. The entries must pickle; tensors in them belong on the
    CPU."""
    if world_size() == 1:
        return values
    parts: list[list[Any]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, values)
    return [value for part in parts for value in part]


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum over the ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def all_reduce_max(value: int) -> int:
    """The largest of the ranks' values."""
    if world_size() == 1:
        return value
    found = torch.tensor(value)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def on_rank_zero(function: Callable[[], Result]) -> Result:
    """What `function` returns on rank 0, which alone calls it; the others wait. Its ConfigError is everyone's."""
    if world_size() == 1:
        return function()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except ConfigError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise ConfigError(outcome[1])
    result: Result = outcome[0]
    return result
