"""Several processes under torchrun, and one process as the case of a single rank."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


def rank() -> int:
    """This process's number, 0 where there is one process."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def process_group() -> Iterator[None]:
    """The process group of torchrun's environment, over nccl and a GPU a rank where there are GPUs, else gloo.

    Nothing outside torchrun, and where a group exists already.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def gather(values: list[Any]) -> list[Any]:
    """The lists of all ranks one after another, on every rank. The entries must pickle; they are small records."""
    if world_size() == 1:
        return values
    parts: list[list[Any]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, values)
    return [value for part in parts for value in part]
