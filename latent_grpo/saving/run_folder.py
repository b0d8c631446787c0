"""One run at a time in a folder, and the removal of what interrupted writes have left there.

The lock is the kernel's (flock), which releases it when the process ends in any way. Nothing is left to remove.
"""

from __future__ import annotations

import errno
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from latent_grpo.errors import ConfigError
from latent_grpo.parallel.process_group import on_rank_zero

REPLACED = ".replaced"  # ends the hidden name of a checkpoint while another one of its step takes its name
RUN_FOLDERS = ("checkpoint-[0-9]*", "completions", "tensorboard")
RUN_FILES = ("metrics.jsonl", "run.json", "wandb_run_id.txt", "*.safetensors", "*.safetensors.index.json")
LOCK_FILE = ".lock"  # only on file systems that lock no folders, as NFS


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made if it is missing, and remove what interrupted writes left in it.

    Collective: every rank must call it; rank 0 holds the lock.

    Raises:
        ConfigError: another process holds the lock, or the folder cannot be written.
    """
    held: list[int] = []
    on_rank_zero(lambda: held.extend(_locked(folder)))
    try:
        on_rank_zero(lambda: remove_leftovers(folder))
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)


def _locked(folder: Path) -> list[int]:
    """Return descriptors that hold the lock of a folder while they are open."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot write to output_dir {str(folder)!r}: {error.strerror}; choose another folder"
        ) from error
    try:
        import fcntl
    except ImportError:  # Windows
        return []
    reason: OSError | None = None
    for path, flags in ((folder, os.O_RDONLY), (folder / LOCK_FILE, os.O_RDWR | os.O_CREAT)):
        try:
            descriptor = os.open(path, flags, 0o666)
        except OSError as error:
            reason = error
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return [descriptor]
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise ConfigError(
                    f"output_dir {str(folder)!r} is in use: another run is writing there; wait for its end, or choose "
                    "another folder"
                ) from error
            reason = error
    warnings.warn(
        f"output_dir {str(folder)!r} cannot be locked ({reason}): see to it that no second run writes there",
        stacklevel=2,
    )
    return []


def remove_leftovers(folder: Path) -> None:
    """Remove what interrupted writes left in a run's folder. A checkpoint without a successor gets its name back."""
    for path in sorted(folder.glob(".*")):
        if path.name.startswith(".checkpoint-") and path.name.endswith(REPLACED):
            final = folder / path.name.removeprefix(".").removesuffix(REPLACED)
            if not final.exists():
                os.replace(path, final)
                continue
        if path.name.startswith(".checkpoint-") or path.name.endswith(".partial"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def remove_run(folder: Path) -> None:
    """Remove what a run has written into a folder: metrics, checkpoints, logs and weights. Other files stay.

    A folder without the metrics of a run keeps all, so that a model that no run wrote is not lost.
    """
    if not (folder / "metrics.jsonl").is_file():
        return
    for pattern in RUN_FOLDERS:
        for path in folder.glob(pattern):
            shutil.rmtree(path)
    for pattern in RUN_FILES:
        for path in folder.glob(pattern):
            path.unlink()
