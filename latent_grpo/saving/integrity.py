"""Which checkpoints a run has, and whether every file of one is what the run wrote.

The state of a checkpoint holds the size and the SHA-256 of every other file, and of itself. A checkpoint with a
damaged, missing, exchanged or added file, or with a symbolic link, is refused, and the newest whole one is offered.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from latent_grpo.errors import ConfigError

STATE_FILE, TENSOR_FILE, SHARDS = "trainer_state.json", "trainer_state.pt", "optimizer"
AUTO = "auto"  # resume_from_checkpoint: start or continue
BLOCK, THREADS = 2**20, 8  # bytes of a file that are hashed at a time; files that are hashed at the same time
# What a state needs, with its types. Every version wrote these.
STATE = {
    "step": int,
    "log_history": list,
    "kind": str,
    "options": dict,
    "update_size": int,
    "total_steps": int,
    "data": str,
    "parameters": dict,
    "files": dict,
}


class _DamageError(Exception):
    """What is wrong with a checkpoint, as the end of a sentence that begins with its path."""


def files_in(folder: Path) -> list[Path]:
    """Return all files below a folder, in order. A symbolic link counts as a file and is not followed."""
    found: list[Path] = []
    for where, folders, files in os.walk(folder):
        linked = [name for name in folders if os.path.islink(os.path.join(where, name))]
        found += [Path(where) / name for name in (*files, *linked)]
    return sorted(found)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal digits."""
    digest, block = hashlib.sha256(), bytearray(BLOCK)
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(memoryview(block)[:size])
    return digest.hexdigest()


def hashes(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the SHA-256 of files in a folder, by name. Several are read at the same time."""
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: sha256_of(folder / name), names), strict=True))


def with_checksums(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's state with the size and the hash of every file in its folder, and with its own hash."""
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files_in(folder)}
    state = {**state, "files": sizes, "sha256": hashes(folder, list(sizes))}
    return {**state, "state_sha256": _state_hash(state)}


def _state_hash(state: dict[str, Any]) -> str:
    kept = {name: value for name, value in state.items() if name != "state_sha256"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def step_of(folder: Path) -> int:
    """Return the step in the name of a checkpoint; -1 if the name is not that of a checkpoint."""
    match = re.fullmatch(r"checkpoint-([0-9]{1,18})", folder.name)
    return int(match[1]) if match else -1


def checkpoints_in(output_dir: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    return sorted((p for p in output_dir.glob("checkpoint-*") if step_of(p) >= 0), key=step_of)


def newest_whole(output_dir: Path, other_than: Path | None = None) -> Path | None:
    """Return the newest checkpoint without damage, or None."""
    for folder in reversed(checkpoints_in(output_dir)):
        try:
            if folder != other_than:
                _read(folder)
                return folder
        except _DamageError:
            continue
    return None


def find_checkpoint(output_dir: Path, choice: str | bool) -> Path | None:
    """Return the folder to resume from: `choice` itself, or the newest in `output_dir` for True or "true".

    For "auto" it is the newest whole one, with a warning for each newer one that is damaged, or None without any.

    Raises:
        ConfigError: there is no checkpoint; for "auto", there is none beside a finished model.
    """
    word = str(choice).lower()  # a configuration file or a flag may give the word
    checkpoints = checkpoints_in(output_dir)
    if word == AUTO:
        whole = newest_whole(output_dir)
        for folder in checkpoints if whole is None else checkpoints[checkpoints.index(whole) + 1 :]:
            warnings.warn(f"{_refusal(folder)}; resuming {str(whole) if whole else 'from the start'!r}", stacklevel=2)
        # A run without checkpoints has left a model: it has finished, and another one must not write over it.
        if whole is None and any(output_dir.glob("*.safetensors")):
            raise ConfigError(
                f"output_dir {str(output_dir)!r} holds a finished model and no checkpoint to go on from; choose another"
            )
        return whole
    if choice is True or word == "true":
        if not checkpoints:
            raise ConfigError(f"no checkpoint to resume from in {str(output_dir)!r}; give auto to start or continue")
        return checkpoints[-1]
    folder = Path(str(choice))
    if not (folder / STATE_FILE).is_file():
        other = newest_whole(folder.parent, folder)
        remedy = f"choose another, as {str(other)!r}" if other else "give a folder that a run wrote"
        raise ConfigError(f"{str(folder)!r} is not a checkpoint: it has no {STATE_FILE}; {remedy}")
    return folder


def read_state(folder: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's STATE_FILE, after a check of every file in the folder.

    Warns of a checkpoint from a version that wrote no checksums: only the sizes of its files are checked.

    Raises:
        ConfigError: the state cannot be read or was edited, or a file is not what the run wrote.
    """
    try:
        state = _read(folder)
    except _DamageError as damage:
        other = newest_whole(folder.parent, folder)
        remedy = f"choose another, as {str(other)!r}" if other else "start anew in another output_dir"
        raise ConfigError(f"checkpoint {str(folder)!r}{damage}; {remedy}") from damage
    if "sha256" not in state:
        warnings.warn(
            f"checkpoint {str(folder)!r} is of a version without checksums: only sizes are checked", stacklevel=2
        )
    return state


def _refusal(folder: Path) -> str:
    try:
        _read(folder)
    except _DamageError as damage:
        return f"checkpoint {str(folder)!r}{damage}"
    return f"checkpoint {str(folder)!r} is left out"


def _read(folder: Path) -> dict[str, Any]:
    """Return the state of a checkpoint. Raise _DamageError for the first file that is not as the run wrote it."""
    if folder.is_symlink():
        raise _DamageError(" is a symbolic link")
    linked = next((path for path in files_in(folder) if path.is_symlink()), None)
    if linked is not None:
        raise _DamageError(f": {linked.relative_to(folder)} is a symbolic link")
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        wrong = [name for name, kind in STATE.items() if not isinstance(state[name], kind)]
        wrong += ["log_history"] * (not wrong and not all(isinstance(line, dict) for line in state["log_history"]))
        sizes = {str(name): int(size) for name, size in state["files"].items()}
        kept = dict(state.get("sha256", {}))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise _DamageError(f": {STATE_FILE} cannot be read ({type(error).__name__})") from error
    if wrong:
        raise _DamageError(f": {STATE_FILE} cannot be read ({wrong[0]} has another type)")
    # Every version with one hash has both.
    hashed = "sha256" in state or "state_sha256" in state
    if hashed and (state.get("state_sha256") != _state_hash(state) or kept.keys() != sizes.keys()):
        raise _DamageError(f": {STATE_FILE} cannot be read (it was edited after the run wrote it)")
    if step_of(folder) not in (-1, state["step"]):
        raise _DamageError(f" is named otherwise than it was written: {STATE_FILE} is of step {state['step']}")
    _check_files(folder, sizes, kept)
    return dict(state)


def _check_files(folder: Path, sizes: dict[str, int], kept: dict[str, str]) -> None:
    for name, expected in sizes.items():
        path = folder / name
        actual = path.stat().st_size if path.is_file() else None
        if actual != expected:
            damage = "is missing" if actual is None else f"has {actual} bytes of {expected}"
            raise _DamageError(f" is torn: {name} {damage}")
    try:
        found = hashes(folder, list(kept))
    except OSError as error:
        raise _DamageError(f" cannot be read: {error}") from error
    for name, digest in kept.items():
        if found[name] != digest:
            raise _DamageError(f" cannot be read: {name} is not what the run wrote (its SHA-256 differs)")
    # A library may read a file that has been added, such as one more part of the optimizer.
    here = (str(path.relative_to(folder)) for path in files_in(folder) if not path.name.startswith("."))
    added = next((name for name in here if name != STATE_FILE and name not in sizes), None) if kept else None
    if added is not None:
        raise _DamageError(f": {added} is not of the run; remove that file, or")
