"""`python -m bench gpu-report`: what runs within the time, and what the report says about the rest. Needs no GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.__main__ import main
from bench.gpu_report import (
    COMMAND,
    CUT_OFF,
    DONE,
    FAILED,
    KERNEL_TESTS,
    LIMIT,
    NOT_STARTED,
    REHEARSAL_TESTS,
    Job,
    Outcome,
    execute,
    gpu_jobs,
    markdown_of,
    report_of,
    run_jobs,
    with_cases,
)
from bench.operators import OPERATORS
from bench.plot import main as plot


class Bench:
    """Runs jobs that take as long as `seconds` says, on a clock that only they move."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.now, self.seconds = 0.0, seconds
        self.limits: dict[str, float] = {}
        self.records: list[int] = []

    def execute(self, job: Job, limit: float) -> Outcome:
        self.limits[job.name] = limit
        taken = self.seconds[job.name]
        self.now += min(taken, limit)
        return Outcome(job.name, DONE if taken <= limit else CUT_OFF, min(taken, limit))

    def run(self, jobs: list[Job], budget: float) -> dict[str, str]:
        def record(outcomes: list[Outcome]) -> None:
            self.records.append(len(outcomes))

        outcomes = run_jobs(jobs, budget, self.execute, record, lambda: self.now)
        return {outcome.name: outcome.status for outcome in outcomes}


def job(name: str, expected: float) -> Job:
    return Job(name, (), expected)


def test_jobs_run_in_order_while_the_time_lasts() -> None:
    bench = Bench({"a": 10, "b": 20, "c": 5})
    assert bench.run([job("a", 10), job("b", 20), job("c", 5)], 35) == {"a": DONE, "b": DONE, "c": DONE}
    assert bench.records == [1, 2, 3]  # a report after each
    assert bench.now == 35


def test_a_long_job_makes_room_for_a_short_one() -> None:
    bench = Bench({"a": 10, "b": 60, "c": 5})
    assert bench.run([job("a", 10), job("b", 60), job("c", 5)], 30) == {"a": DONE, "b": NOT_STARTED, "c": DONE}


def test_a_hanging_job_is_cut_off_and_the_rest_goes_on() -> None:
    bench = Bench({"a": 1e9, "b": 5})
    assert bench.run([job("a", 10), job("b", 5)], 60) == {"a": CUT_OFF, "b": DONE}
    assert bench.limits["a"] == LIMIT * 10
    assert bench.limits["b"] == min(60 - LIMIT * 10, LIMIT * 5)


def test_no_job_runs_beyond_the_time() -> None:
    bench = Bench({"a": 1e9, "b": 1.0})
    assert bench.run([job("a", 10), job("b", 1)], 12) == {"a": CUT_OFF, "b": NOT_STARTED}
    assert bench.now == 12


def test_the_plan_names_operators_and_puts_the_tests_first() -> None:
    jobs = gpu_jobs()
    assert [job.tests for job in jobs] == [True] + [False] * (len(jobs) - 1)
    benched = [job.arguments[1] for job in jobs[1:]]
    assert set(benched) == set(with_cases("llama-1b", "cuda")) <= set(OPERATORS)
    assert benched[:2] == ["latent_step", "fused_policy_loss"]
    assert jobs[0].arguments[-len(KERNEL_TESTS) :] == KERNEL_TESTS
    assert sum(job.expected for job in jobs[:5]) < 9 * 60  # what matters most fits into the shortest slot


@pytest.mark.parametrize("path", [*KERNEL_TESTS, *REHEARSAL_TESTS])
def test_the_tests_of_a_report_exist(path: str, repository: Path) -> None:
    place = repository / path
    assert list(place.glob("test_*.py")) if place.is_dir() else place.is_file(), path


def test_the_plan_times_compiled_rivals() -> None:
    benches = {job.name: job.arguments for job in gpu_jobs() if not job.tests}
    for name in ("rollout llama-1b", "rollout qwen-7b", "fused_policy_loss llama-1b", "fused_policy_loss qwen-7b"):
        assert "--compile" in benches[name]


