"""Checkpoints: an ordinary Hugging Face model folder, plus what a run needs to go on. Written whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from latent_grpo.config import ConfigError

STATE_FILE, TENSOR_FILE = "trainer_state.json", "trainer_state.pt"


def save_model(folder: Path, model: Any, tokenizer: Any) -> None:
    """Model (safetensors) and tokenizer as `from_pretrained` reads them."""
    transformers_logging.disable_progress_bar()  # its bar would break into the run's own
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)


def save_checkpoint(
    output_dir: Path, step: int, model: Any, tokenizer: Any, tensors: dict[str, Any], state: dict[str, Any]
) -> Path:
    """Write `checkpoint-STEP` beside its final name, then rename it, so that a killed run leaves no torn one."""
    final = output_dir / f"checkpoint-{step}"
    partial = output_dir / f".checkpoint-{step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    save_model(partial, model, tokenizer)
    torch.save(tensors, partial / TENSOR_FILE)
    (partial / STATE_FILE).write_text(json.dumps(state, indent=1))
    if final.exists():
        shutil.rmtree(final)
    os.replace(partial, final)
    return final


def find_checkpoint(output_dir: Path, choice: str | bool) -> Path:
    """The folder to resume from: `choice` itself, or the newest in `output_dir` for true. ConfigError if it is none."""
    if choice is True or str(choice).lower() == "true":
        found = sorted(output_dir.glob("checkpoint-*"), key=lambda p: int(re.sub(r"\D", "", p.name) or 0))
        if not found:
            raise ConfigError(f"no checkpoint to resume from in {str(output_dir)!r}")
        return found[-1]
    folder = Path(str(choice))
    if not (folder / STATE_FILE).is_file():
        raise ConfigError(f"{str(folder)!r} is not a checkpoint: it has no {STATE_FILE}")
    return folder


def load_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and state of a checkpoint (tensors only: no code is unpickled). ConfigError for a damaged one."""
    try:
        tensors = torch.load(folder / TENSOR_FILE, weights_only=True, map_location="cpu")
        state = json.loads((folder / STATE_FILE).read_text())
    except Exception as error:
        raise ConfigError(
            f"checkpoint {str(folder)!r} cannot be read ({type(error).__name__}); choose another"
        ) from error
    return tensors, state


class Interrupt:
    """Whether SIGINT has asked the run to stop after the step at hand."""

    requested = False


@contextmanager
def graceful_interrupt() -> Iterator[Interrupt]:
    """The first SIGINT sets `requested`; a second one interrupts at once."""
    interrupt = Interrupt()

    def handle(_signal: int, _frame: Any) -> None:
        if interrupt.requested:
            raise KeyboardInterrupt
        interrupt.requested = True

    try:
        previous = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not in the main thread: leave the handler alone
        yield interrupt
        return
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)
