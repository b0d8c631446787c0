"""Checkpoints: an ordinary Hugging Face model folder, plus what a run needs to go on. Written whole or not at all.

A checkpoint is written beside its final name, flushed to the disk and renamed, so that a run killed at any moment
leaves complete ones only. It is resumed only by the run that wrote it: same options, data and parameters, every file
whole. The optimizer's tensors are in a folder of safetensors to which every rank writes its part; any number of ranks
resumes.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from latent_grpo.config import ConfigError, RunOptions
from latent_grpo.model import first_line, load_model
from latent_grpo.parallel.fsdp import assign, copy_to_full
from latent_grpo.parallel.process_group import all_gather, on_rank_zero, rank, world_size
from latent_grpo.saving.atomic import flush
from latent_grpo.saving.tensor_shards import read_shards, write_shards
from latent_grpo.update.lora import has_adapters, merged_model, read_adapters, write_adapters
from latent_grpo.update.optimizer import Updater

STATE_FILE, TENSOR_FILE, SHARDS = "trainer_state.json", "trainer_state.pt", "optimizer"
FINGERPRINT_ROWS = 1000

# Options that do not reach the parameters, or whose effect is compared as such: the rows, the length of a schedule, the
# size of an update.
FREE_OPTIONS = frozenset(
    {
        "output_dir", "resume_from_checkpoint", "save_steps", "save_total_limit", "logging_steps", "report_to",
        "project", "run_name", "log_table", "log_completions", "num_completions_to_print", "device",
        "max_steps", "num_train_epochs",
        "dataset", "dataset_split", "prompt_column", "answer_column", "chain_column", "limit",
        "per_device_train_batch_size", "gradient_accumulation_steps",
    }
)  # fmt: skip


class Checkpoints:
    """Writes and resumes the checkpoints of one run in `args.output_dir`.

    kind: name of the training phase, which its checkpoints carry. whole: what `shard` made of the model. rows: the
    training data. total_steps: of the schedule. All ranks call its methods.
    """

    def __init__(
        self, kind: str, args: RunOptions, model: Any, whole: Any, tokenizer: Any, updater: Updater,
        rows: Sequence[Any], total_steps: int,
    ) -> None:  # fmt: skip
        self.kind, self.args, self.model, self.whole, self.tokenizer = kind, args, model, whole, tokenizer
        self.updater, self.rows, self.total_steps = updater, rows, total_steps
        self.output_dir = Path(args.output_dir)

    def save(self, step: int, position: dict[str, Any], history: list[dict[str, Any]]) -> Path:
        """Write `checkpoint-STEP` and remove the oldest beyond `save_total_limit`.

        position: where the trainer stands in its data and streams (numbers, lists, tensors). history: metrics so far.
        """
        final, partial = self.output_dir / f"checkpoint-{step}", self.output_dir / f".checkpoint-{step}.partial"
        on_rank_zero(lambda: self.clear(partial))
        write_shards(partial / SHARDS, self.updater.tensors())
        copy_to_full(self.whole, self.model)
        tensors = {"updater": self.updater.state_dict(), "random": all_gather([random_state()]), "position": position}
        on_rank_zero(lambda: self.finish(final, partial, tensors, {"step": step, "log_history": history}))
        return final

    def clear(self, partial: Path) -> None:
        """An empty folder for a new checkpoint, and none of a killed run's."""
        for leftover in self.output_dir.glob(".checkpoint-*"):
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)

    def finish(self, final: Path, partial: Path, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        """Write what rank 0 writes, and give the checkpoint its name once it is on the disk."""
        write_model(partial, self.whole, self.tokenizer)
        torch.save(tensors, partial / TENSOR_FILE)
        files = {str(path.relative_to(partial)): path.stat().st_size for path in files_in(partial)}
        (partial / STATE_FILE).write_text(json.dumps({**state, **self.identity(), "files": files}, indent=1))
        for path in (*files_in(partial), partial / SHARDS, partial):
            flush(path)
        if final.exists():
            discard(final)
        os.replace(partial, final)
        flush(self.output_dir)
        if self.args.save_total_limit is not None:
            older = [folder for folder in checkpoints_in(self.output_dir) if step_of(folder) <= state["step"]]
            for folder in older[: -self.args.save_total_limit]:
                discard(folder)

    def resume(self, choice: str | bool) -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
        """Model, optimizer, schedule and random streams as they were; the step, `position` and `history` of `save`.

        choice: a checkpoint folder, or true for the newest in `output_dir`. ConfigError, with nothing written, for one
        that is missing, torn, or of another run.
        """
        folder = on_rank_zero(lambda: find_checkpoint(self.output_dir, choice))
        state = read_state(folder)
        self.check_own(folder, state)
        if folder.resolve().parent != self.output_dir.resolve() and (self.output_dir / "metrics.jsonl").exists():
            raise ConfigError(
                f"output_dir {str(self.output_dir)!r} holds another run than {str(folder)!r}; choose another"
            )
        try:
            tensors = torch.load(folder / TENSOR_FILE, weights_only=True, map_location="cpu")
            read_model(folder, self.model)
            self.updater.load(tensors["updater"], read_shards(folder / SHARDS, self.updater.empty))
        except Exception as error:
            raise ConfigError(
                f"checkpoint {str(folder)!r} cannot be read ({first_line(error)}); choose another"
            ) from error
        copy_to_full(self.whole, self.model, frozen=True)
        if rank() < len(tensors["random"]):  # beyond that a rank keeps the streams that it starts with
            set_random_state(tensors["random"][rank()])
        return state["step"], tensors["position"], state["log_history"]

    def identity(self) -> dict[str, Any]:
        """What makes a checkpoint this run's own, as JSON holds it."""
        values = {
            "kind": self.kind,
            "options": asdict(self.args),
            "update_size": self.args.update_size(world_size()),
            "total_steps": self.total_steps,
            "data": fingerprint(self.rows),
            "parameters": {name: list(p.shape) for name, p in self.model.named_parameters()},
        }
        return dict(json.loads(json.dumps(values)))

    def check_own(self, folder: Path, state: dict[str, Any]) -> None:
        """ConfigError naming the first thing in which the checkpoint's run differs from this one."""
        own, where = self.identity(), f"checkpoint {str(folder)!r}"
        remedy = "resume with what it was written with, or start anew in another output_dir"
        if state["kind"] != own["kind"]:
            raise ConfigError(f"{where} is of {state['kind']!r} training, this is {own['kind']!r}; choose another")
        saved, given = state["options"], own["options"]
        for name in sorted(saved.keys() & given.keys() - FREE_OPTIONS):
            if saved[name] != given[name] and not name.startswith("eval_"):
                raise ConfigError(
                    f"{where} was written with {name} {saved[name]!r}, this run has {given[name]!r}; {remedy}"
                )
        if state["update_size"] != own["update_size"]:
            raise ConfigError(
                f"{where} was written with updates of {state['update_size']} (per_device_train_batch_size times "
                f"gradient_accumulation_steps times processes), this run has {own['update_size']}; {remedy}"
            )
        if state["total_steps"] != own["total_steps"] and not self.args.lr_scheduler_type.startswith("constant"):
            steps = f"{state['total_steps']} steps, this one goes over {own['total_steps']}"
            raise ConfigError(f"{where}: its {self.args.lr_scheduler_type} schedule went over {steps}; {remedy}")
        if state["data"] != own["data"]:
            raise ConfigError(f"{where} was written with other training data; {remedy}")
        for name in sorted(state["parameters"].keys() | own["parameters"].keys()):
            then, now = state["parameters"].get(name), own["parameters"].get(name)
            if then != now:
                raise ConfigError(f"{where} is of another model: {name} is {then} there and {now} here; {remedy}")


def write_model(folder: Path, model: Any, tokenizer: Any) -> None:
    """Write model (safetensors; of a model with adapters only these) and tokenizer as `from_pretrained` reads them."""
    transformers_logging.disable_progress_bar()  # its bar would break into the run's own
    if has_adapters(model):
        write_adapters(folder, model)
    else:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def read_model(folder: Path, model: Any) -> None:
    """The parameters of `write_model` into `model`, which has them all."""
    if has_adapters(model):
        read_adapters(folder, model)
        return
    dtype = str(model.dtype).removeprefix("torch.")
    saved = dict(load_model(str(folder), dtype, str(model.device)).named_parameters())
    for name, parameter in model.named_parameters():
        assign(parameter, saved[name])


def save_model(folder: Path, model: Any, tokenizer: Any) -> None:
    """`write_model` on rank 0, adapters merged, into a folder that holds other files too; the weights come last, and
    each file whole."""
    on_rank_zero(lambda: _save_model(folder, model, tokenizer))


def _save_model(folder: Path, model: Any, tokenizer: Any) -> None:
    model = merged_model(model) if has_adapters(model) else model
    partial = folder / ".model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    write_model(partial, model, tokenizer)
    for path in sorted(partial.iterdir(), key=lambda path: "safetensors" in path.name):
        flush(path)
        os.replace(path, folder / path.name)
    partial.rmdir()
    flush(folder)


def files_in(folder: Path) -> list[Path]:
    """All files below a folder, in order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def discard(folder: Path) -> None:
    """Remove a checkpoint; it loses its name first, so that a half removed one is none."""
    nameless = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(nameless, ignore_errors=True)
    os.replace(folder, nameless)
    shutil.rmtree(nameless)


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name; -1 where it is no such name."""
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match[1]) if match else -1


