"""Runs under random faults end as runs that were left alone. `support.faults` runs longer."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from support import REPOSITORY


@pytest.mark.parametrize(
    "words",
    [
        ["--kills", "2", "--kinds", "sft", "--steps", "3", "--faults"],
        pytest.param(["--kills", "8", "--seed", "1", "--faults"], marks=pytest.mark.slow),
    ],
    ids=["short", "long"],
)
def test_runs_under_random_faults_end_as_runs_that_were_left_alone(words, capsys):
    path = os.pathsep.join((str(REPOSITORY / "tests"), str(REPOSITORY)))
    command = [sys.executable, "-m", "support.faults", *words]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        print(f"\n{counts}")
    assert counts["faults"] >= int(words[1])
    assert counts["runs equal to the undisturbed one"] >= 1
