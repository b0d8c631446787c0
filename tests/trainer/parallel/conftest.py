"""The runs in one and in two processes that the slow tests compare. They are made once."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

import pytest
from support.processes import COARSE, JOBS, RESUMED, WARM, at, launch

DONE = "done"  # a file that is there once all runs are


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with N/JOB, trained in N = 1 and 2 processes, and resumed-N/JOB, begun in the other number of them."""
    pytest.importorskip("peft")
    base = tmp_path_factory.getbasetemp()
    # The workers of pytest-xdist share the folder above their own. The first one makes the runs, the others wait.
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "runs"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / DONE).exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
            folder.mkdir()
            make_runs(folder)
            (folder / DONE).touch()
    return folder


def make_runs(folder: Path) -> None:
    """Train every job in one and in two processes, and resume some in the other number of processes."""
    warm, all_jobs = folder / "warm", JOBS | COARSE
    jobs = {n: [at(job, folder / str(n) / name, warm) for name, job in all_jobs.items()] for n in (1, 2)}
    launch(folder, 1, [*(at(job, warm / name, warm) for name, job in WARM.items()), *jobs[1]])
    launch(folder, 2, jobs[2])
    for processes in (1, 2):
        resumed = []
        for name in (*RESUMED, *COARSE):
            checkpoint = folder / str(3 - processes) / name / "checkpoint-2"
            out = folder / f"resumed-{processes}" / name
            resumed.append(at(all_jobs[name], out, warm, resume=str(checkpoint)))
        launch(folder, processes, resumed)
