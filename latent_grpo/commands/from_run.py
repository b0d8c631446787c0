"""What a command takes from the run that made its model, if no flag says otherwise. It imports nothing slow."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from latent_grpo.errors import ConfigError, ModelError

FORMAT = "prompt_format.json"
TAKEN = ("latent", "method", "latent_top_k", "tau")  # options of `train`; a warm start has only the first


def require_model(path: str) -> None:
    """Raise ModelError if a path that cannot be a Hub name is no folder. It takes no time, unlike loading a model."""
    if path.startswith((".", "/", "~")) and not Path(path).is_dir():
        raise ModelError(f"the model folder {path!r} does not exist; give a folder or a Hub name")


def options_of(model: str) -> dict[str, Any]:
    """Return the options, by name, of the run that wrote a model or a checkpoint; {} without its run.json."""
    if not model:
        return {}
    folder = Path(model)
    for path in (folder / "run.json", folder.parent / "run.json" if folder.name.startswith("checkpoint-") else None):
        if path is not None and path.is_file():
            try:
                options: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["options"]
            except (ValueError, KeyError, OSError) as error:
                raise ConfigError(f"{str(path)!r} cannot be read ({type(error).__name__}); remove it") from error
            return {name: options[name] for name in TAKEN if name in options}
    return {}


def take(args: argparse.Namespace, model: str, names: Iterable[str], defaults: dict[str, Any]) -> list[str]:
    """Set the options `names` of a namespace that are None to those of the model's run, else to `defaults`.

    Return a line that says what was taken and differs from the default, if anything does.
    """
    known = options_of(model)
    taken = []
    for name in names:
        if getattr(args, name) is not None:
            continue
        setattr(args, name, known.get(name, defaults[name]))
        if getattr(args, name) != defaults[name]:
            taken.append(f"{name} {getattr(args, name)}")
    return [f"{', '.join(taken)} as in the run that made {model} (run.json); flags override it"] if taken else []


def take_mode(args: argparse.Namespace) -> list[str]:
    """Set `mode` of a command that samples. Return a line if a model is asked for latent steps it has not learnt."""
    known, model = options_of(args.model), args.model
    text = known.get("latent") is False
    if args.mode is None:
        args.mode = "text" if text else "latent"
        if text:
            return [f"mode text as in the run that made {model} (run.json); --mode latent overrides it"]
    elif args.mode == "latent" and text:
        return [f"{model} was trained without latent steps (run.json): in latent mode it has not learnt to end them"]
    if args.mode == "latent" and not known and Path(model).is_dir() and not (Path(model) / FORMAT).is_file():
        return [f"{model} is not from a latent warm start: in latent mode it has not learnt to end its latent steps"]
    return []


def say(notes: Iterable[str]) -> None:
    """Print lines on standard error, from one process."""
    for line in notes:
        if os.environ.get("RANK", "0") == "0":
            print(f"note: {line}", file=sys.stderr)
