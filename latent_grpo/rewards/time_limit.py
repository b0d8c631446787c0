"""A time limit of reward functions, and lines that say which one a run is waiting for.

A slow function would let the other processes of a run wait until their process group gives up, which names no function.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SLOW_SECONDS = 60.0  # after which a line says what runs; the next ones come after twice, four times as long


class TimeLimitError(BaseException):
    """A reward function has run too long. No `Exception`, so that a function that catches these is stopped too."""


@contextmanager
def time_limit(name: str, seconds: float | None) -> Iterator[None]:
    """Raise TimeLimitError in the body after `seconds` (None: never). Print a line while the body is slow.

    Outside the main thread, and on Windows, the body cannot be interrupted: then the error comes at its end.

    Args:
        name: what runs, for the line.
    """
    done = threading.Event()
    able = threading.current_thread() is threading.main_thread() and hasattr(signal, "pthread_kill")
    caller, started = threading.get_ident(), time.monotonic()

    def watch() -> None:
        line, ended = SLOW_SECONDS, False
        while True:
            passed = time.monotonic() - started
            waits = [line - passed] if seconds is None or ended else [line - passed, seconds - passed]
            if done.wait(max(0.0, min(waits))):
                return
            passed = time.monotonic() - started
            if seconds is not None and not ended and passed >= seconds:
                ended = True
                if able:
                    signal.pthread_kill(caller, signal.SIGUSR2)
            if passed >= line:
                line *= 2
                os.write(2, f"\n{name} has been running for {passed:.0f} s\n".encode())

    def stop(*_: Any) -> None:
        if not done.is_set():
            raise TimeLimitError

    previous = signal.signal(signal.SIGUSR2, stop) if able and seconds is not None else None
    threading.Thread(target=watch, daemon=True, name="time limit").start()
    try:
        yield
    finally:
        done.set()
        if able and seconds is not None:
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # one that is on its way
            signal.signal(signal.SIGUSR2, previous)
    if seconds is not None and time.monotonic() - started > seconds:
        raise TimeLimitError
