"""A model, its folder with data files, and a maker of short runs, for tests of options."""

from __future__ import annotations

import copy
import json

import pytest
from support.options import LEARNING_RATE, ROWS, reward_by_position

from latent_grpo import LatentGRPOConfig, LatentGRPOTrainer, LatentSFTConfig, LatentSFTTrainer
from latent_grpo.quickstart.toy_task import make_model, make_problems


@pytest.fixture(scope="session")
def model(tokenizer):
    """The untrained model of which every trainer gets a copy."""
    return make_model(tokenizer, seed=0)


@pytest.fixture(scope="session")
def input_folder(tokenizer, model, tmp_path_factory):
    """A folder with the model, data of the known format, and data of unknown columns."""
    path = tmp_path_factory.mktemp("options")
    model.save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    renamed = [{"riddle": row["prompt"], "thoughts": row["chain"], "result": row["answer"]} for row in ROWS]
    for name, rows in {"data": ROWS, "held_out": make_problems(5, seed=2), "renamed": renamed}.items():
        (path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def make_trainer(tokenizer, model, tmp_path):
    """`make_trainer(kind, reward=..., model=..., rows=..., **options)` returns the trainer of a run of one step."""

    def make(kind, reward=None, model=model, rows=ROWS, **options):
        common = dict(
            output_dir=str(tmp_path / "run"), max_steps=1, learning_rate=LEARNING_RATE, log_table=False, save_steps=0
        )
        model = model if isinstance(model, str) else copy.deepcopy(model)
        if kind == "sft":
            args = LatentSFTConfig(**{**common, "answer_template": "{answer}", **options})
            return LatentSFTTrainer(model, args, rows, tokenizer)
        rollouts = dict(
            latent_top_k=2,
            num_generations=4,
            generation_batch_size=8,
            max_completion_length=4,
            group_filter=False,
            invalid="keep",  # four steps cut most responses off; without an advantage they would train nothing
        )
        args = LatentGRPOConfig(**{**common, **rollouts, **options})
        return LatentGRPOTrainer(model, reward or reward_by_position, args, rows, None, tokenizer)

    return make
