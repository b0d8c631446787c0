"""Checkpoints: a Hugging Face model folder plus what a run needs to go on. A checkpoint is there whole or not at all.

A checkpoint is written beside its final name, flushed to the disk, then renamed. So a run that is killed at any moment
leaves only complete ones. Before it is resumed, every file is checked, and so are options, data and parameters.

The folder `checkpoint-STEP` holds:
- the model (only the adapters, if there are any) and the tokenizer, as `from_pretrained` reads them, with the format of
  the prompts;
- `optimizer/`: the large tensors of the optimizer. Every rank writes its part; any number of ranks resumes.
- `trainer_state.pt`: small tensors and numbers of the optimizer, random streams, position in the data;
- `trainer_state.json`: step, metrics, identity of the run, size and SHA-256 of every file.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from latent_grpo.config import RunOptions, default_of
from latent_grpo.errors import ConfigError, SaveError, TrainingError, first_line
from latent_grpo.model.finite import first_not_finite
from latent_grpo.parallel.fsdp import copy_to_full
from latent_grpo.parallel.process_group import all_gather, on_rank_zero, rank
from latent_grpo.prompts import PromptFormat
from latent_grpo.saving.atomic_files import flush, usual_mode
from latent_grpo.saving.integrity import (
    SHARDS,
    STATE_FILE,
    TENSOR_FILE,
    checkpoints_in,
    files_in,
    find_checkpoint,
    newest_whole,
    read_state,
    step_of,
    with_checksums,
)
from latent_grpo.saving.model_files import OwnFiles, read_model, write_model
from latent_grpo.saving.random_streams import random_state, set_random_state
from latent_grpo.saving.run_folder import REPLACED, remove_leftovers
from latent_grpo.saving.run_identity import check_identity, run_identity
from latent_grpo.saving.run_record import write_record
from latent_grpo.saving.tensor_shards import read_shards, write_shards
from latent_grpo.update.lora import has_adapters
from latent_grpo.update.optimizer import Updater

SMALL_FILES = 32 * 2**20  # bytes of tokenizer, configuration and metrics, at most


@dataclass
class Mark:
    """Where a run stands after a step: everything of a checkpoint but the tensors of model and optimizer."""

    step: int
    position: dict[str, Any]
    history: list[dict[str, Any]]  # to which later steps add
    lines: int  # of the history that belong to this step and those before it
    random: Any  # the random streams of this rank
    updates: int  # of the optimizer


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
        self.marked: Mark | None = None

    def record(self) -> None:
        """Write how the run was made beside its weights. Only rank 0 writes."""
        on_rank_zero(lambda: write_record(self.output_dir, self.kind, self.args, self.rows))

    def mark(self, step: int, position: dict[str, Any], history: list[dict[str, Any]]) -> None:
        """Remember where the run stands after a step, without the large tensors. `save_last` can write it later.

        position: where the trainer stands in its data and random streams (numbers, lists, tensors), for it alone.
        history: the metrics so far, to which later steps add.
        """
        self.marked = Mark(step, position, history, len(history), random_state(), self.updater.updates)

    def save(self, step: int, position: dict[str, Any], history: list[dict[str, Any]]) -> Path:
        """Write `checkpoint-STEP`, remove the oldest checkpoints beyond `save_total_limit`, and return its path.

        The arguments are those of `mark`.

        Raises:
            TrainingError: a weight or a tensor of the optimizer is not finite. Nothing is written.
            SaveError: the space does not suffice or a file could not be written. What was written is removed.
        """
        self.mark(step, position, history)
        return self._save_mark()

    def save_last(self) -> Path | None:
        """Write the checkpoint of the last finished step, unless it is there or an update has changed the model since.

        For the end of a run within a step. Return the checkpoint, or None.
        """
        mark = self.marked
        if mark is None or mark.step == 0 or mark.updates != self.updater.updates:
            return None
        final = self.output_dir / f"checkpoint-{mark.step}"
        return final if on_rank_zero(final.exists) else self._save_mark()

    def _save_mark(self) -> Path:
        mark = self.marked
        assert mark is not None
        self.check_finite(mark.step)
        final, partial = (
            self.output_dir / name.format(mark.step) for name in ("checkpoint-{}", ".checkpoint-{}.partial")
        )
        try:
            on_rank_zero(lambda: self._make_partial(partial))
            write_shards(partial / SHARDS, self.updater.tensors())
            copy_to_full(self.full_model, self.model)  # rank 0 writes the full model, which may lag behind the shards
            random = all_gather([mark.random])
            tensors = {"updater": self.updater.state_dict(), "random": random, "position": mark.position}
            state = {"step": mark.step, "log_history": mark.history[: mark.lines]}
            on_rank_zero(lambda: self._finish(final, partial, tensors, state))
        except BaseException as error:
            if rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the space now
            if isinstance(error, ConfigError | SaveError) or not isinstance(error, Exception):
                raise
            cause = f"checkpoint {str(final)!r} could not be written ({first_line(error)})"
            raise SaveError(f"{cause}; {self._kept()}") from error
        return final

    def check_finite(self, step: int) -> None:
        """Raise TrainingError that names a tensor which is not finite. Collective: every rank must call it."""
        if (name := self._not_finite()) is not None:
            cause = f"after step {step}, {name!r} holds NaN or infinity, so it is not saved"
            raise TrainingError(f"{cause}; {self._kept()}, with a lower learning_rate or other data")

    def _not_finite(self) -> str | None:
        """Return the name of a trained weight or of a tensor of the optimizer that is not finite, on every rank."""
        weights = ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
        name = first_not_finite(weights) or first_not_finite(self.updater.tensors().items())
        return next((name for name in all_gather([name]) if name is not None), None)

    def _kept(self) -> str:
        whole = newest_whole(self.output_dir)
        return (
            f"the last good checkpoint is {str(whole)!r}: resume it" if whole else "there is no checkpoint: start anew"
        )

    def poisoned(self) -> None:
        """Raise TrainingError if `max_skipped_updates` in a row were skipped. It names the cause.

        Collective: every rank must call it.
        """
        # A step may have several updates, of which the last is good.
        count, self.updater.most_in_row = self.updater.most_in_row, self.updater.skipped_in_row
        if count < self.args.max_skipped_updates:
            return
        self.check_finite(self.marked.step if self.marked else 0)
        what = f"{count} updates in a row were skipped, because their gradients are not finite"
        where = self.updater.bad_gradient or "the loss"
        raise TrainingError(f"{what} (first in {where!r}); {self._kept()}, or raise max_skipped_updates")

    def _make_partial(self, partial: Path) -> None:
        """Make an empty folder for a new checkpoint, and check that it fits on the disk."""
        remove_leftovers(self.output_dir)
        partial.mkdir(parents=True)
        need, free = self._bytes(), shutil.disk_usage(partial).free
        if need > free:
            sizes = f"it needs {need / 2**20:,.0f} MiB and {free / 2**20:,.0f} MiB are free"
            raise SaveError(f"checkpoint in {str(self.output_dir)!r} could not be written: {sizes}; {self._kept()}")

    def _bytes(self) -> int:
        """Return the bytes of a checkpoint, within a few MiB."""
        whole = not has_adapters(self.model) and not isinstance(self.model, OwnFiles)
        saved = [p for p in self.model.parameters() if whole or p.requires_grad]
        return sum(t.numel() * t.element_size() for t in (*saved, *self.updater.tensors().values())) + SMALL_FILES

    def _finish(self, final: Path, partial: Path, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        """Write the files of rank 0, and rename the checkpoint once all of it is on the disk."""
        write_model(partial, self.full_model, self.tokenizer, self.prompt_format)
        torch.save(tensors, partial / TENSOR_FILE)
        # It tells a torn or damaged checkpoint from a whole one, so this file is the last.
        state = with_checksums(partial, {**state, **self._identity()})
        (partial / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        for path in files_in(partial):
            path.chmod(usual_mode())
        for path in (*files_in(partial), partial / SHARDS, partial):
            flush(path)
        replaced = final.with_name(f".{final.name}{REPLACED}")
        if final.exists():  # a resumed run writes a step again; `remove_leftovers` gives it its name back after a kill
            os.replace(final, replaced)
        os.replace(partial, final)
        flush(self.output_dir)
        if replaced.exists():
            shutil.rmtree(replaced)
        if self.args.save_total_limit is not None:
            # Checkpoints of later steps are left if the run was resumed from an older one. They do not count.
            older = [folder for folder in checkpoints_in(self.output_dir) if step_of(folder) <= state["step"]]
            for folder in older[: -self.args.save_total_limit]:
                discard(folder)

    def resume(self, choice: str | bool) -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
        """Restore model, optimizer, schedule and random streams. Return step, `position` and `history` of `save`.

        choice: a checkpoint folder, True for the newest one in `output_dir`, or "auto" for the newest whole one. If
            "auto" finds none, step 0, {} and [] are returned.

        Raises:
            ConfigError: the checkpoint is missing, damaged or of another run. Nothing has been written then.
        """
        # Rank 0 chooses and checks, since all ranks must resume the same checkpoint.
        found = on_rank_zero(lambda: find_checkpoint(self.output_dir, choice))
        if found is None:
            return 0, {}, []
        folder, state = found, on_rank_zero(lambda: read_state(found))
        own, defaults = self._identity(), {item.name: default_of(item) for item in fields(self.args)}
        # A checkpoint from elsewhere would continue into the metrics of the run that is here.
        if folder.resolve().parent != self.output_dir.resolve() and (self.output_dir / "metrics.jsonl").exists():
            raise ConfigError(
                f"output_dir {str(self.output_dir)!r} holds another run than {str(folder)!r}; choose another"
            )
        try:
            check_identity(folder, state, own, defaults)
            tensors = torch.load(folder / TENSOR_FILE, weights_only=True, map_location="cpu")
            read_model(folder, self.model)
            self.updater.load(tensors["updater"], read_shards(folder / SHARDS, self.updater.empty))
            streams, position = tensors["random"], dict(tensors["position"])
            if rank() < len(streams):  # a rank that the saved run did not have keeps the streams it started with
                set_random_state(streams[rank()])
        except ConfigError:
            raise
        except Exception as error:  # a damaged file can raise anything
            raise ConfigError(
                f"checkpoint {str(folder)!r} cannot be read ({first_line(error)}); choose another"
            ) from error
        # This version saves none such. The run would skip every update, or spoil its weights.
        if (name := self._not_finite()) is not None:
            cause = f"checkpoint {str(folder)!r} cannot be used: {name!r} holds NaN or infinity"
            raise ConfigError(f"{cause}; choose an older one, or start anew in another output_dir")
        copy_to_full(self.full_model, self.model, frozen=True)
        return state["step"], position, state["log_history"]

    def _identity(self) -> dict[str, Any]:
        return run_identity(self.kind, self.args, self.rows, self.total_steps, self.model, self.prompt_format)


def discard(folder: Path) -> None:
    """Remove a checkpoint. It loses its name first, so that a half removed one is not taken for a checkpoint."""
    nameless = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(nameless, ignore_errors=True)
    os.replace(folder, nameless)
    shutil.rmtree(nameless)
