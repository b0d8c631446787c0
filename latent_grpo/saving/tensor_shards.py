"""The large tensors of a checkpoint, in safetensors. Every rank writes its part; any number of ranks reads them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from latent_grpo.errors import ConfigError, first_line
from latent_grpo.parallel.process_group import all_gather, on_rank_zero, rank, world_size

FILE_BYTES = 2**31  # bytes of full tensors per file; the file of a rank holds its part of each


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors, sharded as they are, into a new folder.

    Collective: every rank must call it, with the same names.

    Raises:
        ConfigError: the ranks do not see the same folder. Otherwise nobody would notice until the checkpoint is read.
        OSError: a part could not be written on some rank. Every rank raises it.
    """
    on_rank_zero(folder.mkdir)
    if not tensors:
        return
    # The writer puts a file together in memory, so large states go to several files.
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors.values()]
    files = {name: 1 + sum(sizes[:i]) // FILE_BYTES for i, name in enumerate(tensors)}
    writer = dcp.HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files, save_distributed=True)
    with _plain_errors():
        dcp.save(dict(tensors), storage_writer=writer, no_dist=world_size() == 1)
    written = all_gather([path.name for path in folder.glob(f"shard-{rank() + 1:05d}-*")])
    on_rank_zero(lambda: _check_seen(folder, written))


def _check_seen(folder: Path, names: list[str]) -> None:
    """Raise ConfigError for the first file that another rank wrote and this rank does not see."""
    for name in names:
        if not (folder / name).exists():
            where = f"{name} of {str(folder)!r} is not seen by rank 0"
            raise ConfigError(f"{where}: give an output_dir on a file system that all nodes share")


def read_shards(folder: Path, empty: Callable[[str, torch.Size, torch.dtype], Tensor]) -> dict[str, Tensor]:
    """Return the tensors that `write_shards` wrote, by name. Collective: every rank must call it.

    empty: makes the tensor, sharded as this run needs it, into which a tensor of that name, size and dtype is read.

    Raises:
        ValueError: a part of a tensor is missing. If the part at the end is missing, the file says that the tensor is
            smaller than it was; `empty` can notice it by the size.
    """
    reader = dcp.HuggingFaceStorageReader(str(folder))
    stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
    for name, metadata in stored.items():
        # The reader would leave a missing part at zero.
        if sum(chunk.sizes.numel() for chunk in metadata.chunks) != metadata.size.numel():
            raise ValueError(f"a part of {name} is missing")
    # In one order on every rank, because reading is a collective.
    tensors = {name: empty(name, data.size, data.properties.dtype) for name, data in sorted(stored.items())}
    if tensors:
        with _plain_errors():
            dcp.load(tensors, storage_reader=reader, no_dist=world_size() == 1)
    return tensors


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise the first error of a rank, where torch.distributed.checkpoint raises all of them with tracebacks as text.

    Its own error is no `Exception`: a full disk would end the run like a signal. Silence its warning that there is one
    process.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        try:
            yield
        except dcp.CheckpointException as error:
            cause = next((failure[0] for failure in error.failures.values()), error)
            raise OSError(first_line(cause)) from error
