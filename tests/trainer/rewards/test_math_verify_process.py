"""Comparisons by math-verify: from threads, and with a time limit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from latent_grpo.rewards import math_verify_process
from latent_grpo.rewards.math_verify_process import same_expression


def test_a_thread_compares_like_the_main_thread() -> None:
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(same_expression("(x+1)(x+2)", "x^2+3x+2")))
    thread.start()
    thread.join()
    assert results == [True]


@pytest.mark.parametrize("where", ["main", "thread"])
def test_an_endless_comparison_is_cut_off(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    same_expression("x+2", "2+x")  # starts math-verify, which the limit does not include
    monkeypatch.setattr(math_verify_process, "COMPARISON_SECONDS", 0.5)
    results: list[bool] = []
    # Another expression in each case, because results are cached.
    endless = rf"((x+y+z)^{{99}}+{len(where)})^{{99}}"
    thread = threading.Thread(target=lambda: results.append(same_expression(endless, "x^2+18")))
    start = time.perf_counter()
    if where == "main":
        thread.run()
    else:
        thread.start()
        thread.join()
    assert results == [False]
    # Half a second of processor time may be many of wall time on a busy machine.
    assert time.perf_counter() - start < math_verify_process.STALL_SECONDS / 2
    monkeypatch.undo()
    assert same_expression(f"x+{3 + len(where)}", f"{3 + len(where)}+x")  # a new process has taken over


def test_time_in_which_the_process_does_not_run_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    same_expression("x+2", "2+x")
    monkeypatch.setattr(math_verify_process, "COMPARISON_SECONDS", 1.0)
    process = math_verify_process._verifier.process
    process.send_signal(signal.SIGSTOP)  # as on a busy machine
    timer = threading.Timer(1.5, process.send_signal, [signal.SIGCONT])
    timer.start()
    assert same_expression("x+31", "31+x")
    timer.join()
    assert math_verify_process._verifier.process is process


def test_a_stalled_comparison_is_counted_tried_again_and_never_kept_as_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    same_expression("x+2", "2+x")
    real, seconds = math_verify_process._Verifier.same, []

    def stall(self, answer, reference):  # as if the machine had put the process to sleep
        if len(seconds) < 2:
            seconds.append(1)
            self.process.send_signal(signal.SIGSTOP)
            monkeypatch.setattr(math_verify_process, "STALL_SECONDS", 0.2)
        else:
            monkeypatch.setattr(math_verify_process, "STALL_SECONDS", 60.0)
        return real(self, answer, reference)

    monkeypatch.setattr(math_verify_process._Verifier, "same", stall)
    with pytest.warns(UserWarning, match="stall") as caught:
        assert not same_expression("x+41", "41+x")
    assert [str(w.message).rpartition("; ")[2] for w in caught] == ["trying again", "taken for wrong this time"]
    assert "no answer on 'x+41' with '41+x' (stall" in str(caught[0].message)
    assert same_expression("x+41", "41+x")  # the next call has a verdict, which is kept
    assert same_expression("x+41", "41+x")


def test_a_process_that_is_killed_from_outside_costs_no_reward() -> None:
    same_expression("x+2", "2+x")
    killed = math_verify_process._verifier.process
    real = killed.stdin.write
    killed.stdin.write = lambda text: (killed.kill(), killed.wait(), real(text))
    with pytest.warns(UserWarning, match="trying again"):
        assert same_expression("x+51", "51+x")


def test_texts_are_bounded() -> None:
    long = "1+" * math_verify_process.LONGEST + "1"
    before = math_verify_process._verifier
    start = time.perf_counter()
    assert not same_expression(long, "2")
    assert not same_expression("2", long)
    assert time.perf_counter() - start < 0.5
    assert math_verify_process._verifier is before


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="needs /proc to see a process's limits")
def test_the_process_has_a_limit_of_memory_and_ends_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import os, signal\n"
        "from latent_grpo.rewards import math_verify_process as m\n"
        "m.same_expression('x', 'x')\n"
        "print(m._verifier.process.pid, flush=True)\n"
        "m.COMPARISON_SECONDS = 600.0\n"
        "m.same_expression('((x+y+z)^{99}+1)^{99}', 'x')\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    limits = Path(f"/proc/{child}/limits").read_text()
    assert f"Max address space         {math_verify_process.MEMORY_BYTES}" in limits
    time.sleep(0.5)  # within the endless comparison
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        if "\nState:\tZ" in Path(f"/proc/{child}/status").read_text():
            break
        time.sleep(0.1)
    else:
        assert not Path(f"/proc/{child}").exists()


def test_a_process_whose_parent_was_killed_says_nothing(tmp_path: Path) -> None:
    code = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
    words = [sys.executable, "-c", code, math_verify_process.__file__, str(os.getpid())]
    pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen(words, **pipes)
    process.stdout.close()
    process.stdin.close()
    assert process.wait(60) == 1
    assert process.stderr.read() == b""
