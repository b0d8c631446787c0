"""A run killed at any moment goes on from its last complete checkpoint as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import REPOSITORY

from latent_grpo import LatentGRPOConfig, LatentGRPOTrainer, LatentSFTConfig, LatentSFTTrainer
from latent_grpo.config import ConfigError
from latent_grpo.quickstart.toy_task import make_model, make_problems, make_tokenizer
from latent_grpo.saving import checkpoint as checkpoint_module
from latent_grpo.saving.checkpoint import STATE_FILE, TENSOR_FILE, checkpoints_in, read_state
from latent_grpo.saving.random_streams import random_state, set_random_state
from latent_grpo.saving.run_identity import fingerprint

pytestmark = pytest.mark.usefixtures("one_thread")
KILLED = {"signal": int(signal.SIGKILL)}
DONE = {"code": 0}
ROWS = make_problems(20, seed=1)


@pytest.fixture(scope="module")
def children():
    """`children(kind, out, resume=False, kill=None, **options)` trains in a child process; how it ended."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, str(REPOSITORY / "tests" / "support" / "killed_runs.py")], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip

        def train(kind, out, resume=False, kill=None, **options):
            request = {"kind": kind, "options": {"output_dir": str(out), **options}, "resume": resume, "kill": kill}
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield train
        process.stdin.close()


@pytest.fixture(scope="module")
def whole(children, tmp_path_factory):
    """Folders of uninterrupted runs, by kind."""
    folder = tmp_path_factory.mktemp("whole")
    for kind in ("train", "sft"):
        assert children(kind, folder / kind, save_steps=0) == DONE
    return folder


