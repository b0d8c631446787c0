"""Damaged checkpoints of many kinds: each is refused in one line that names the file."""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.damages import KINDS, Damages, damage
from support.killed_runs import metrics_of
from support.small_runs import grpo

from latent_grpo.errors import ConfigError
from latent_grpo.saving.atomic_files import replaced_whole
from latent_grpo.saving.integrity import STATE_FILE, checkpoints_in, read_state

DAMAGES = 200


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps with a checkpoint after each."""
    out = tmp_path_factory.mktemp("finished") / "run"
    grpo(out).train()
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A copy of `finished`, which a test may damage."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("count", [24, pytest.param(DAMAGES, marks=pytest.mark.slow)])
def test_no_generated_damage_is_resumed_in_silence(count, run, finished, capsys):
    rng, refused = random.Random(count), Counter()
    folder, marker = run / "checkpoint-2", run / "ran"  # code in a hostile file would write the marker
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        shutil.rmtree(folder)
        shutil.copytree(finished / "checkpoint-2", folder)
        name = damage(kind, folder, finished / "checkpoint-1", rng)
        with pytest.raises(ConfigError) as error:
            read_state(folder)
        message = str(error.value)
        assert "\n" not in message
        assert name in message, (kind, name, message)
        assert message.endswith("checkpoint-1'"), (kind, message)
        assert not marker.exists()
        refused[kind] += 1
    with capsys.disabled():
        print(f"\n{count} damages of {len(refused)} kinds, {sum(refused.values())} refused: {dict(refused)}")


def test_a_run_resumes_no_damage_and_runs_no_code_of_a_forged_checkpoint(tmp_path):
    damages = Damages(tmp_path, seed=0)
    for number in range(2):
        damages.refused(number)
    for number in range(4):
        damages.forged(number)
    assert sum(damages.counts.values()) == 7
    shutil.rmtree(damages.fresh() / "optimizer")
    (damages.run / "checkpoint-2" / STATE_FILE).unlink()
    message = damages.resume(str(damages.run / "checkpoint-2"))
    assert message.endswith(f"it has no {STATE_FILE}; choose another, as '{damages.run / 'checkpoint-1'}'")


def test_auto_takes_the_newest_whole_checkpoint_and_says_so(run, finished):
    path = run / "checkpoint-2" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    trainer = grpo(run)
    with pytest.warns(UserWarning, match=r"checkpoint-2' cannot be read: model.safe.* resuming .*-1'"):
        trainer.train(resume_from_checkpoint="auto")
    assert metrics_of(run) == metrics_of(finished)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_state(run / "checkpoint-2")  # written again, in place of the damaged one


def test_auto_starts_where_there_is_nothing_and_where_a_run_died_before_its_first_checkpoint(tmp_path, finished):
    grpo(tmp_path / "run").train(resume_from_checkpoint="auto")
    assert metrics_of(tmp_path / "run") == metrics_of(finished)
    for path in checkpoints_in(tmp_path / "run"):
        shutil.rmtree(path)
    with pytest.raises(ConfigError, match="holds a finished model and no checkpoint"):
        grpo(tmp_path / "run").train(resume_from_checkpoint="auto")
    (tmp_path / "run" / "model.safetensors").unlink()
    grpo(tmp_path / "run").train(resume_from_checkpoint="auto")
    assert metrics_of(tmp_path / "run") == metrics_of(finished)


def test_a_checkpoint_of_a_version_without_checksums_is_resumed_with_a_warning(run):
    path = run / "checkpoint-2" / STATE_FILE
    state = json.loads(path.read_text())
    del state["sha256"], state["state_sha256"]
    path.write_text(json.dumps(state))
    with pytest.warns(UserWarning, match="version without checksums: only sizes"):
        assert read_state(run / "checkpoint-2")["step"] == 2


def test_leftovers_are_removed_and_a_checkpoint_that_was_to_be_replaced_is_kept(run):
    (run / ".checkpoint-7.partial" / "optimizer").mkdir(parents=True)
    (run / ".model.partial").mkdir()
    (run / ".metrics.jsonl.partial").write_text("half")
    os.replace(run / "checkpoint-2", run / ".checkpoint-2.replaced")
    assert grpo(run).train(resume_from_checkpoint="auto")["step"] == 2
    assert not list(run.glob(".*"))
    assert [path.name for path in checkpoints_in(run)] == ["checkpoint-1", "checkpoint-2"]


def test_files_have_the_usual_permissions(finished, tmp_path):
    (tmp_path / "usual").touch()
    usual = (tmp_path / "usual").stat().st_mode
    with replaced_whole(tmp_path / "labels.safetensors") as partial:
        save_file({"probs": torch.ones(1)}, partial)  # which writes for the owner only
    assert (tmp_path / "labels.safetensors").stat().st_mode == usual
    assert {path.stat().st_mode for path in Path(finished).rglob("*") if path.is_file()} == {usual}
