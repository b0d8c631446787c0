"""The large tensors of a checkpoint: several files, and a file that another rank wrote elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from latent_grpo.errors import ConfigError
from latent_grpo.saving import tensor_shards as shards_module
from latent_grpo.saving.tensor_shards import read_shards, write_shards


def test_a_file_that_another_rank_wrote_elsewhere_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = "shard-00002-model-00001-of-00001.safetensors"
    monkeypatch.setattr(shards_module, "all_gather", lambda names: [*names, elsewhere])
    with pytest.raises(ConfigError, match=r"shard-00002.* is not seen by rank 0: give an output_dir"):
        write_shards(tmp_path / "optimizer", {"a": torch.ones(3)})


def test_large_states_are_written_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "FILE_BYTES", 1000)
    tensors = {name: torch.randn(100) for name in "abcdef"}
    write_shards(tmp_path / "optimizer", tensors)
    assert len(list((tmp_path / "optimizer").iterdir())) == 3
    read = read_shards(tmp_path / "optimizer", lambda name, size, dtype: torch.zeros(size, dtype=dtype))
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