def metrics_of(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time_") and k != "tokens_per_second"} for row in rows]


def assert_same_run(run: Path, whole: Path) -> None:
    """Every step once, the same figures to the last bit, the same weights to the last byte."""
    assert [row["step"] for row in metrics_of(run)] == [1, 2, 3, 4, 5, 6]
    assert metrics_of(run) == metrics_of(whole)
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


KILLS = {
    "between two checkpoints": {"lines": 3, "seconds": 0.0},
    "a little later": {"lines": 4, "seconds": 0.03},
    "before the second checkpoint's tensors": {"function": "torch.save", "call": 2},
    "within the second checkpoint's tensors": {"function": "torch.save", "call": 2, "torn": True},
    "before the second checkpoint has its name": {"function": "os.replace", "call": 2},
    "while an old checkpoint loses its name": {"function": "os.replace", "call": 3},
    "while an old checkpoint is removed": {"function": "shutil.rmtree", "call": 2, "torn": True},
}


@pytest.mark.parametrize("kill", KILLS.values(), ids=KILLS.keys())
def test_a_killed_run_is_resumed_bit_for_bit(kill, children, whole, tmp_path):
    run = tmp_path / "run"
    assert children("train", run, kill=kill, save_total_limit=1) == KILLED
    assert checkpoints_in(run)
    for folder in checkpoints_in(run):
        read_state(folder)
    assert metrics_of(run) != metrics_of(whole / "train")
    assert children("train", run, resume=True, save_total_limit=1) == DONE
    assert_same_run(run, whole / "train")
    assert [folder.name for folder in run.glob("*checkpoint-*")] == ["checkpoint-6"]


def test_a_run_killed_over_and_over_is_resumed_bit_for_bit(children, whole, tmp_path):
    kill = {"function": "torch.save", "call": 2}
    assert children("train", tmp_path / "run", kill=kill, save_steps=1) == KILLED
    ends = [children("train", tmp_path / "run", resume=True, kill=kill, save_steps=1) for _ in range(5)]
    assert ends == [KILLED] * 4 + [DONE]
    assert_same_run(tmp_path / "run", whole / "train")


def test_a_killed_warm_start_is_resumed_bit_for_bit(children, whole, tmp_path):
    assert children("sft", tmp_path / "run", kill={"lines": 5, "seconds": 0.0}) == KILLED
    assert children("sft", tmp_path / "run", resume=True) == DONE
    assert_same_run(tmp_path / "run", whole / "sft")


def grpo(out: Path, rows=ROWS, model=None, **options) -> LatentGRPOTrainer:
    base = dict(
        output_dir=str(out), latent_top_k=2, num_generations=4, generation_batch_size=8, max_completion_length=4,
        group_filter=False, max_steps=2, save_steps=1,
    )  # fmt: skip
    tokenizer = make_tokenizer()
    model = model or make_model(tokenizer, seed=0)
    return LatentGRPOTrainer(model, "accuracy", LatentGRPOConfig(**{**base, **options}), rows, None, tokenizer)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps with a checkpoint after each."""
    out = tmp_path_factory.mktemp("finished") / "run"
    grpo(out).train()
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A copy of `finished`, with a check that a refused resume leaves every file as it was."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(trainer, run: Path, match: str) -> None:
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
    refused(grpo(run), run, rf"checkpoint-2' is torn: {name} .*choose another, as .*checkpoint-1'")


def test_a_checkpoint_with_damaged_tensors_of_the_right_size_is_refused(run):
    path = run / "checkpoint-2" / TENSOR_FILE
    path.write_bytes(b"x" * path.stat().st_size)
    refused(grpo(run), run, "checkpoint-2' cannot be read")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": 1}'])
def test_a_checkpoint_with_a_damaged_state_is_refused(text, run):
    (run / "checkpoint-2" / STATE_FILE).write_text(text)
    refused(grpo(run), run, f"checkpoint-2': {STATE_FILE} cannot be read")


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
    refused(grpo(run, **options), run, match)


def test_a_checkpoint_of_another_schedule_is_refused(tmp_path):
    run = tmp_path / "run"
    grpo(run, lr_scheduler_type="linear").train()
    refused(grpo(run, lr_scheduler_type="linear", max_steps=4), run, "has a linear schedule over 2 steps, this run has one over 4")


def test_a_checkpoint_of_another_model_is_refused(run):
    from transformers import LlamaForCausalLM

    config = replace_width(make_model(make_tokenizer(), seed=0).config)
    model = LlamaForCausalLM(config)
    refused(grpo(run, model=model), run, r"is of another model: .* is \[.*\] there and \[.*\] here")


def replace_width(config):
    config.hidden_size, config.intermediate_size = 64, 96
    config.head_dim = 16
    return config


def test_a_checkpoint_of_other_data_is_refused(run):
    refused(grpo(run, rows=make_problems(20, seed=2)), run, "other training data")
    assert fingerprint(ROWS) != fingerprint(ROWS[:-1])


def test_a_checkpoint_of_another_kind_is_refused(run):
    args = LatentSFTConfig(output_dir=str(run), answer_template="{answer}", max_steps=2)
    tokenizer = make_tokenizer()
    trainer = LatentSFTTrainer(make_model(tokenizer, seed=0), args, ROWS, tokenizer)
    refused(trainer, run, "is of 'train' training, this is 'sft'")


def test_another_run_is_not_overwritten_by_a_resumed_one(finished, tmp_path):
    other = tmp_path / "other"
    grpo(other, max_steps=1).train()
    before = contents(other)
    with pytest.raises(ConfigError, match="holds another run"):
        grpo(other).train(resume_from_checkpoint=str(finished / "checkpoint-1"))
    assert contents(other) == before


@pytest.mark.parametrize(("kept", "match"), [("checkpoint-1", "already holds a run"), ("model.safetensors", "a model")])
def test_a_new_run_spares_what_its_folder_holds(kept, match, run):
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


def test_every_file_is_on_the_disk_before_a_checkpoint_has_its_name(tmp_path, monkeypatch):
    trainer = grpo(tmp_path / "run", max_steps=1, save_steps=0)
    trainer.train()
    synced: list[str] = []
    fsync, rename = os.fsync, os.replace

    def record(descriptor):
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def named(source, target):
        assert {path.name for path in Path(source).rglob("*")} | {Path(source).name} == set(synced)
        rename(source, target)
        synced.append(f"renamed {Path(target).name}")

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to see which files are flushed")
    monkeypatch.setattr(checkpoint_module.os, "fsync", record)
    monkeypatch.setattr(checkpoint_module.os, "replace", named)
    trainer.save()
    assert synced[-2:] == ["renamed checkpoint-1", "run"]


def test_every_random_stream_is_restored():
    import random

    import numpy as np

    def draw():
        return random.random(), float(np.random.rand()), random.gauss(0, 1), float(np.random.randn()), torch.rand(3)

    draw()
    state = random_state()
    first = draw()
    set_random_state(state)
    again = draw()
    assert first[:4] == again[:4]
    assert torch.equal(first[4], again[4])


@pytest.mark.parametrize(("option", "value"), [("save_total_limit", 0), ("seed", -1), ("seed", 2**32)])
def test_options_out_of_range_are_named(option, value):
    with pytest.raises(ConfigError, match=f"{option} is {value}"):
        replace(LatentGRPOConfig(), **{option: value})
