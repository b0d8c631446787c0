"""Errors that one line explains, and the pieces of that line. The command line prints them without a traceback."""

from __future__ import annotations

import difflib
from typing import Any

from latent_grpo.trl_names import HINTS, SYNONYMS


class ConfigError(ValueError):
    """An option or a configuration file cannot be used. The message names the option, its value and the remedy."""


class ModelError(ValueError):
    """A model or tokenizer cannot be used. The message names the remedy."""


class DataError(ValueError):
    """A data source cannot be used. The message names the file, the row and the remedy."""


class RewardError(RuntimeError):
    """A reward function failed. The message names the function and the sample that it failed on."""


class SaveError(RuntimeError):
    """A checkpoint or a model could not be written. The message names the folder, the cause and the remedy."""


class TrainingError(RuntimeError):
    """A run cannot go on, because its numbers are no longer finite. The message names the cause and what is left."""


def require(holds: bool, name: str, value: Any, remedy: str) -> None:
    """Raise ConfigError that names the option, its value and the remedy unless `holds`."""
    if not holds:
        raise ConfigError(f"{name} is {value!r}: {remedy}")


def unknown_key(key: str, known: list[str]) -> str:
    """Return a sentence about an unknown key, with the nearest known one."""
    if key in HINTS:
        return f"unknown option {key!r}, a name of TRL: {HINTS[key]}"
    if SYNONYMS.get(key) in known:
        return f"unknown option {key!r}; give {SYNONYMS[key]}"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"unknown option {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error, or the name of its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
