"""Checkpoints: a Hugging Face model folder plus what a run needs to go on. A checkpoint is there whole or not at all.

A checkpoint is written beside its final name, flushed to the disk, then renamed. So a run that is killed at any moment
leaves only complete ones. Before it is resumed, every file is checked, and so are options, data and parameters.

The folder `checkpoint-STEP` holds:
- the model (only the adapters, if there are any) and the tokenizer, as `from_pretrained` reads them, with the format of
  the prompts;
- `optimizer/`: the large tensors of the optimizer. Every rank writes its part; any number of ranks resumes.
- `trainer_state.pt`: small tensors and numbers of the optimizer, random streams, position in the data;
- `trainer_state.json`: step, metrics, identity of the run, and the size of every other file.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from latent_grpo.config import RunOptions, default_of
from latent_grpo.errors import ConfigError, first_line
from latent_grpo.parallel.fsdp import copy_to_full
from latent_grpo.parallel.process_group import all_gather, on_rank_zero, rank
from latent_grpo.prompts import PromptFormat
from latent_grpo.saving.atomic_files import flush
from latent_grpo.saving.model_files import read_model, write_model
from latent_grpo.saving.random_streams import random_state, set_random_state
from latent_grpo.saving.run_identity import check_identity, run_identity
from latent_grpo.saving.tensor_shards import read_shards, write_shards
from latent_grpo.update.optimizer import Updater

STATE_FILE, TENSOR_FILE, SHARDS = "trainer_state.json", "trainer_state.pt", "optimizer"


class Checkpoints:
    """Write and resume the checkpoints of one run in `args.output_dir`.

    Collective: every rank must call `save` and `resume`.

    Args:
        kind: name of the training phase, "train" or "sft". A checkpoint of another phase is refused.
        args: the options of the run.
        model: the trained model, sharded if there are several processes.
        full_model: the model that `shard` returned.
        tokenizer, prompt_format: the tokenizer and how prompts are put to the model; both are written with it.
        updater: the optimizer.
        rows: the training data.
        total_steps: number of steps of the schedule.
    """

    def __init__(
        self,
        kind: str,
        args: RunOptions,
        model: Any,
        full_model: Any,
        tokenizer: Any,
        prompt_format: PromptFormat,
        updater: Updater,
        rows: Sequence[Any],
        total_steps: int,
    ) -> None:
        self.kind, self.args, self.rows, self.total_steps = kind, args, rows, total_steps
        self.model, self.full_model, self.tokenizer, self.updater = model, full_model, tokenizer, updater
        self.output_dir, self.prompt_format = Path(args.output_dir), prompt_format

    def save(self, step: int, position: dict[str, Any], history: list[dict[str, Any]]) -> Path:
        """Write `checkpoint-STEP`, remove the oldest checkpoints beyond `save_total_limit`, and return its path.

        position: where the trainer stands in its data and random streams (numbers, lists, tensors).
        history: the metrics so far.
        """
        final, partial = self.output_dir / f"checkpoint-{step}", self.output_dir / f".checkpoint-{step}.partial"
        on_rank_zero(lambda: self._make_partial(partial))
        write_shards(partial / SHARDS, self.updater.tensors())
        copy_to_full(self.full_model, self.model)  # rank 0 writes the full model, which may lag behind the shards
        tensors = {"updater": self.updater.state_dict(), "random": all_gather([random_state()]), "position": position}
        on_rank_zero(lambda: self._finish(final, partial, tensors, {"step": step, "log_history": history}))
        return final

    def _make_partial(self, partial: Path) -> None:
        """Make an empty folder for a new checkpoint, and remove what killed runs left behind."""
        for leftover in self.output_dir.glob(".checkpoint-*"):
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)

    def _finish(self, final: Path, partial: Path, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        """Write the files of rank 0, and rename the checkpoint once all of it is on the disk."""
        write_model(partial, self.full_model, self.tokenizer, self.prompt_format)
        torch.save(tensors, partial / TENSOR_FILE)
        # The sizes tell a torn checkpoint from a whole one, so this file is the last.
        files = {str(path.relative_to(partial)): path.stat().st_size for path in files_in(partial)}
        (partial / STATE_FILE).write_text(json.dumps({**state, **self._identity(), "files": files}, indent=1))
        for path in (*files_in(partial), partial / SHARDS, partial):
            flush(path)
        if final.exists():  # a resumed run writes a step again
            discard(final)
        os.replace(partial, final)
        flush(self.output_dir)
        if self.args.save_total_limit is not None:
            # Checkpoints of later steps are left if the run was resumed from an older one. They do not count.
            older = [folder for folder in checkpoints_in(self.output_dir) if step_of(folder) <= state["step"]]
            for folder in older[: -self.args.save_total_limit]:
                discard(folder)

    def resume(self, choice: str | bool) -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
        """Restore model, optimizer, schedule and random streams. Return step, `position` and `history` of `save`.

        choice: a checkpoint folder, or True for the newest one in `output_dir`.

        Raises:
            ConfigError: the checkpoint is missing, torn or of another run. Nothing has been written then.
        """
        # Rank 0 chooses, since all ranks must resume the same checkpoint.
        folder = on_rank_zero(lambda: find_checkpoint(self.output_dir, choice))
        state = read_state(folder)
        check_identity(folder, state, self._identity(), {item.name: default_of(item) for item in fields(self.args)})
        # A checkpoint from elsewhere would continue into the metrics of the run that is here.
        if folder.resolve().parent != self.output_dir.resolve() and (self.output_dir / "metrics.jsonl").exists():
            raise ConfigError(
                f"output_dir {str(self.output_dir)!r} holds another run than {str(folder)!r}; choose another"
            )
        try:
            tensors = torch.load(folder / TENSOR_FILE, weights_only=True, map_location="cpu")
            read_model(folder, self.model)
            self.updater.load(tensors["updater"], read_shards(folder / SHARDS, self.updater.empty))
        except Exception as error:  # a damaged file can raise anything
            raise ConfigError(
                f"checkpoint {str(folder)!r} cannot be read ({first_line(error)}); choose another"
            ) from error
        copy_to_full(self.full_model, self.model, frozen=True)
        if rank() < len(tensors["random"]):  # a rank that the saved run did not have keeps the streams it started with
            set_random_state(tensors["random"][rank()])
        return state["step"], tensors["position"], state["log_history"]

    def _identity(self) -> dict[str, Any]:
        return run_identity(self.kind, self.args, self.rows, self.total_steps, self.model, self.prompt_format)


def files_in(folder: Path) -> list[Path]:
    """Return all files below a folder, in order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def discard(folder: Path) -> None:
    """Remove a checkpoint. It loses its name first, so that a half removed one is not taken for a checkpoint."""
    nameless = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(nameless, ignore_errors=True)
    os.replace(folder, nameless)
    shutil.rmtree(nameless)


