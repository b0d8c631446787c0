"""Processes that run modules of this checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def environment_of_checkout(**variables: str) -> dict[str, str]:
    """Return the variables of this process and `variables`, with the checkout first on PYTHONPATH.

    `bench` is not installed: a process that starts in another folder would not find it.
    """
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    return {**os.environ, **variables, "PYTHONPATH": path}


def printed_integer(*arguments: str, timeout: float | None = None, **variables: str) -> int:
    """Run `python -m ARGUMENTS` and return the last word that it prints, an integer.

    Raises RuntimeError with the last line of stderr if the process fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment_of_checkout(**variables),
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return int(done.stdout.split()[-1])
