"""Ctrl-C during training: finish the step, write a checkpoint, then stop."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from latent_grpo.parallel.process_group import all_reduce_max


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


def save_if_due(interrupt: Interrupt, step: int, save_steps: int, save: Callable[[], Any]) -> None:
    """Call `save` every `save_steps` steps (0: never) and after an interrupt, which then raises KeyboardInterrupt.

    Collective: every rank must call it. All ranks stop if one was interrupted, because a checkpoint needs all of them.
    """
    stop = bool(all_reduce_max(interrupt.requested))
    if stop or (save_steps and step % save_steps == 0):
        save()
    if stop:
        raise KeyboardInterrupt
