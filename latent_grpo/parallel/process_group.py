"""The process group that torchrun starts, and the collectives on it. One process is the case of a single rank.

Without a process group every collective returns its argument, so the callers need no case of their own.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from latent_grpo.errors import ConfigError, DataError, ModelError, RewardError, SaveError, TrainingError
from latent_grpo.parallel.heartbeat import heartbeat

Result = TypeVar("Result")
# After its last collective, gloo's worker thread frees the tensors of it, for which it needs the interpreter. Before
# Python 3.14, an interpreter that is shutting down ends such a thread, and C++ answers with an abort. So the workers
# get this many seconds. `destroy_process_group` does not wait for them while a sharded model still holds the group.
WORKERS_FINISH = 0.5


class OtherRankError(RuntimeError):
    """Another rank has failed, with an error of a kind that only its traceback explains."""


def rank() -> int:
    """Return the rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def process_group() -> Iterator[None]:
    """Open the process group that torchrun's environment describes: nccl for GPUs (one per rank), gloo for CPUs.

    Do nothing outside torchrun, and nothing if a group exists already. Within, only rank 0 shows warnings, because the
    other ranks would show the same ones.

    Raises:
        ConfigError: a node has more processes than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield
        return
    gpus, local_rank = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
    if gpus:
        if local_rank >= gpus:
            local_processes = os.environ.get("LOCAL_WORLD_SIZE", "?")
            raise ConfigError(
                f"torchrun started {local_processes} processes on a node with {gpus} GPUs; give --nproc-per-node {gpus}"
            )
        torch.cuda.set_device(local_rank)
    # Objects and counters are exchanged as CPU tensors even when the model is on GPUs.
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
    if rank():
        warnings.simplefilter("ignore")
    with heartbeat():
        yield
    # Not in a `finally`: after an error it would wait for the other ranks. torchrun ends them.
    dist.destroy_process_group()
    time.sleep(WORKERS_FINISH)


def all_gather(values: list[Any]) -> list[Any]:
    """Return the lists of all ranks, concatenated in the order of the ranks, on every rank.

    Collective: every rank must call it. The entries are pickled, so move tensors in them to the CPU first.
    """
    if world_size() == 1:
        return values
    lists: list[list[Any]] = [[] for _ in range(world_size())]
    dist.all_gather_object(lists, values)
    return [value for values in lists for value in values]


def all_reduce_sum(values: Tensor) -> Tensor:
    """Add a tensor up over the ranks, in place, and return it. Collective: every rank must call it."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def all_reduce_max(value: int) -> int:
    """Return the largest value of all ranks. Collective: every rank must call it."""
    if world_size() == 1:
        return value
    largest = torch.tensor(value)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def on_rank_zero(function: Callable[[], Result]) -> Result:
    """Call `function` on rank 0 only, and return its result on every rank. Collective: every rank must call it.

    The other ranks wait for rank 0. If `function` raises an error that one line explains, every rank raises it. Of
    another error the other ranks raise OtherRankError.
    """
    if world_size() == 1:
        return function()
    outcome: list[Any] = [None, None]  # the result, the error's kind and message
    raised: Exception | None = None
    if rank() == 0:
        # An error that left the function here would leave the other ranks waiting in the broadcast.
        try:
            outcome[0] = function()
        except Exception as error:
            raised, outcome[1] = error, (type(error).__name__, str(error))
    dist.broadcast_object_list(outcome)
    if raised is not None:
        raise on_every_rank(raised)
    if outcome[1] is not None:
        raise on_every_rank(_error_of(*outcome[1]))
    result: Result = outcome[0]
    return result


def raise_together(error: Exception | None) -> None:
    """Raise the error of the first rank that has one, on every rank. Collective: every rank must call it."""
    found = [each for each in all_gather([error and (type(error).__name__, str(error))]) if each]
    if found:
        raise on_every_rank(error if error is not None else _error_of(*found[0]))


def on_every_rank(error: Exception) -> Exception:
    """Return an error, marked as one that every rank raises at the same place: a checkpoint may follow."""
    error.on_every_rank = True  # type: ignore[attr-defined]
    return error


def _error_of(kind: str, message: str) -> Exception:
    kinds = {
        each.__name__: each for each in (ConfigError, DataError, ModelError, RewardError, SaveError, TrainingError)
    }
    return kinds[kind](message) if kind in kinds else OtherRankError(f"{kind} on another rank: {message}")
