"""Ctrl-C during training: finish the step, write a checkpoint, then stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupt:
    """Whether SIGINT has asked the run to stop after the current step."""

    requested = False


@contextmanager
def graceful_interrupt() -> Iterator[Interrupt]:
    """Let the first SIGINT set `requested` instead of raising; a second one raises KeyboardInterrupt at once.

    Outside the main thread, where Python allows no signal handler, SIGINT keeps its usual effect.
    """
    interrupt = Interrupt()

    def handle(_signal: int, _frame: Any) -> None:
        if interrupt.requested:
            raise KeyboardInterrupt
        interrupt.requested = True

    try:
        previous = signal.signal(signal.SIGINT, handle)
    except ValueError:
        yield interrupt
        return
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)
