"""A folder with problems and a model that answers some of them, for tests of the evaluation."""

from __future__ import annotations

import json

import pytest
from support.evaluations import ROWS

from latent_grpo import LatentSFTConfig, LatentSFTTrainer
from latent_grpo.model import load_model
from latent_grpo.quickstart.toy_task import make_model, make_problems


@pytest.fixture(scope="session")
def folder(tokenizer, tmp_path_factory):
    """A folder with problems and a model that has learned little more than the form of a response.

    So its samples are correct now and then.
    """
    folder = tmp_path_factory.mktemp("evaluate")
    args = LatentSFTConfig(
        output_dir=str(folder / "model"),
        max_steps=40,
        learning_rate=3e-3,
        answer_template="{answer}",
        per_device_train_batch_size=16,
    )
    LatentSFTTrainer(make_model(tokenizer, seed=0), args, make_problems(64, seed=1), tokenizer).train()
    (folder / "data.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    return folder


@pytest.fixture(scope="session")
def model(folder):
    return load_model(str(folder / "model"))
