"""One command for a short slot on a GPU: `python -m bench gpu-report --out DIR --minutes 9`.

First run the kernels' tests on the device, then the benches in order of importance, each in a process of its own, until
the time is over. After each, write DIR/report.json (which `python -m bench.plot` and `python -m bench.compare` read)
and DIR/report.md. If a slot ends early, they hold what was measured and tell what was not. DIR/log.txt holds all
output.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.harness.cases import SHAPES
from bench.harness.processes import REPOSITORY, environment_of_checkout
from bench.harness.report import SCHEMA, figure
from bench.operators import OPERATORS
from bench.pytest_log import VARIABLE
from latent_grpo.saving.atomic_files import write_whole

COMMAND = "gpu-report"
DONE, FAILED, CUT_OFF, NOT_STARTED = "done", "failed", "cut off", "not started"
UNPLANNED = 30  # seconds expected of an operator that the plan does not name
LIMIT = 3.0  # times the expected seconds: most that a job may take
KERNEL_TESTS = ("tests/kernels", "tests/trainer/rollout/test_step_graphs.py")
# Of these, the tests that run kernels or need a GPU. Not "kernel": it is in the folder's name and would select all.
SELECTED = "triton or _kernel or captured or cuda"
REHEARSAL_TESTS = ("tests/kernels/test_mix_embeddings.py",)
TEST_WORKERS = 8  # Triton compiles kernels on the CPU, so several processes help
PATIENCE = 10.0  # seconds for a process to end after a signal


@dataclass(frozen=True)
class Job:
    """A process to run.

    arguments: those after `python -m`.
    expected: seconds that the job is expected to take.
    tests: whether the job runs tests instead of a bench.
    """

    name: str
    arguments: tuple[str, ...]
    expected: float
    tests: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    report: what the bench wrote.
    tests: (test, outcome) of every test that ended.
    """

    name: str
    status: str
    seconds: float = 0.0
    note: str = ""
    report: dict[str, Any] | None = None
    tests: list[tuple[str, str]] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        """Failed tests and wrong providers. If a failed job names none of them, the job itself."""
        faults = [name for name, outcome in self.tests if outcome == "failed"]
        rows = self.report["rows"] if self.report else []
        faults += [f"{r['op']}, {r['shape']}, {r['provider']}: {r['note']}" for r in rows if r["correct"] is False]
        return faults or ([f"{self.name}: {self.note}"] if self.status == FAILED else [])


def gpu_jobs() -> list[Job]:
    """Return the jobs for a GPU: tests, the two fused operators, rollout and training step, then the rest.

    Gemma's shape adds the soft cap of its logits, so only the operators that apply it run on it.

    The expected seconds include the compilation of every case, in a rollout that of a whole model.
    """
    workers = ("-n", str(TEST_WORKERS)) if importlib.util.find_spec("xdist") else ()
    tests = Job("tests of the kernels", (*_pytest(), *workers, "-k", SELECTED, *KERNEL_TESTS), 120, tests=True)
    plan = [
        ("latent_step", "llama-1b", 70),
        ("fused_policy_loss", "llama-1b", 80),
        ("rollout", "llama-1b", 150),
        ("train_step", "llama-1b", 45),
        ("latent_step", "qwen-7b", 70),
        ("fused_policy_loss", "qwen-7b", 95),
        ("latent_logprob", "llama-1b", 45),
        ("latent_step_from_logits", "llama-1b", 40),
        ("mix_embeddings", "llama-1b", 30),
        ("policy_loss", "llama-1b", 30),
        ("group_advantages", "llama-1b", 30),
        ("project_with_noise", "llama-1b", 30),
        ("latent_step", "gemma-2-2b", 75),
        ("fused_policy_loss", "gemma-2-2b", 100),
        ("latent_logprob", "gemma-2-2b", 55),
        ("rollout", "qwen-7b", 240),
        ("train_step", "qwen-7b", 75),
    ]
    planned = {op for op, *_ in plan}
    plan += [(op, "llama-1b", UNPLANNED) for op in with_cases("llama-1b", "cuda") if op not in planned]
    # All get --compile: an operator without a compiled provider ignores it.
    return [tests] + [
        Job(f"{op} {shape}", ("bench", op, "--shapes", shape, "--compile"), seconds) for op, shape, seconds in plan
    ]


