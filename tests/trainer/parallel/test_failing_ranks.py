"""A fault of one process ends all of them in bounded time, with one message and one exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from support import REPOSITORY
from support.small_runs import ROWS

from latent_grpo.parallel import heartbeat
from latent_grpo.quickstart.toy_task import make_model, make_tokenizer
from latent_grpo.saving.integrity import checkpoints_in, step_of
from latent_grpo.saving.run_folder import only_run_in

OPTIONS = dict(
    latent_top_k=2,
    num_generations=4,
    generation_batch_size=8,
    per_device_train_batch_size=4,
    max_completion_length=4,
    max_rollouts=4,
    save_steps=0,
    log_table=False,
)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """`two_ranks(out, fault, **options)` trains in two processes and returns how they ended."""
    folder = tmp_path_factory.mktemp("start")
    tokenizer = make_tokenizer()
    make_model(tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    program = [sys.executable, str(REPOSITORY / "tests" / "support" / "two_ranks.py")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen(program, env=environment, text=True, **pipes) as process:

        def run(out, fault, **options):
            request = {"model": str(folder), "data": str(folder / "data.jsonl"), "out": str(out), "fault": fault}
            process.stdin.write(json.dumps({**request, "options": {**OPTIONS, **options}}) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield run
        process.stdin.close()


@pytest.mark.parametrize(
    ("fault", "codes", "message"),
    [
        ("raise", {"0": 1, "1": 1}, "reward function 'reward' raised OSError: the judge is down"),
        ("SIGTERM", {"0": 143, "1": 143}, "SIGTERM: stopped after step 3, saved"),
        ("SIGKILL", {"0": 1, "1": -9}, "another process of the run has ended"),
        ("SIGSTOP", {"0": 1, "1": -9}, "rank 1 has not been heard of for"),
        ("sleep", {"0": 1, "1": 1}, "reward function 'reward' ran longer than reward_timeout 2 s"),
        ("nan", {"0": 1, "1": 1}, "checkpoint-2': resume it, with a lower learning_rate or other data"),
        ("disk", {"0": 1, "1": 1}, "checkpoint-3' could not be written ([Errno 27] File too large); the last good"),
    ],
)
def test_every_rank_ends_with_one_message(fault, codes, message, two_ranks, tmp_path):
    options = {"sleep": {"reward_timeout": 2}, "nan": {"save_steps": 1}, "disk": {"save_steps": 1}}.get(fault, {})
    done = two_ranks(tmp_path / "run", fault, **options)
    assert done["codes"] == codes, done["log"]
    assert done["seconds"] < 50
    assert done["log"].count(message) == 1, done["log"]
    assert "Traceback" not in done["log"]
    steps = {"raise": [2], "sleep": [2], "SIGTERM": [3], "nan": [1, 2], "disk": [1, 2]}.get(fault, [])
    assert [step_of(path) for path in checkpoints_in(tmp_path / "run")] == steps
    assert not list((tmp_path / "run").glob(".*"))


def test_bad_input_is_told_once(two_ranks, tmp_path):
    done = two_ranks(tmp_path / "run", "", limit=-1)
    assert done["codes"] == {"0": 2, "1": 2}
    assert done["log"].count("limit is -1") == 1
    assert len(done["log"].splitlines()) == 1
    with only_run_in(tmp_path / "taken"):
        done = two_ranks(tmp_path / "taken", "")
    assert done["codes"] == {"0": 2, "1": 2}
    assert done["log"].count("another run is writing there") == 1


def test_a_process_whose_torchrun_was_killed_is_asked_to_stop(monkeypatch):
    sent, done = [], threading.Event()
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(heartbeat.os, "kill", lambda *given: sent.append(given))
    threading.Timer(0.1, done.set).start()
    heartbeat._end_with(os.getppid(), done)
    assert sent == []
    heartbeat._end_with(-1, threading.Event())
    assert sent == [(os.getpid(), signal.SIGTERM)]
