"""The toy task's tokenizer and a warm model, for every test of the trainer."""

from __future__ import annotations

import pytest
from support.trainers import ROWS

from latent_grpo import LatentSFTConfig, LatentSFTTrainer
from latent_grpo.quickstart.toy_task import make_model, make_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def warm(tokenizer, tmp_path_factory):
    """A model that has learned the form of a response and little else, so that rewards disagree within a group.

    `support.trainers.grpo` trains a copy, so every test starts from the same model.
    """
    out = str(tmp_path_factory.mktemp("warm"))
    args = LatentSFTConfig(output_dir=out, max_steps=40, learning_rate=3e-3, answer_template="{answer}")
    model = make_model(tokenizer, seed=0)
    LatentSFTTrainer(model, args, ROWS, tokenizer).train()
    return model
