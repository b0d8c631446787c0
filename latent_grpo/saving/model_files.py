"""Model folders in the Hugging Face layout: a model with its tokenizer, or only its LoRA adapters."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from transformers.utils import logging as transformers_logging

from latent_grpo.errors import ModelError, SaveError, TrainingError, first_line
from latent_grpo.model import load_model
from latent_grpo.model.finite import check_finite, first_not_finite
from latent_grpo.parallel.fsdp import assign
from latent_grpo.parallel.process_group import on_rank_zero
from latent_grpo.prompts import PromptFormat, write_format
from latent_grpo.saving.atomic_files import flush, usual_mode
from latent_grpo.saving.integrity import sha256_of
from latent_grpo.update.lora import ADAPTER, has_adapters, merged_model, read_adapters, write_adapters

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHTS = (SINGLE, INDEX)


@runtime_checkable
class OwnFiles(Protocol):
    """A module that is no single Hugging Face model, and writes and reads the files of a checkpoint itself."""

    def write_files(self, folder: Path) -> None:
        """Write what training changes into `folder`."""

    def read_files(self, folder: Path) -> None:
        """Read what `write_files` wrote. Collective: every rank must call it."""


def check_saved_weights(model: Any) -> None:
    """Raise ModelError unless a model that is read from saved files has all weights of this one, and ties no others.

    Files are read into a model that is made from the configuration. Nothing tells of a weight that this model lacks.
    Weights that are not finite are refused here too, because none are saved.
    """
    check_finite(model)
    with torch.device("meta"):
        plain = type(model)(model.config)
    plain.tie_weights()
    described = {name: parameter.shape for name, parameter in plain.named_parameters()}
    adapted = has_adapters(model)  # their layers are renamed; merged, they have the old names
    own = {
        name.replace(".base_layer.", ".") if adapted else name: parameter.shape
        for name, parameter in model.named_parameters()
        if not adapted or f".{ADAPTER}." not in name
    }
    if wrong := sorted(name for name in own.keys() | described.keys() if own.get(name) != described.get(name)):
        has, expected = (_described(shapes.get(wrong[0])) for shapes in (own, described))
        raise ModelError(
            f"{type(model).__name__} cannot be saved whole: it has {has} {wrong[0]!r}, but its configuration describes "
            f"{expected}; change the config, such as tie_word_embeddings, or use the class that has this weight"
        )


def _described(shape: torch.Size | None) -> str:
    return "no separate weight" if shape is None else f"a weight {list(shape)}"


def write_model(folder: Path, model: Any, tokenizer: Any, prompt_format: PromptFormat) -> None:
    """Write a model into a folder that `from_pretrained` reads, with its tokenizer and the format of its prompts.

    Of a model with adapters, only these are written.
    """
    transformers_logging.disable_progress_bar()  # it would break into the progress bar of the run
    if isinstance(model, OwnFiles):
        model.write_files(folder)
    elif has_adapters(model):
        write_adapters(folder, model)
    else:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_format(folder, prompt_format)


def read_model(folder: Path, model: Any) -> None:
    """Read the parameters that `write_model` wrote into `model`, sharded or not, which has all of them.

    With several processes, every rank must call it, because setting a sharded parameter is a collective.
    """
    if isinstance(model, OwnFiles):
        model.read_files(folder)
        return
    if has_adapters(model):
        read_adapters(folder, model)
        return
    dtype = str(model.dtype).removeprefix("torch.")
    saved = dict(load_model(str(folder), dtype, str(model.device)).named_parameters())
    for name, parameter in model.named_parameters():
        assign(parameter, saved[name])


def save_model(folder: Path, model: Any, tokenizer: Any, prompt_format: PromptFormat) -> None:
    """Write the finished model, with its adapters merged, into a folder that may hold other files.

    Collective: every rank must call it; rank 0 writes. A reader finds the old or the new weights, never some of each,
    and a folder with weights is complete.

    Raises:
        TrainingError: a weight is not finite. Nothing is written.
        SaveError: a file could not be written. What was written is removed.
    """
    on_rank_zero(lambda: _save_model(folder, model, tokenizer, prompt_format))


def _save_model(folder: Path, model: Any, tokenizer: Any, prompt_format: PromptFormat) -> None:
    if (name := first_not_finite(model.named_parameters())) is not None:
        remedy = "resume the last good checkpoint, if there is one, with a lower learning_rate or other data"
        raise TrainingError(f"{name!r} holds NaN or infinity, so no model is saved to {str(folder)!r}; {remedy}")
    model = merged_model(model) if has_adapters(model) else model
    partial = folder / ".model.partial"
    shutil.rmtree(partial, ignore_errors=True)  # a killed run may have left one
    try:
        write_model(partial, model, tokenizer, prompt_format)
        _name_by_content(partial)
        # Weights in one file, or the index of several, come last: they put the new model in place of the old one.
        for path in sorted(partial.iterdir(), key=lambda path: (path.name in WEIGHTS, "safetensors" in path.name)):
            path.chmod(usual_mode())
            flush(path)
            os.replace(path, folder / path.name)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the space
        remedy = "make room, and resume the newest checkpoint"
        raise SaveError(f"the model could not be written to {str(folder)!r} ({first_line(error)}); {remedy}") from error
    partial.rmdir()
    flush(folder)
    _remove_old_weights(folder)


def _name_by_content(folder: Path) -> None:
    """Give the files of weights in several files names of their own, so that old and new can stand side by side."""
    index = folder / INDEX
    if not index.exists():
        return
    content = json.loads(index.read_text(encoding="utf-8"))
    new = {
        old: f"{old.removesuffix('.safetensors')}-{sha256_of(folder / old)[:8]}.safetensors" for old in shards_of(index)
    }
    for old, name in new.items():
        os.replace(folder / old, folder / name)
    content["weight_map"] = {weight: new[old] for weight, old in content["weight_map"].items()}
    index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def shards_of(index: Path) -> set[str]:
    """Return the names of the files of weights in an index."""
    return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())


def _remove_old_weights(folder: Path) -> None:
    """Remove files of weights that the model in the folder does not have."""
    index, single = folder / INDEX, folder / SINGLE
    if index.exists() and single.exists():  # readers prefer the single file; the older of the two is the old model
        old = min(index, single, key=lambda path: path.stat().st_mtime_ns)
        old.unlink()
    kept = shards_of(index) if index.exists() else set()
    for path in folder.glob("model-*-of-*.safetensors"):
        if path.name not in kept:
            path.unlink()
