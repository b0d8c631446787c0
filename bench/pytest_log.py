"""A pytest plugin that writes the outcome of every test at once: `pytest -p bench.pytest_log`.

The variable LATENT_BENCH_TESTS names the file, which gets one JSON list [test, outcome] per line. A run that is cut off
by its time still leaves the outcomes so far.
"""

from __future__ import annotations

import json
import os
from typing import Any

VARIABLE = "LATENT_BENCH_TESTS"


def pytest_runtest_logreport(report: Any) -> None:
    """Append the outcome of the call, or of a set-up that failed or skipped the test."""
    worker = "PYTEST_XDIST_WORKER" in os.environ  # the main process of xdist gets the reports of all workers
    if worker or (report.when != "call" and report.outcome == "passed"):
        return
    with open(os.environ[VARIABLE], "a", encoding="utf-8") as file:
        file.write(json.dumps([report.nodeid, report.outcome]) + "\n")
