"""One message and one exit code for all processes of a run, and an end of those that wait for one that is silent.

The processes talk through the store of torchrun, beside the collectives, which wait for every rank and tell nobody why.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

BEAT_SECONDS = 2.0
SILENT_SECONDS = 180.0  # without a beat of a rank, after which the others end
STORE_SECONDS = 10.0  # that the store may take for an answer
FAILURE = 1


def store_of_run() -> Any:
    """Return a client of the store that torchrun, or rank 0, keeps for the processes; None if there is one process."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "MASTER_ADDR" not in os.environ:
        return None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=STORE_SECONDS))
    except (dist.DistError, RuntimeError, ValueError):
        return None
    return dist.PrefixStore(f"latent_grpo/{attempt}", store)


def first_to_end(code: int) -> tuple[bool, int]:
    """Return whether this process is the first of the run that ends with an error, and the exit code of the first."""
    store = store_of_run()
    try:
        if store is None:
            return True, code
        if store.add("ended", 1) == 1:
            store.set("code", str(code))
            return True, code
        return False, int(store.get("code"))
    except (dist.DistError, RuntimeError, ValueError):  # the process that kept the store has ended already
        return False, code


@contextmanager
def heartbeat() -> Iterator[None]:
    """Let the other ranks see that this one runs, and end this process when another one has been silent for too long.

    A rank that is stopped or hangs with its interpreter would otherwise keep the others waiting until the timeout of
    the process group, which says nothing about it. A process whose torchrun was killed gets SIGTERM: nobody would end
    it, and the next start of the run would find the folder taken.
    """
    store, done, parent = store_of_run(), threading.Event(), os.getppid()
    if store is None:
        yield
        return
    threading.Thread(target=_end_with, args=(parent, done), daemon=True, name="parent").start()
    thread = threading.Thread(target=_beat, args=(store, done), daemon=True, name="heartbeat")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(STORE_SECONDS)


def _end_with(parent: int, done: threading.Event) -> None:
    while not done.wait(BEAT_SECONDS):
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)
            return


def _beat(store: Any, done: threading.Event) -> None:
    own, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    counts, seen = [0] * ranks, [time.monotonic()] * ranks
    last = time.monotonic()
    try:
        while not done.wait(BEAT_SECONDS):
            store.add(f"beat/{own}", 1)
            now = time.monotonic()
            # After a pause of this process, as a laptop's sleep, nobody is known to be silent.
            if now - last > SILENT_SECONDS / 2:
                seen = [now] * ranks
            last = now
            for rank in range(ranks):
                if (count := store.add(f"beat/{rank}", 0)) != counts[rank]:
                    counts[rank], seen[rank] = count, now
                elif now - seen[rank] > SILENT_SECONDS:
                    _end(rank, now - seen[rank])
    except (dist.DistError, RuntimeError):  # the store is gone: the run is ending
        return


def _end(rank: int, seconds: float) -> None:
    first, code = first_to_end(FAILURE)
    if first:
        line = f"rank {rank} has not been heard of for {seconds:.0f} s; the run ends, resume it from its checkpoint\n"
        os.write(2, line.encode())
    os._exit(code)
