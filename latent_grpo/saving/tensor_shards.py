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

from latent_grpo.config import ConfigError
from latent_grpo.parallel.process_group import all_gather, on_rank_zero, rank, world_size

FILE_BYTES = 2**31  # of whole tensors in a rank's file, of which it holds its part


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write the tensors, sharded as they are, into a new folder. All ranks call, with the same names.

    ConfigError where the folder is not one that all ranks see: nothing else would tell before it is read.
    """
    on_rank_zero(folder.mkdir)
    if not tensors:
        return
    # A file is put together in memory.
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors.values()]
    files = {name: 1 + sum(sizes[:i]) // FILE_BYTES for i, name in enumerate(tensors)}
    writer = dcp.HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files, save_distributed=True)
    with _one_process_is_no_surprise():
        dcp.save(dict(tensors), storage_writer=writer, no_dist=world_size() == 1)
    written = all_gather([path.name for path in folder.glob(f"shard-{rank() + 1:05d}-*")])
    on_rank_zero(lambda: _check_seen(folder, written))


def _check_seen(folder: Path, names: list[str]) -> None:
    """ConfigError for the first file that another rank wrote and this one does not see."""
    for name in names:
        if not (folder / name).exists():
            where = f"{name} of {str(folder)!r} is not seen by rank 0"
            raise ConfigError(f"{where}: give an output_dir on a file system that all nodes share")


def read_shards(folder: Path, empty: Callable[[str, torch.Size, torch.dtype], Tensor]) -> dict[str, Tensor]:
    """The tensors of `write_shards` by name; `empty` makes what each is read into, sharded as it is wanted here.

    ValueError where a part of one is missing; of the last part `empty` can tell by the shape.
    """
    reader = dcp.HuggingFaceStorageReader(str(folder))
    known: dict[str, Any] = reader.read_metadata().state_dict_metadata
    for name, part in known.items():
        if sum(chunk.sizes.numel() for chunk in part.chunks) != part.size.numel():
            raise ValueError(f"a part of {name} is missing")
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
