"""What ends a run before its last step: Ctrl-C, signals of a scheduler, the clock, an error. Each leaves a checkpoint.

A request to stop is answered at the end of the step. An error, or a second Ctrl-C, ends the step at once; then what the
last finished step left is written, if no update has changed it since.
"""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from latent_grpo.config import RunOptions
from latent_grpo.errors import SaveError, TrainingError, first_line
from latent_grpo.parallel.process_group import all_reduce_max, rank, world_size
from latent_grpo.saving.checkpoint import Checkpoints

TIME_IS_UP = 1000  # in place of a signal's number
# SIGUSR1 is what SLURM's --signal sends by custom before the end of a job. SIGTERM is sent at pre-emption.
STOPPING = ("SIGTERM", "SIGHUP", "SIGUSR1")
# torchrun passes on the Ctrl-C that the terminal has sent to its processes already. It must not count as the second.
ONE_KEYSTROKE = 1.0
SLOWER_STEP, SLOWER_SAVE = 1.5, 2.0  # how much longer than the longest so far the next one may take


class Stopped(KeyboardInterrupt):
    """The run was stopped by a signal other than SIGINT, or by `max_hours`, after a checkpoint was written."""


class Stops:
    """Whether a run shall stop after the current step, and its checkpoints at the ends of steps."""

    def __init__(self, args: RunOptions, checkpoints: Checkpoints) -> None:
        self.args, self.checkpoints = args, checkpoints
        self.requested = 0  # the number of a signal
        self.interrupted_at = -ONE_KEYSTROKE
        self.started = self.step_started = time.monotonic()
        self.longest_step = self.longest_save = 0.0

    def handle(self, number: int, _frame: Any) -> None:
        """Take note of a signal. Raise KeyboardInterrupt at a second Ctrl-C."""
        if number == signal.SIGINT:
            since, self.interrupted_at = time.monotonic() - self.interrupted_at, time.monotonic()
            if self.requested == signal.SIGINT:
                if since < ONE_KEYSTROKE:
                    return
                raise KeyboardInterrupt
        elif self.requested:  # a scheduler may say it twice
            return
        self.requested = number
        again = "; press again to stop now" if number == signal.SIGINT else ""
        if rank() == 0:  # a signal may come while something else prints, so this does not print
            line = f"\n{signal.Signals(number).name}: finishing this step, then saving{again}\n"
            os.write(2, line.encode())

    def after_step(self, step: int, save: Callable[[], Path]) -> None:
        """Call `save` every `save_steps` steps (0: never) and when the run shall stop. Then raise KeyboardInterrupt.

        Collective: every rank must call it. All ranks stop if one was asked to, because a checkpoint needs all of them.

        Raises:
            TrainingError: too many updates in a row were skipped, or there is nothing finite to save.
            SaveError: the checkpoint could not be written, and the run shall stop then.
        """
        self.checkpoints.poisoned()
        now = time.monotonic()
        self.longest_step = max(self.longest_step, now - self.step_started)
        reason = all_reduce_max(self.requested or (TIME_IS_UP if self.time_is_up(now) else 0))
        saved: Path | None = None
        if reason or (self.args.save_steps and step % self.args.save_steps == 0):
            try:
                saved = save()
            except SaveError as error:
                if reason or self.args.save_failure == "stop":
                    raise
                warnings.warn(f"{error} (save_failure is 'continue')", stacklevel=2)
            self.longest_save = max(self.longest_save, time.monotonic() - now)
        self.step_started = time.monotonic()
        if reason:
            self.raise_stop(reason, step, saved)

    def time_is_up(self, now: float) -> bool:
        """Return whether a further step and its checkpoint might end after `max_hours`."""
        reserve = SLOWER_STEP * self.longest_step + SLOWER_SAVE * self.longest_save
        return self.args.max_hours is not None and now + reserve > self.started + 3600 * self.args.max_hours

    def raise_stop(self, reason: int, step: int, saved: Path | None) -> None:
        """Raise KeyboardInterrupt, of the kind Stopped unless it was Ctrl-C. The message says how to go on."""
        name = f"max_hours is {self.args.max_hours:g}" if reason == TIME_IS_UP else signal.Signals(reason).name
        message = f"{name}: stopped after step {step}, saved {saved}; continue with --resume_from_checkpoint auto"
        raise KeyboardInterrupt(message) if reason == signal.SIGINT else Stopped(message)

    def save_last(self, error: BaseException) -> None:
        """Write what the last finished step left, if that is possible, and say so."""
        # With several processes, a checkpoint needs every rank, and the others are somewhere in the step.
        together = world_size() == 1 or getattr(error, "on_every_rank", False)
        if (
            not together
            or isinstance(error, Stopped | SaveError | TrainingError)
            or (error.args and isinstance(error, KeyboardInterrupt))
        ):
            return
        try:
            saved = self.checkpoints.save_last()
        except Exception as failure:  # the error that ends the run is the one to tell
            warnings.warn(f"no checkpoint was written: {first_line(failure)}", stacklevel=2)
            return
        if saved and rank() == 0:
            warnings.warn(f"stopped within a step; {str(saved)!r} holds the last finished one", stacklevel=2)


@contextmanager
def stops(args: RunOptions, checkpoints: Checkpoints) -> Iterator[Stops]:
    """Let signals ask for a stop after the step, and leave a checkpoint where an error ends it.

    A signal that the process ignores, as SIGHUP under nohup, stays ignored. Outside the main thread, where Python
    allows no signal handler, signals keep their usual effect.
    """
    state = Stops(args, checkpoints)
    names = [name for name in STOPPING if hasattr(signal, name)]
    taken = [number for name in names if signal.getsignal(number := getattr(signal, name)) != signal.SIG_IGN]
    previous: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, *taken):
            previous[number] = signal.signal(number, state.handle)
    except ValueError:
        pass
    try:
        try:
            yield state
        except BaseException as error:
            state.save_last(error)
            raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
