"""Tensors of a checkpoint that every rank writes its part of, in safetensors, and any number of ranks reads."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from latent_grpo.distributed import on_rank_zero, world_size


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write the tensors, sharded or the same on every rank, into a new folder. All ranks call, with the same names."""
    on_rank_zero(folder.mkdir)
    if tensors:
        writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        with _one_process_is_no_surprise():
            dcp.save(dict(tensors), storage_writer=writer, no_dist=world_size() == 1)


def read_shards(folder: Path, empty: Callable[[str, torch.Size, torch.dtype], Tensor]) -> dict[str, Tensor]:
    """The tensors of `write_shards` by name; `empty` makes what each is read into, sharded as it is wanted here."""
    reader = dcp.HuggingFaceStorageReader(str(folder))
    known: dict[str, Any] = reader.read_metadata().state_dict_metadata
    tensors = {name: empty(name, part.size, part.properties.dtype) for name, part in sorted(known.items())}
    if tensors:
        with _one_process_is_no_surprise():
            dcp.load(tensors, storage_reader=reader, no_dist=world_size() == 1)
    return tensors


@contextmanager
def _one_process_is_no_surprise() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield
