"""Atomic writes of single files: after a kill or a power cut, a file holds its old text or its new text, never a part.

Whole checkpoints, which are folders, are in checkpoint.py.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from latent_grpo.errors import ConfigError

# The text of JSON has line breaks only between values, since a string holds its own breaks escaped.
JSON_BREAK = re.compile(r"\n *")
PLAIN_LIST = re.compile(r"\[\n([^\[\]{}]*)\n *\]")  # a list without lists and objects in it


def require_writable(path: Path) -> None:
    """Make the folder of a file. Raise ConfigError, before hours of work, if the file cannot be written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write {str(path)!r}: {error.strerror}; choose another path") from error
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"cannot write {str(path)!r}: its folder is not writable; choose another path")


@contextmanager
def replaced_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to. It becomes `path` in one step, unless the body raises.

    A run that is killed in the body leaves the old file, and a hidden `.NAME.partial` beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    yield partial
    partial.chmod(usual_mode())
    flush(partial)  # before the rename: else a power cut could leave the new name on an empty file
    os.replace(partial, path)


def write_whole(path: Path, text: str) -> None:
    """Replace the text of a file (UTF-8) in one step. Make its folder if that is missing."""
    with replaced_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Replace a file with `value` as indented JSON, each list of plain values on one line."""
    text = json.dumps(value, indent=1)
    text = PLAIN_LIST.sub(lambda match: f"[{JSON_BREAK.sub(' ', match[1]).strip()}]", text)
    write_whole(path, text + "\n")


def flush(path: Path) -> None:
    """Wait until the content of a file, or the list of names in a folder, is on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def usual_mode() -> int:
    """Return the permissions that a new file gets here. Some libraries write files that only their owner can read."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
