"""Comparisons by math-verify: from threads, and with a time limit."""

from __future__ import annotations

import signal
import threading
import time

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
