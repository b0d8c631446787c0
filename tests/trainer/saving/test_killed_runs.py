"""A run that is killed at any moment goes on from its last complete checkpoint as if nothing had happened."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import REPOSITORY
from support.killed_runs import metrics_of

from latent_grpo.saving.integrity import checkpoints_in, read_state

KILLED = {"signal": int(signal.SIGKILL)}
DONE = {"code": 0}


@pytest.fixture(scope="module")
def children():
    """`children(kind, out, resume=False, kill=None, **options)` trains in a child process and returns how it ended."""
    program = [sys.executable, str(REPOSITORY / "tests" / "support" / "killed_runs.py")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen(program, env=environment, text=True, **pipes) as process:

        def train(kind, out, resume=False, kill=None, **options):
            request = {"kind": kind, "options": {"output_dir": str(out), **options}, "resume": resume, "kill": kill}
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield train
        process.stdin.close()


@pytest.fixture(scope="module")
def uninterrupted(children, tmp_path_factory):
    """`uninterrupted(kind)` is the folder of a run that was not killed."""
    folder = tmp_path_factory.mktemp("uninterrupted")

    @functools.cache
    def train(kind: str) -> Path:
        assert children(kind, folder / kind, save_steps=0) == DONE
        return folder / kind

    return train


def assert_same_run(run: Path, expected: Path) -> None:
    """Compare two runs: every step once, the same figures to the last bit, the same weights to the last byte."""
    assert [row["step"] for row in metrics_of(run)] == [1, 2, 3, 4, 5, 6]
    assert metrics_of(run) == metrics_of(expected)
    assert (run / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


WITHIN_A_FILE = {"function": "torch.save", "call": 2, "torn": True}
OTHER_KILLS = {
    "between two checkpoints": {"lines": 3, "seconds": 0.0},
    "a little later": {"lines": 4, "seconds": 0.03},
    "before the second checkpoint's tensors": {"function": "torch.save", "call": 2},
    "before the second checkpoint has its name": {"function": "os.replace", "call": 2},
    "while an old checkpoint loses its name": {"function": "os.replace", "call": 3},
    "while an old checkpoint is removed": {"function": "shutil.rmtree", "call": 2, "torn": True},
}


@pytest.mark.parametrize(
    "kill",
    [
        pytest.param(WITHIN_A_FILE, id="within the second checkpoint's tensors"),
        *(pytest.param(kill, id=name, marks=pytest.mark.slow) for name, kill in OTHER_KILLS.items()),
    ],
)
def test_a_killed_run_is_resumed_bit_for_bit(kill, children, uninterrupted, tmp_path):
    run, expected = tmp_path / "run", uninterrupted("train")
    assert children("train", run, kill=kill, save_total_limit=1) == KILLED
    assert checkpoints_in(run)
    for folder in checkpoints_in(run):
        read_state(folder)
    assert metrics_of(run) != metrics_of(expected)
    assert children("train", run, resume=True, save_total_limit=1) == DONE
    assert_same_run(run, expected)
    assert [folder.name for folder in run.glob("*checkpoint-*")] == ["checkpoint-6"]


@pytest.mark.slow
def test_a_run_killed_over_and_over_is_resumed_bit_for_bit(children, uninterrupted, tmp_path):
    kill = {"function": "torch.save", "call": 2}
    assert children("train", tmp_path / "run", kill=kill, save_steps=1) == KILLED
    ends = [children("train", tmp_path / "run", resume=True, kill=kill, save_steps=1) for _ in range(5)]
    assert ends == [KILLED] * 4 + [DONE]
    assert_same_run(tmp_path / "run", uninterrupted("train"))


@pytest.mark.slow
def test_a_killed_warm_start_is_resumed_bit_for_bit(children, uninterrupted, tmp_path):
    assert children("sft", tmp_path / "run", kill={"lines": 5, "seconds": 0.0}) == KILLED
    assert children("sft", tmp_path / "run", resume=True) == DONE
    assert_same_run(tmp_path / "run", uninterrupted("sft"))
