"""math-verify in a process of its own, with limits of processor time and memory.

math-verify's own limit is a signal, which works only in the main thread and not inside one large-integer operation. The
process that `same_expression` talks to runs this file and nothing else of the package, so it starts without torch.
Therefore this module imports only the standard library.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from functools import lru_cache
from typing import Any

# Of processor time: how busy the machine is must not decide a reward.
COMPARISON_SECONDS = 3.0
STALL_SECONDS = 120.0  # of wall time, for a process that waits and does not compute
START_SECONDS = 120.0  # math-verify loads sympy
LONGEST = 4096  # characters of an answer or a reference that are parsed; the parser's time grows faster than the length
MEMORY_BYTES = 4 * 2**30  # of the process's addresses; an operation that needs more fails, and the answer is wrong
PARENT_SECONDS = 1.0  # between looks whether the training process is still there


class _StallError(Exception):
    """The process gave no verdict, for a reason that is not the text."""


def same_expression(answer: str, reference: str) -> bool:
    """Return whether math-verify finds the two LaTeX expressions equal; False if that takes too much processor time.

    The verdict depends on the texts alone. A comparison whose process waits too long or is killed from outside is
    counted in a warning and tried once more. If that fails too it is False this time, and the next call tries again.
    Texts of more than LONGEST characters are different. The first call starts the process. Threads take turns.

    Raises:
        RuntimeError: math-verify could not be started.
    """
    global _stalled
    if max(len(answer), len(reference)) > LONGEST:
        return False
    for then in ("trying again", "taken for wrong this time"):
        try:
            return _verdict(answer, reference)
        except _StallError as error:
            _stalled += 1
            texts = f"{answer[:40]!r} with {reference[:40]!r}"
            warnings.warn(f"math-verify {error} on {texts} (stall {_stalled} of the run); {then}", stacklevel=2)
    return False


@lru_cache(maxsize=8192)  # which keeps no call that raised
def _verdict(answer: str, reference: str) -> bool:
    global _verifier
    with _verifier_lock:
        if _verifier is None or not _verifier.usable():
            _close_verifier()
            _verifier = _Verifier()
            atexit.unregister(_close_verifier)
            atexit.register(_close_verifier)
        return _verifier.same(answer, reference)


class _Verifier:
    """The parent's end of the process. Requests and replies are one JSON line each; the end of the input ends it."""

    def __init__(self) -> None:
        # runpy leaves sys.path as it is. Python would put the folder of a file that it runs itself on the path, where
        # the modules beside this one could hide others.
        start = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
        self.process = subprocess.Popen(
            [sys.executable, "-c", start, __file__, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.owner = os.getpid()
        if self._reply(START_SECONDS) is None:
            raise RuntimeError("math-verify could not be started; install it with: pip install math-verify")

    def usable(self) -> bool:
        # A forked child of the owner must not write into the same pipes: each would read the other's replies.
        return self.owner == os.getpid() and self.process.poll() is None

    def same(self, answer: str, reference: str) -> bool:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps([answer, reference, COMPARISON_SECONDS]) + "\n")
            self.process.stdin.flush()
        except OSError as error:
            raise _StallError("died before the comparison") from error
        reply = self._reply(STALL_SECONDS)
        if reply is not None:
            return reply
        # The limit of processor time ends the process with a signal of its own. It would do so again.
        if self.process.returncode == -signal.SIGPROF:
            return False
        raise _StallError("gave no answer")

    def close(self) -> None:
        if self.owner == os.getpid():
            self.process.kill()
            self.process.communicate()

    def _reply(self, seconds: float) -> bool | None:
        """Return the next reply, or None if the process dies or is killed at the limit before it replies."""
        assert self.process.stdout is not None
        timer = threading.Timer(seconds, self.process.kill)
        timer.start()
        line = ""
        try:
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
            # Ctrl-C comes here too. The process must go then: the next comparison would take its late reply for its
            # own. Until the process is reaped, `usable` would take it for alive.
            if not line.endswith("\n"):
                self.process.kill()
                self.process.wait()
        return bool(json.loads(line)) if line.endswith("\n") else None


_verifier: _Verifier | None = None
_verifier_lock = threading.Lock()
_stalled = 0  # comparisons of this process without a verdict


def _close_verifier() -> None:
    if _verifier is not None:
        _verifier.close()


def _same_value(gold: Any, target: Any, *_: Any) -> bool:
    """Return whether two sympy expressions are equal in value, in place of math-verify's own function.

    Exact numbers must be equal. A decimal may be rounded as in `quantities.same_quantity`: relative to the reference,
    and not where the reference is an integer.
    """
    import sympy

    gold, target = (expression.doit() for expression in (gold, target))
    matrices = [isinstance(expression, sympy.MatrixBase) for expression in (gold, target)]
    if any(matrices):
        same_shape = all(matrices) and gold.shape == target.shape
        return same_shape and all(_same_value(a, b) for a, b in zip(gold.flat(), target.flat(), strict=True))
    if not gold.is_number or not target.is_number:
        return False  # math-verify goes on and simplifies the difference
    if not gold.has(sympy.Float) and not target.has(sympy.Float):
        return _same_exact_value(gold, target)
    tolerance = 1e-12 if gold.is_integer else 1e-6
    return bool(abs(gold - target).evalf(30) <= tolerance * abs(gold).evalf(30))


def _same_exact_value(gold: Any, target: Any) -> bool:
    difference = gold - target
    if difference.is_Rational:
        return bool(difference == 0)
    zero = difference.equals(0)
    # Undecided: equal in fifty digits.
    return bool(abs(difference).evalf(60) <= 1e-50 * abs(gold).evalf(60)) if zero is None else bool(zero)


def _end_with(parent: int) -> None:
    """End this process when `parent` has ended. The end of the input says so too, but not within a comparison."""
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os._exit(1)


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    allowed = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = MEMORY_BYTES if allowed == resource.RLIM_INFINITY else min(MEMORY_BYTES, allowed)
    resource.setrlimit(resource.RLIMIT_AS, (limit, allowed))


def _serve_comparisons() -> None:
    """Run the child's end: write a true line when ready, then one line per comparison, until the input ends."""
    # Ctrl-C and the signals of a scheduler are for the training process, which closes this one.
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=_end_with, args=[int(sys.argv[2])], daemon=True).start()
    _limit_memory()
    replies, sys.stdout = sys.stdout, sys.stderr  # what a library prints must not pass for a reply
    import math_verify
    from math_verify import grader

    # math-verify rounds the difference of two numbers, so that all tiny numbers are equal to it.
    assert callable(grader.sympy_numeric_eq)
    grader.sympy_numeric_eq = _same_value

    # Units were dealt with before. math-verify also takes letters such as "t" and "ab" for units.
    whole = math_verify.LatexExtractionConfig(boxed_match_priority=0)
    settings = dataclasses.replace(
        whole, normalization_config=dataclasses.replace(whole.normalization_config, units=False)
    )

    def same(answer: str, reference: str) -> bool:
        try:
            gold, target = (
                math_verify.parse(f"\\boxed{{{text}}}", [settings], fallback_mode="no_fallback", parsing_timeout=None)
                for text in (reference, answer)
            )
            return bool(math_verify.verify(gold, target, timeout_seconds=None))
        except Exception:  # sympy raises errors of every kind on malformed input; such an answer is not the reference
            return False

    logging.disable()  # math-verify warns that it runs without a time limit; the parent process keeps the time
    # The first comparison also builds the parser's tables, which takes half a second.
    print(json.dumps(same("x+1", "1+x")), file=replies, flush=True)
    for line in sys.stdin:
        answer, reference, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # whose signal ends the process, inside any operation
        verdict = same(answer, reference)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(verdict), file=replies, flush=True)


if __name__ == "__main__":
    try:
        _serve_comparisons()
    except BrokenPipeError:  # the training process was killed, and nobody reads the reply
        os._exit(1)