def step_of(folder: Path) -> int:
    """Return the step in the name of a checkpoint; -1 if the name is not that of a checkpoint."""
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match[1]) if match else -1


def checkpoints_in(output_dir: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    return sorted((p for p in output_dir.glob("checkpoint-*") if step_of(p) >= 0), key=step_of)


def find_checkpoint(output_dir: Path, choice: str | bool) -> Path:
    """Return the folder to resume from: `choice` itself, or the newest in `output_dir` for True or "true".

    Raises:
        ConfigError: there is no checkpoint.
    """
    if choice is True or str(choice).lower() == "true":  # a configuration file or a flag may give the word
        checkpoints = checkpoints_in(output_dir)
        if not checkpoints:
            raise ConfigError(f"no checkpoint to resume from in {str(output_dir)!r}")
        return checkpoints[-1]
    folder = Path(str(choice))
    if not (folder / STATE_FILE).is_file():
        raise ConfigError(f"{str(folder)!r} is not a checkpoint: it has no {STATE_FILE}")
    return folder


def read_state(folder: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's STATE_FILE.

    Raises:
        ConfigError: it cannot be read, or a file that it lists is missing or has another size.
    """
    where, others = f"checkpoint {str(folder)!r}", [str(p) for p in checkpoints_in(folder.parent) if p != folder]
    remedy = f"choose another, as {others[-1]!r}" if others else "start anew in another output_dir"
    try:
        state = json.loads((folder / STATE_FILE).read_text())
        files = {name: int(size) for name, size in state["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{where}: {STATE_FILE} cannot be read ({type(error).__name__}); {remedy}") from error
    for name, expected in files.items():
        path = folder / name
        actual = path.stat().st_size if path.is_file() else None
        if actual != expected:
            damage = "is missing" if actual is None else f"has {actual} bytes of {expected}"
            raise ConfigError(f"{where} is torn: {name} {damage}; {remedy}")
    return dict(state)