def write_rows(path: Path, **fields: Any) -> str:
    """Write a program that writes one row to the file after --json, as a bench does. Return its module name.

    Its arguments are the seconds that it sleeps and its exit code.
    """
    case = {"op": "latent_step", "shape": "tiny", "provider": "ours", "dtype": "float32", "parameters": {"rows": 4}}
    times = {"median_ms": 1.5, "p20": 1.4, "p80": 1.6, "samples": 3, "ratio": 2.0, "over_matmul": None}
    rest = {"peak_extra_mb": None, "gb_per_s": 1.0, "roofline": 0.5, "correct": True, "note": ""}
    row = {**case, **times, **rest, **fields}
    stamp = {"device": "some device", "device_type": "cpu", "threads": 1, "cuda": None, "commit": "abc"}
    stamp |= {"torch": "2", "triton": None, "python": "3", "date": "2026-01-01T00:00:00Z"}
    stamp |= {"copy_gb_per_s": 1.0, "matmul_tflop_per_s": 1.0, "matmul_dtype": "float32"}
    content = json.dumps({"environment": stamp, "rows": [row]})
    program = path / "fake_bench.py"
    program.write_text(
        "import pathlib, sys, time\n"
        f"pathlib.Path(sys.argv[sys.argv.index('--json') + 1]).write_text({content!r})\n"
        "time.sleep(float(sys.argv[1]))\n"
        "sys.exit(int(sys.argv[2]))\n"
    )
    return program.stem


@pytest.mark.parametrize(
    ("sleep", "code", "limit", "status"), [(0, 0, 60, DONE), (0, 1, 60, FAILED), (60, 0, 3, CUT_OFF)]
)
def test_what_a_bench_wrote_is_kept_however_it_ends(
    sleep: float, code: int, limit: float, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = write_rows(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    outcome = execute(Job("bench", (name, str(sleep), str(code)), 1), limit, tmp_path / "log.txt", False)
    assert outcome.status == status
    assert outcome.report is not None
    assert outcome.report["rows"][0]["median_ms"] == 1.5
    assert outcome.faults == ([f"bench: exit code {code}, see log.txt"] if code else [])
    report = report_of([outcome, Outcome("later", NOT_STARTED, note="takes about 9 s, 1 s were left")], "run", True)
    page = markdown_of(report)
    assert page.startswith("# Rehearsal on a CPU")
    for line in (
        "some device",
        "| later | not started | 0 | takes about 9 s, 1 s were left |",
        "| rows 4 | ours | 1.5",
    ):
        assert line in page
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    assert plot([str(path)]) == 0


def test_outcomes_of_tests_are_read_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_one.py").write_text(
        "import os, pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert False\n"
        "@pytest.mark.skip\n"
        "def test_left_out(): pass\n"
        "def test_crashes(): os._exit(9)\n"
    )
    arguments = ("pytest", "-p", "bench.pytest_log", "-p", "no:cacheprovider", "-p", "no:randomly", str(tmp_path))
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS"):
        monkeypatch.delenv(name, raising=False)
    outcome = execute(Job("tests", arguments, 1, tests=True), 120, tmp_path / "log.txt", False)
    assert (outcome.status, outcome.note) == (FAILED, "exit code 9, see log.txt")
    assert [result for _, result in outcome.tests] == ["passed", "failed", "skipped"]
    assert [fault.rpartition("::")[2] for fault in outcome.faults] == ["test_wrong"]
    assert report_of([outcome], "run", False)["tests"] == {"passed": 1, "failed": 1, "skipped": 1}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_nothing_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([COMMAND, "--out", str(tmp_path / "report")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "no CUDA device" in lines[0]
    assert not (tmp_path / "report").exists()


def test_a_rehearsal_that_finds_a_fault_exits_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = write_rows(tmp_path, correct=False, note="wrong, not timed: loss is off")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sys.modules["bench.gpu_report"], "rehearsal_jobs", lambda: [Job("bench", (name, "0", "1"), 1)])
    assert main([COMMAND, "--out", str(tmp_path / "out"), "--device", "cpu", "--minutes", "1"]) == 1
    assert "latent_step, tiny, ours: wrong, not timed: loss is off" in capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["rehearsal"] is True
    assert report["jobs"][0]["status"] == FAILED
    assert "## Faults" in (tmp_path / "out" / "report.md").read_text()