def checkpoints_in(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((p for p in output_dir.glob("checkpoint-*") if step_of(p) >= 0), key=step_of)


def find_checkpoint(output_dir: Path, choice: str | bool) -> Path:
    """The folder to resume from: `choice` itself, or the newest in `output_dir` for true. ConfigError if it is none."""
    if choice is True or str(choice).lower() == "true":
        found = checkpoints_in(output_dir)
        if not found:
            raise ConfigError(f"no checkpoint to resume from in {str(output_dir)!r}")
        return found[-1]
    folder = Path(str(choice))
    if not (folder / STATE_FILE).is_file():
        raise ConfigError(f"{str(folder)!r} is not a checkpoint: it has no {STATE_FILE}")
    return folder


def read_state(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint; ConfigError unless it and every file it lists are whole."""
    where, others = f"checkpoint {str(folder)!r}", [str(p) for p in checkpoints_in(folder.parent) if p != folder]
    remedy = f"choose another, as {others[-1]!r}" if others else "start anew in another output_dir"
    try:
        state = json.loads((folder / STATE_FILE).read_text())
        files = {name: int(size) for name, size in state["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{where}: {STATE_FILE} cannot be read ({type(error).__name__}); {remedy}") from error
    for name, size in files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes of {size}"
            raise ConfigError(f"{where} is torn: {name} {what}; {remedy}")
    return dict(state)


def fingerprint(rows: Sequence[Any]) -> str:
    """Number of rows and a hash over up to FINGERPRINT_ROWS of them."""
    digest = hashlib.sha256()
    for i in range(0, len(rows), -(-len(rows) // FINGERPRINT_ROWS)):
        digest.update(json.dumps(dict(rows[i]), sort_keys=True, default=str).encode())
    return f"{len(rows)} rows, sha256 {digest.hexdigest()}"


def random_state() -> dict[str, Any]:
    """State of every global random stream: rewards and dropout may draw from them. Loads with weights_only."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """The inverse of `random_state`."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    for device, device_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(device_state, device)


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
