"""Soft labels: what the latent steps of every row of a data set should be, as K ids with their probabilities.

The file is a safetensors file. Rows have different numbers of steps, so the steps of all rows stand behind each other:

    probs [N, K] float32, ids [N, K] int32: N is the number of steps of all rows together
    offsets [R + 1] int64: the steps of row r are offsets[r] to offsets[r + 1]

Its metadata say what it was made with. The chunks of the released Latent-SFT code can be read too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from latent_grpo.errors import DataError, first_line
from latent_grpo.prompts import PromptFormat
from latent_grpo.saving.atomic_files import replaced_whole

KIND = "latent-grpo soft labels 1"  # a file of a later form gets another number
HASHED_ROWS = 1000  # prompts of a fingerprint at most, spread over the data set
CHUNK = re.compile(r"batch_(\d+)_(\d+)\.pt")


@dataclass
class SoftLabels:
    """The soft labels of R rows.

    `compression`, `vocabulary` and `prompts` are None where the source does not say what it was made with.
    """

    probs: Tensor  # [N, K] float32; each sums to 1
    ids: Tensor  # [N, K] int32
    offsets: Tensor  # [R + 1] int64
    compression: int | None = None  # chain tokens per step
    vocabulary: int | None = None  # rows of the embedding table
    prompts: str | None = None  # fingerprint of the prompts' ids

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, number: int) -> tuple[Tensor, Tensor]:
        """Return probabilities and ids [steps, K] of row `number`, counted from 0."""
        steps = slice(int(self.offsets[number]), int(self.offsets[number + 1]))
        return self.probs[steps], self.ids[steps]


def hashed_prompts(tokenizer: Any, rows: Sequence[Any], prompt_format: PromptFormat) -> str:
    """Return the number of rows with a hash of their prompts' ids, which depend on tokenizer and prompt format."""
    chosen = range(0, len(rows), max(1, -(-len(rows) // HASHED_ROWS)))
    ids = prompt_format.ids(tokenizer, [rows[number]["prompt"] for number in chosen])
    return f"{len(rows)} prompts, sha256 {hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]}"


def join_rows(rows: Sequence[tuple[Tensor, Tensor]], source: str) -> SoftLabels:
    """Return the labels of rows of probabilities and ids [steps, K] each. source: where they are from, for errors.

    Raises:
        DataError: a row has no step, another form or another K than the first.
    """
    for number, (probs, ids) in enumerate(rows, 1):
        if probs.ndim != 2 or probs.shape != ids.shape or probs.shape[1] != rows[0][0].shape[1]:
            raise DataError(
                f"{source}: row {number} has probabilities {list(probs.shape)} and ids {list(ids.shape)}, "
                f"not [steps, {rows[0][0].shape[-1]}] each; write the labels again"
            )
    lengths = torch.tensor([0, *(len(probs) for probs, _ in rows)])
    probs = torch.cat([probs for probs, _ in rows]).float()
    return SoftLabels(probs, torch.cat([ids for _, ids in rows]).int(), lengths.cumsum(0))


def write_soft_labels(path: Path, labels: SoftLabels) -> None:
    """Write labels to a file, which appears whole."""
    facts = {
        "kind": KIND,
        "rows": len(labels),
        "top_k": labels.probs.shape[1],
        "compression": labels.compression,
        "vocabulary": labels.vocabulary,
        "prompts": labels.prompts,
    }
    tensors = {name: getattr(labels, name).contiguous() for name in ("probs", "ids", "offsets")}
    with replaced_whole(path) as partial:
        save_file(tensors, partial, metadata={name: json.dumps(value) for name, value in facts.items()})


def read_soft_labels(source: str) -> SoftLabels:
    """Return the labels of a file of `write_soft_labels`, or of a folder of released chunks.

    Probabilities are scaled to sum to 1, since 16 bits round them.

    Raises:
        DataError: the source is missing, damaged or of another kind, or a label is not a distribution.
    """
    path = Path(source).expanduser()
    labels = _read_chunks(path) if path.is_dir() else _read_file(path)
    empty = (labels.offsets.diff() < 1).nonzero()
    if len(empty):
        raise DataError(
            f"{path}: row {int(empty[0]) + 1} has no latent step; remove the row and write the labels again"
        )
    total = labels.probs.sum(-1, keepdim=True)
    # `not` also catches NaN. Ten probabilities in 16 bits sum to 1 within a percent or two.
    if not ((labels.probs >= 0).all() and ((total - 1).abs() < 0.05).all()):
        raise DataError(f"{path}: a label's probabilities do not sum to 1; write the labels again")
    return replace(labels, probs=labels.probs / total)


def check_labels(labels: SoftLabels, source: str, rows: int, vocabulary: int, prompts: str) -> None:
    """Raise DataError unless the labels belong to a data set of `rows` rows and a model of that vocabulary.

    prompts: the fingerprint of the data set's prompts.
    """
    if len(labels) != rows:
        raise DataError(
            f"{source}: has labels of {len(labels)} rows, the data set has {rows}; "
            "give the data, split and limit that the labels were made from"
        )
    largest, smallest = int(labels.ids.max()), int(labels.ids.min())
    if largest >= vocabulary or smallest < 0:
        wrong = largest if largest >= vocabulary else smallest
        raise DataError(
            f"{source}: has the id {wrong}, the model has {vocabulary} tokens; make labels with its tokenizer"
        )
    if labels.prompts is not None and labels.prompts != prompts:
        raise DataError(
            f"{source}: was made from other prompts ({labels.prompts}; here {prompts}); "
            "give the same data in the same order, tokenizer and prompt format"
        )


def _read_file(path: Path) -> SoftLabels:
    remedy = "give the file that `latent-grpo encode` wrote, or a folder of batch_START_END.pt files"
    if not path.is_file():
        raise DataError(f"{path}: no such file of soft labels; {remedy}")
    try:
        with safe_open(str(path), framework="pt") as file:
            facts = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
            if facts.get("kind") != KIND:
                raise ValueError(f"it is of the kind {facts.get('kind')!r}, not {KIND!r}")
            tensors = {name: file.get_tensor(name) for name in ("probs", "ids", "offsets")}
            return SoftLabels(**tensors, **{name: facts[name] for name in ("compression", "vocabulary", "prompts")})
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: no soft labels can be read ({first_line(error)}); {remedy}") from error


def _read_chunks(folder: Path) -> SoftLabels:
    """Read the files `batch_START_END.pt` of the released code: lists of (probs, ids) [steps, K], in order of START."""
    named = [(CHUNK.fullmatch(path.name), path) for path in folder.iterdir()]
    chunks = sorted((int(match[1]), int(match[2]), path) for match, path in named if match)
    if not chunks:
        raise DataError(f"{folder}: has no files batch_START_END.pt; give their folder, or one .safetensors file")
    rows: list[tuple[Tensor, Tensor]] = []
    for start, end, path in chunks:
        if start != len(rows):
            raise DataError(
                f"{path}: starts at row {start}, the files before it end at {len(rows)}; add the missing one"
            )
        values = _load(path)
        if len(values) != end - start:
            raise DataError(f"{path}: holds {len(values)} rows, its name says {end - start}; write it again")
        rows += values
    return join_rows(rows, str(folder))


def _load(path: Path) -> list[tuple[Tensor, Tensor]]:
    try:
        values: Any = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:  # PyTorch's message advises to run the code
        reason = "it is damaged, or holds other objects, which may run code"
        raise DataError(f"{path}: cannot be read as tensors ({reason}); write it again") from error
    except Exception as error:  # a damaged file can raise anything, and PyTorch's message is a paragraph
        reason = first_line(error).split(". ")[0]
        raise DataError(f"{path}: cannot be read as tensors ({reason}); write it again") from error
    if not isinstance(values, list) or not all(_is_label(value) for value in values):
        raise DataError(f"{path}: is no list of (probabilities, ids); write it with the K highest, not the vocabulary")
    return [(probs, ids) for probs, ids in values]


def _is_label(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(part, Tensor) for part in value)
