"""math-verify in a process of its own, which a time limit can kill."""

from __future__ import annotations

import atexit
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from functools import lru_cache

_COMPARISON_SECONDS = 3.0


_START_SECONDS = 120.0


class _Verifier:
    """math-verify in a process of its own, which is killed when a comparison takes too long.

    math-verify's own limit is a signal: it works in the main thread only, and not inside one large-integer operation.
    The process reads and writes one JSON line a comparison. It runs this file alone, so it starts without torch, and
    ends when its input closes.
    """

    def __init__(self) -> None:
        # runpy leaves sys.path as it is; running the file itself would put the modules beside it on the path.
        start = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
        self.process = subprocess.Popen(
            [sys.executable, "-c", start, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.owner = os.getpid()
        if self._answer(_START_SECONDS) is None:
            raise RuntimeError("math-verify could not be started; install it with: pip install math-verify")

    def usable(self) -> bool:
        return self.owner == os.getpid() and self.process.poll() is None  # a fork must not share the pipes

    def same(self, found: str, reference: str) -> bool:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps([found, reference]) + "\n")
            self.process.stdin.flush()
        except OSError:  # it has just died; the next comparison starts another
            return False
        return self._answer(_COMPARISON_SECONDS) is True

    def close(self) -> None:
        if self.owner == os.getpid():
            self.process.kill()
            self.process.communicate()

    def _answer(self, seconds: float) -> bool | None:
        """The next reply, or None where the process dies or is killed before it gives one."""
        assert self.process.stdout is not None
        timer = threading.Timer(seconds, self.process.kill)
        timer.start()
        line = ""
        try:
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
            if not line.endswith("\n"):  # also on Ctrl-C: a late reply would pass for that to the next comparison
                self.process.kill()
                self.process.wait()  # until it is reaped it passes for alive
        return bool(json.loads(line)) if line.endswith("\n") else None


_verifier: _Verifier | None = None


_verifier_lock = threading.Lock()


@lru_cache(maxsize=8192)
def same_expression(found: str, reference: str) -> bool:
    """Whether math-verify finds the two LaTeX expressions equal; False where it cannot read one of them in time."""
    global _verifier
    with _verifier_lock:
        if _verifier is None or not _verifier.usable():
            _close_verifier()
            _verifier = _Verifier()
            atexit.unregister(_close_verifier)
            atexit.register(_close_verifier)
        return _verifier.same(found, reference)


def _close_verifier() -> None:
    if _verifier is not None:
        _verifier.close()


def _serve_comparisons() -> None:
    """The other side of ``_Verifier``: a true line when ready, then one line a comparison, until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training process, which closes this one
    replies, sys.stdout = sys.stdout, sys.stderr  # what a library prints must not pass for a reply
    import math_verify

    def same(found: str, reference: str) -> bool:
        try:
            gold, target = (
                math_verify.parse(f"\\boxed{{{text}}}", fallback_mode="no_fallback", parsing_timeout=None)
                for text in (reference, found)
            )
            return bool(math_verify.verify(gold, target, timeout_seconds=None))
        except Exception:  # sympy raises of every kind on malformed input: such an answer is not the reference
            return False

    logging.disable()  # its warning that it runs without a time limit: the parent process keeps the time
    print(
        json.dumps(same("x+1", "1+x")), file=replies, flush=True
    )  # which also builds the parser's tables, half a second's work
    for line in sys.stdin:
        print(json.dumps(same(*json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    _serve_comparisons()
