"""A checkpoint is written whole, resumed only by its own run, and refused with a remedy if it is damaged."""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.killed_runs import metrics_of
from support.small_runs import ROWS, grpo
from transformers import LlamaForCausalLM

from latent_grpo import LatentGRPOConfig, LatentSFTConfig, LatentSFTTrainer
from latent_grpo.errors import ConfigError
from latent_grpo.quickstart.toy_task import make_model, make_problems, make_tokenizer
from latent_grpo.saving import checkpoint as checkpoint_module
from latent_grpo.saving.integrity import STATE_FILE, TENSOR_FILE, checkpoints_in
from latent_grpo.saving.random_streams import random_state, set_random_state
from latent_grpo.saving.run_identity import fingerprint


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps with a checkpoint after each."""
    out = tmp_path_factory.mktemp("finished") / "run"
    grpo(out).train()
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A copy of `finished`, which a test may damage."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(trainer, run: Path, match: str) -> None:
    """Check that a resume is refused in one line and leaves every file as it was."""
    before = contents(run)
    with pytest.raises(ConfigError, match=match) as error:
        trainer.train(resume_from_checkpoint=True)
    assert "\n" not in str(error.value)
    assert contents(run) == before


@pytest.mark.parametrize("name", ["model.safetensors", TENSOR_FILE, "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_torn_checkpoint_is_refused(name, damage, run):
    path = run / "checkpoint-2" / name
    if damage == "missing":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2)
    assert_refused(grpo(run), run, rf"checkpoint-2' is torn: {name} .*choose another, as .*checkpoint-1'")


def test_a_checkpoint_with_damaged_tensors_of_the_right_size_is_refused(run):
    path = run / "checkpoint-2" / TENSOR_FILE
    path.write_bytes(b"x" * path.stat().st_size)
    assert_refused(grpo(run), run, "checkpoint-2' cannot be read")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": 1}'])
def test_a_checkpoint_with_a_damaged_state_is_refused(text, run):
    (run / "checkpoint-2" / STATE_FILE).write_text(text)
    assert_refused(grpo(run), run, f"checkpoint-2': {STATE_FILE} cannot be read")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"seed": 1}, "written with seed 0, this run has 1"),
        ({"num_generations": 2}, "written with num_generations 4, this run has 2"),
        ({"tau": 0.5}, "written with tau 1.0, this run has 0.5"),
        ({"per_device_train_batch_size": 4}, "written with updates of 32 .*, this run has 4"),
    ],
)
def test_a_checkpoint_of_other_options_is_refused(options, match, run):
    assert_refused(grpo(run, **options), run, match)


def test_a_checkpoint_knows_the_precision_that_auto_stood_for(run):
    state = json.loads((run / "checkpoint-2" / STATE_FILE).read_text())
    assert state["options"]["dtype"] == "float32"
    grpo(run, dtype="float32", max_steps=3).train(resume_from_checkpoint=True)
    model = make_model(make_tokenizer(), seed=0).to(torch.bfloat16)
    assert_refused(grpo(run, model=model), run, "written with dtype 'float32', this run has 'bfloat16'")


def test_a_checkpoint_of_another_schedule_is_refused(tmp_path):
    run = tmp_path / "run"
    grpo(run, lr_scheduler_type="linear").train()
    longer = grpo(run, lr_scheduler_type="linear", max_steps=4)
    assert_refused(longer, run, "has a linear schedule over 2 steps, this run has one over 4")


@pytest.mark.parametrize(
    ("missing", "options", "match"),
    [
        (
            "method",
            dict(method="multiplex", latent_top_p=1.0),
            "written with method 'latent_grpo', this run",
        ),
        ("use_bias_correction_kl", {}, "written with use_bias_correction_kl False, this run has True"),
        ("reward_completions", {}, "written with reward_completions 'visible', this run has 'response'"),
        ("max_rollouts", dict(loss_type="cispo"), "written with epsilon_high 5.0, this run has None"),
        ("max_rollouts", {}, "a version whose max_steps counted rollouts, as max_rollouts does now"),
    ],
)
def test_an_option_that_a_checkpoint_is_older_than_has_its_earlier_meaning(missing, options, match, run):
    for path in run.glob("checkpoint-*/trainer_state.json"):
        state = json.loads(path.read_text())
        del state["options"][missing], state["sha256"], state["state_sha256"]  # they are newer than these options
        state["options"] |= {name: value for name, value in options.items() if name != missing}
        path.write_text(json.dumps(state))
    assert_refused(grpo(run, **options), run, match)


def test_a_checkpoint_of_another_model_is_refused(run):
    config = make_model(make_tokenizer(), seed=0).config
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 96, 16
    narrow = LlamaForCausalLM(config)
    assert_refused(grpo(run, model=narrow), run, r"is of another model: .* is \[.*\] there and \[.*\] here")


def test_a_checkpoint_of_other_data_is_refused(run):
    assert_refused(grpo(run, rows=make_problems(20, seed=2)), run, "other training data")
    assert fingerprint(ROWS) != fingerprint(ROWS[:-1])


def test_a_checkpoint_of_another_kind_is_refused(run):
    args = LatentSFTConfig(output_dir=str(run), answer_template="{answer}", max_steps=2)
    tokenizer = make_tokenizer()
    trainer = LatentSFTTrainer(make_model(tokenizer, seed=0), args, ROWS, tokenizer)
    assert_refused(trainer, run, "is of 'train' training, this is 'sft'")


def test_another_run_is_not_overwritten_by_a_resumed_one(finished, tmp_path):
    other = tmp_path / "other"
    grpo(other, max_steps=1).train()
    before = contents(other)
    with pytest.raises(ConfigError, match="holds another run"):
        grpo(other).train(resume_from_checkpoint=str(finished / "checkpoint-1"))
    assert contents(other) == before


@pytest.mark.parametrize(("kept", "match"), [("checkpoint-1", "already holds a run"), ("model.safetensors", "a model")])
def test_a_new_run_overwrites_no_run_and_no_model(kept, match, run):
    for path in run.iterdir():
        if path.name != kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = contents(run)
    with pytest.raises(ConfigError, match=match):
        grpo(run).train()
    assert contents(run) == before


def test_a_run_can_be_extended_and_moved(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "moved")
    grpo(tmp_path / "moved", max_steps=3, logging_steps=1).train(resume_from_checkpoint=True)
    grpo(tmp_path / "new", max_steps=3).train()
    assert metrics_of(tmp_path / "moved") == metrics_of(tmp_path / "new")


def test_resuming_a_finished_run_returns_its_last_metrics(run):
    values = grpo(run).train(resume_from_checkpoint=True)
    assert values["step"] == 2
    assert "reward" in values


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    grpo(tmp_path / "run", max_steps=4, save_total_limit=2).train()
    assert [folder.name for folder in checkpoints_in(tmp_path / "run")] == ["checkpoint-3", "checkpoint-4"]


def test_checkpoints_are_ordered_by_number(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-best", ".checkpoint-11.partial"):
        (tmp_path / name).mkdir()
    assert [folder.name for folder in checkpoints_in(tmp_path)] == ["checkpoint-9", "checkpoint-10"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to see which files are flushed")
def test_every_file_is_on_the_disk_before_a_checkpoint_has_its_name(tmp_path, monkeypatch):
    trainer = grpo(tmp_path / "run", max_steps=1, save_steps=0)
    trainer.train()
    synced: list[str] = []
    fsync, rename = os.fsync, os.replace

    def record(descriptor):
        # /proc names the file behind a descriptor.
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def rename_synced(source, target):
        assert {path.name for path in Path(source).rglob("*")} | {Path(source).name} == set(synced)
        rename(source, target)
        synced.append(f"renamed {Path(target).name}")

    monkeypatch.setattr(checkpoint_module.os, "fsync", record)
    monkeypatch.setattr(checkpoint_module.os, "replace", rename_synced)
    trainer.save()
    assert synced[-2:] == ["renamed checkpoint-1", "run"]


def test_every_global_random_stream_is_restored():
    def draw():
        return random.random(), float(np.random.rand()), random.gauss(0, 1), float(np.random.randn()), torch.rand(3)

    draw()
    state = random_state()
    first = draw()
    set_random_state(state)
    second = draw()
    assert first[:4] == second[:4]
    assert torch.equal(first[4], second[4])


@pytest.mark.parametrize(("option", "value"), [("save_total_limit", 0), ("seed", -1), ("seed", 2**32)])
def test_options_out_of_range_are_named(option, value):
    with pytest.raises(ConfigError, match=f"{option} is {value}"):
        replace(LatentGRPOConfig(), **{option: value})
