"""A pytest plugin that writes each test's outcome as it comes: `pytest -p bench.pytest_log`, LATENT_BENCH_TESTS=FILE.

So that a run cut off by its time still tells what it found. One JSON list [test, outcome] a line.
"""

from __future__ import annotations

import json
import os
from typing import Any

VARIABLE = "LATENT_BENCH_TESTS"


def pytest_runtest_logreport(report: Any) -> None:
    """Append the outcome: of the call, or of the set-up where that failed or skipped it."""
    worker = "PYTEST_XDIST_WORKER" in os.environ  # the main process hears of every test too
    if worker or (report.when != "call" and report.outcome == "passed"):
        return
    with open(os.environ[VARIABLE], "a", encoding="utf-8") as file:
        file.write(json.dumps([report.nodeid, report.outcome]) + "\n")