def rehearsal_jobs() -> list[Job]:
    """Return the same jobs for a CPU with tiny shapes. They show that the command works, and nothing about a GPU."""
    quick = ("--shapes", "tiny", "--device", "cpu", "--repeats", "3", "--no-memory")
    tests = Job("tests of the kernels", (*_pytest(), "-k", "triton", *REHEARSAL_TESTS), 20, tests=True)
    return [tests] + [Job(f"{op} tiny", ("bench", op, *quick), 10) for op in with_cases("tiny", "cpu")]


def with_cases(shape: str, device: str) -> list[str]:
    """Return the operators that have a case of the shape on a kind of device."""
    return [name for name, operator in OPERATORS.items() if operator.cases(SHAPES[shape], torch.device(device))]


def _pytest() -> tuple[str, ...]:
    return "pytest", "-p", "bench.pytest_log", "-p", "no:cacheprovider"


def run_jobs(
    jobs: Sequence[Job],
    seconds: float,
    execute: Callable[[Job, float], Outcome],
    record: Callable[[list[Outcome]], None],
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Execute the jobs in order while the time lasts. `record` gets all outcomes so far after each job.

    A job starts only if its expected time is left. A long job that no longer fits so makes room for a short one after
    it. `execute(job, limit)` must return within its limit in seconds.
    """
    deadline = clock() + seconds
    outcomes: list[Outcome] = []
    for job in jobs:
        left = deadline - clock()
        if left < job.expected:
            note = f"takes about {job.expected:.0f} s, {max(left, 0.0):.0f} s were left"
            outcomes.append(Outcome(job.name, NOT_STARTED, note=note))
        else:
            outcomes.append(execute(job, min(left, LIMIT * job.expected)))
        record(outcomes)
    return outcomes


def execute(job: Job, limit: float, log: Path, interpret: bool) -> Outcome:
    """Run a job as a process of its own and return what it wrote, even if it failed or was cut off.

    The output of the process is appended to `log`. `interpret` runs Triton's kernels in its interpreter.
    """
    with tempfile.TemporaryDirectory() as folder:
        written, tests = Path(folder) / "rows.json", Path(folder) / "tests.jsonl"
        arguments = list(job.arguments) if job.tests else [*job.arguments, "--json", str(written)]
        variables = {VARIABLE: str(tests), "TRITON_INTERPRET": str(int(interpret))}
        begin = time.monotonic()
        code = _exit_code(arguments, limit, log, variables)
        status = CUT_OFF if code is None else FAILED if code else DONE
        note = f"after {limit:.0f} s" if code is None else f"exit code {code}, see log.txt" if code else ""
        lines = tests.read_text().splitlines() if tests.exists() else []
        return Outcome(
            job.name,
            status,
            time.monotonic() - begin,
            note,
            json.loads(written.read_text()) if written.exists() else None,
            [(name, outcome) for name, outcome in map(json.loads, lines)],
        )


def _exit_code(arguments: list[str], limit: float, log: Path, variables: dict[str, str]) -> int | None:
    """Run `python -m ARGUMENTS` and return its exit code; None if it was stopped after `limit` seconds."""
    with log.open("a") as output:
        output.write(f"\n$ python -m {' '.join(arguments)}\n")
        output.flush()  # before the process writes to the same file
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=REPOSITORY,
            env=environment_of_checkout(**variables),
            start_new_session=True,  # so that `_stop` can end its children too
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process, if it still runs, and the processes that it started in its session."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, signum)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            continue


def report_of(outcomes: Sequence[Outcome], command: str, rehearsal: bool) -> dict[str, Any]:
    """Return the report: the rows of all benches in the form of `python -m bench --json`, and the state of each job."""
    reports = [outcome.report for outcome in outcomes if outcome.report is not None]
    jobs = [{"name": o.name, "status": o.status, "seconds": round(o.seconds, 1), "note": o.note} for o in outcomes]
    return {
        "schema": SCHEMA,
        "command": command,
        "rehearsal": rehearsal,
        "environment": reports[0]["environment"] if reports else {},
        "tests": dict(Counter(result for outcome in outcomes for _, result in outcome.tests)),
        "faults": [fault for outcome in outcomes for fault in outcome.faults],
        "jobs": jobs,
        "rows": [row for report in reports for row in report["rows"]],
    }


def markdown_of(report: dict[str, Any]) -> str:
    """Return the report as a page: environment, tests, state of every job, one table per operator and shape."""
    lines = ["# Report of a GPU" if not report["rehearsal"] else "# Rehearsal on a CPU: no figure here is a GPU's", ""]
    lines += [f"`{report['command']}`", ""]
    stamp = report["environment"]
    if stamp:
        lines += [
            f"{stamp['device']}, CUDA {stamp['cuda']}, torch {stamp['torch']}, triton {stamp['triton']}, Python "
            f"{stamp['python']}, commit {stamp['commit']}, {stamp['date']}. Measured ceilings: copy "
            f"{stamp['copy_gb_per_s']:.3g} GB/s, {stamp['matmul_dtype']} matmul {stamp['matmul_tflop_per_s']:.3g} "
            "TFLOP/s.",
            "",
        ]
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(report["tests"].items()))
    lines += ["## Tests", "", counts or "No test ended.", ""]
    lines += ["## Faults", "", *(f"- {fault}" for fault in report["faults"]), ""] if report["faults"] else []
    lines += ["## Jobs", "", "| job | | s | |", "| --- | --- | --- | --- |"]
    lines += [f"| {j['name']} | {j['status']} | {j['seconds']:.0f} | {j['note']} |" for j in report["jobs"]]
    lines += ["", "## Times", "", "Milliseconds; `roofline` is the share of the measured ceilings."]
    for op, shape in dict.fromkeys((row["op"], row["shape"]) for row in report["rows"]):
        lines += _times_of([row for row in report["rows"] if (row["op"], row["shape"]) == (op, shape)])
    return "\n".join(lines) + "\n"


def _times_of(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the table of one operator and shape."""
    columns = ("case", "provider", "median", "p20", "p80", "times baseline", "over matmul", "roofline", "peak MB", "")
    lines = ["", f"### {rows[0]['op']}, {rows[0]['shape']}, {rows[0]['dtype']}", ""]
    lines += [f"| {' | '.join(columns)} |".replace("|  |", "| |"), "| --- | --- " + "| ---: " * 7 + "| --- |"]
    of_the_shape = ("vocab", "hidden", "top_k", "model")  # the same in every case, and in the heading
    for row in rows:
        case = ", ".join(f"{name} {value}" for name, value in row["parameters"].items() if name not in of_the_shape)
        measures = (row[name] for name in ("median_ms", "p20", "p80", "ratio", "over_matmul"))
        share = "-" if row["roofline"] is None else f"{row['roofline']:.0%}"
        cells = [case, row["provider"], *map(figure, measures), share, figure(row["peak_extra_mb"]), row["note"]]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Return 0 if all jobs ran and were right, 1 for a fault or a failed job, 2 without a GPU or for bad arguments.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    rehearsal = options.device == "cpu"
    if not rehearsal and not torch.cuda.is_available():
        print("bench: error: no CUDA device here; nothing was run (--device cpu rehearses)", file=sys.stderr)
        return 2
    if not options.minutes > 0:
        parser.error(f"--minutes is {options.minutes}: give a positive time")
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "log.txt"
    log.write_text("")
    command = f"python -m bench {COMMAND} --out DIR --minutes {options.minutes:g} --device {options.device}"

    def record(outcomes: list[Outcome]) -> None:
        report = report_of(outcomes, command, rehearsal)
        write_whole(options.out / "report.json", json.dumps(report, indent=1) + "\n")
        write_whole(options.out / "report.md", markdown_of(report))
        last = outcomes[-1]
        print(f"{last.name}: {last.status}, {last.seconds:.0f} s {last.note}".rstrip(), flush=True)

    def run(job: Job, limit: float) -> Outcome:
        return execute(job, limit, log, interpret=rehearsal)

    outcomes = run_jobs(rehearsal_jobs() if rehearsal else gpu_jobs(), options.minutes * 60, run, record)
    for fault in (fault for outcome in outcomes for fault in outcome.faults):
        print(f"bench: error: {fault}", file=sys.stderr)
    print(f"wrote {options.out / 'report.md'} and report.json; figures: python -m bench.plot {options.out}/report.json")
    return 1 if any(outcome.faults for outcome in outcomes) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m bench {COMMAND}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the report, made if missing")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all jobs (default: %(default)s)")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal with tiny shapes and one test file"
    )
    return parser
