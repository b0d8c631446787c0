"""Numbers and places of processes that cannot train are refused with a remedy."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from support.processes import TRAIN

from latent_grpo import LatentGRPOConfig, LatentGRPOTrainer
from latent_grpo.errors import ConfigError
from latent_grpo.parallel.process_group import process_group
from latent_grpo.quickstart.toy_task import make_model, make_problems, make_tokenizer
from latent_grpo.update import optimizer as optimizer_module

trainer_module = sys.modules["latent_grpo.trainer"]


def make_trainer(folder: Path) -> LatentGRPOTrainer:
    tokenizer = make_tokenizer()
    args = LatentGRPOConfig(**{**TRAIN, "output_dir": str(folder / "run")})
    return LatentGRPOTrainer(make_model(tokenizer, seed=0), "accuracy", args, make_problems(9, seed=1), None, tokenizer)


def test_training_under_torchrun_without_a_process_group_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2: train within"):
        make_trainer(tmp_path)


def test_more_processes_than_prompts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "world_size", lambda: 5)
    with pytest.raises(ConfigError, match="generation_batch_size is 16: 5 processes share its 4 prompts"):
        make_trainer(tmp_path)


def test_an_8_bit_optimizer_in_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_module, "world_size", lambda: 2)
    with pytest.raises(ConfigError, match="optim is 'adamw_8bit': several processes"):
        optimizer_module.make_optimizer([torch.nn.Parameter(torch.zeros(2))], LatentGRPOConfig(optim="adamw_8bit"))


def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="torchrun started 2 processes on a node with 1 GPUs"), process_group():
        pass
