"""The first stage of Latent-SFT: three training phases, and the soft labels of a data set (arXiv 2510.15522).

The encoder is trained with a frozen decoder, then the decoder with the frozen encoder, then both. Each phase starts
from what the phases before it have left, and trains new adapters if it has any.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import set_seed

from latent_grpo.architecture import check_context, check_length, check_own_masks
from latent_grpo.config import PHASES, EncodeConfig
from latent_grpo.errors import ConfigError, require
from latent_grpo.model import check_vocabulary, embedding_table, end_marker_ids, load_model, with_chosen_dtype
from latent_grpo.parallel.fsdp import call_inside
from latent_grpo.parallel.process_group import all_gather, on_rank_zero, rank, world_size
from latent_grpo.prompts import PromptFormat, resolve_format
from latent_grpo.saving.atomic_files import replaced_whole, write_json
from latent_grpo.saving.integrity import AUTO
from latent_grpo.saving.model_files import save_model
from latent_grpo.saving.run_identity import FREE_OPTIONS
from latent_grpo.sft.chain_model import ChainModel
from latent_grpo.sft.examples import check_examples, with_chains
from latent_grpo.sft.loop import Term, UpdateLoop
from latent_grpo.sft.pieces import ChainExample, chain_batch, chain_example, chain_examples, encoder_rows
from latent_grpo.sft.soft_labels import SoftLabels, hashed_prompts, join_rows, read_soft_labels, write_soft_labels
from latent_grpo.watching.metrics import progress_bar

TRAINED = {"encoder": ("encoder",), "decoder": ("decoder",), "union": ("encoder", "decoder"), "labels": ()}
# The phase that leaves the encoder and the decoder with which a phase starts. None: the base model.
SOURCES: dict[str, tuple[str | None, str | None]] = {
    "encoder": (None, None),
    "decoder": ("encoder", None),
    "union": ("encoder", "decoder"),
    "labels": ("union", "union"),
}
LABEL_FILE, FINISHED_FILE, COMPRESS_FILE = "soft_labels.safetensors", "finished.json", "compress_token.safetensors"


def encode(args: EncodeConfig, rows: Sequence[Any], tokenizer: Any) -> dict[str, dict[str, float]]:
    """Run `args.phases` and return the metrics of the last step of each training phase.

    A phase writes to a folder of its name in `args.output_dir`: checkpoints, metrics, and the finished parts as model
    folders `encoder` and `decoder`. Labels go to `soft_labels.safetensors`. To resume, skip the finished phases.
    Collective: every rank must call it.

    Raises:
        ConfigError, ModelError, DataError: an option, model or data set cannot be used; one line with the remedy.
    """
    choice = str(args.resume_from_checkpoint or "")
    words = ("", "true", AUTO)
    require(choice.lower() in words, "resume_from_checkpoint", choice, "give true or auto: phases resume their newest")
    prompt_format = resolve_format(args, args.model_name_or_path)
    args = with_chosen_dtype(args)  # finished phases are compared with what "auto" stands for here
    rows = with_chains(rows, args.missing_chains)
    finished = [phase for phase in args.phases if choice and has_finished(args, phase)]
    if "labels" in args.phases and has_labels(args, rows, tokenizer, prompt_format, resumed=bool(choice)):
        finished.append("labels")
    results = {}
    for phase in PHASES:
        if phase not in args.phases or phase in finished:
            continue
        if phase == "labels":
            write_labels(args, rows, tokenizer, prompt_format)
        else:
            results[phase] = train_phase(phase, args, rows, tokenizer, prompt_format, resumed=bool(choice))
    return results


def has_finished(args: EncodeConfig, phase: str) -> bool:
    """Return whether a training phase has finished. Raise ConfigError if it did with other options than `args`."""
    path = Path(args.output_dir) / phase / FINISHED_FILE
    if not path.exists():
        return False
    own, written = asdict(args), json.loads(path.read_text("utf-8")).get("options", {})
    for name in sorted(written.keys() & own.keys() - FREE_OPTIONS):
        same = written[name] == own[name]
        require(same, name, own[name], f"{phase} has finished with {written[name]!r}; give that, or another output_dir")
    return True


def has_labels(
    args: EncodeConfig, rows: Sequence[Any], tokenizer: Any, prompt_format: PromptFormat, *, resumed: bool
) -> bool:
    """Return whether a resumed run has written its labels already.

    Raises:
        ConfigError: the file of labels is there, and this run does not resume the one that wrote it.
    """
    path = Path(args.output_dir) / LABEL_FILE
    if not path.exists():
        return False
    remedy = "move it away, or leave labels out of --phases"
    require(resumed, "output_dir", args.output_dir, f"it holds {LABEL_FILE} already; {remedy}")
    labels = read_soft_labels(str(path))
    own = (args.label_size, args.compression, hashed_prompts(tokenizer, rows, prompt_format))
    same = own == (labels.probs.shape[1], labels.compression, labels.prompts)
    require(same, "output_dir", args.output_dir, f"its {LABEL_FILE} is of other data or options; {remedy}")
    return True


def train_phase(
    phase: str, args: EncodeConfig, rows: Sequence[Any], tokenizer: Any, prompt_format: PromptFormat, *, resumed: bool
) -> dict[str, float]:
    """Train one phase in its folder, from its newest checkpoint if it is `resumed` and has one. Return its metrics.

    The models of the phase are freed when the function returns.
    """
    folder = Path(args.output_dir) / phase
    own = replace(args, output_dir=str(folder), resume_from_checkpoint=None)
    trainer = Phase(phase, load_parts(args, phase), own, rows, tokenizer, prompt_format)
    return trainer.train(AUTO if resumed else None)


def load_parts(args: EncodeConfig, phase: str) -> ChainModel:
    """Return the module of a phase: the encoder and the decoder with which it starts.

    Raises:
        ConfigError: a phase that it needs has not finished.
    """
    folders = []
    for part, source in zip(("encoder", "decoder"), SOURCES[phase], strict=True):
        run = Path(args.output_dir) / str(source)
        if source and not (run / FINISHED_FILE).exists():
            raise ConfigError(f"phases is {args.phases!r}: {phase} needs {str(run)!r} finished; add {source}")
        folders.append(str(run / part) if source else args.model_name_or_path)
    encoder, decoder = (load_model(folder, args.dtype, args.device) for folder in folders)
    size = len(embedding_table(decoder))
    require(args.label_size <= size, "label_size", args.label_size, f"the vocabulary has {size} tokens")
    compress = Path(folders[0]) / COMPRESS_FILE
    token = load_file(compress)["compress_token"].to(encoder.device) if SOURCES[phase][0] else None
    set_seed(args.seed)  # new adapters start from random values
    return ChainModel(encoder, decoder, token, TRAINED[phase], args)


class Phase(UpdateLoop):
    """One training phase of the first stage.

    The loss is the cross-entropy of the chain tokens behind a latent step and of the text, averaged over the tokens of
    an update. The metrics have, on held-out rows, the share of chain tokens that the decoder predicts (`read_back`) and
    the share of rows whose text it predicts (`read_answers`), each token from the true ones before it.

    Raises:
        ConfigError, DataError: an option or the data set cannot be used; one line with the remedy.
    """

    args: EncodeConfig

    def __init__(
        self,
        phase: str,
        model: ChainModel,
        args: EncodeConfig,
        rows: Sequence[Any],
        tokenizer: Any,
        prompt_format: PromptFormat,
    ) -> None:
        self.phase = self.label = phase
        (lengths,) = check_vocabulary(model.decoder, tokenizer, prompt_format, True, rows)
        check_context(model.decoder.config, {"dataset": lengths}, args.max_prompt_length)
        examples, count = chain_examples(tokenizer, rows, args, prompt_format), args.read_back_rows
        check_examples(tokenizer, examples, len(embedding_table(model.decoder)))
        longest = max(max(len(encoder_rows(example)[0]), example.length) for example in examples)
        for check in (check_length, check_own_masks):
            check(model.decoder.config, longest)
        fitting = f"{len(examples)} rows fit the limits of length; give fewer, so that some are trained on"
        require(count < len(examples), "read_back_rows", count, fitting)
        held_out = {number * len(examples) // count for number in range(count)}
        self.held_out = [examples[number] for number in sorted(held_out)]
        kept = [example for number, example in enumerate(examples) if number not in held_out]
        super().__init__(model, args, kept, tokenizer, prompt_format, rows, None)

    def train(self, resume_from_checkpoint: str | bool | None = None) -> dict[str, float]:
        """Train to the last step, write the trained parts, and return the metrics of the last step.

        resume_from_checkpoint: a checkpoint folder of this run, True for its newest one, "auto" to start or continue.
        """
        return self.run(resume_from_checkpoint)

    def finish(self, values: dict[str, float]) -> None:
        """Write the trained parts, and that the phase has finished."""
        for part in TRAINED[self.phase]:
            full = getattr(self.full_model, part, None)
            save_model(self.output_dir / part, full, self.tokenizer, self.prompt_format)
        on_rank_zero(lambda: self.write_last_files(values))

    def write_last_files(self, values: dict[str, float]) -> None:
        """Write the compress token, and the file that says that the phase has finished."""
        if "encoder" in TRAINED[self.phase]:
            token = self.full_model.compress_token.detach().cpu()
            with replaced_whole(self.output_dir / "encoder" / COMPRESS_FILE) as partial:
                save_file({"compress_token": token}, partial)
        write_json(self.output_dir / FINISHED_FILE, {"step": self.step, **values, "options": asdict(self.args)})

    def terms(self, chosen: Sequence[ChainExample]) -> list[Term]:
        """Return the only term, the mean over the tokens with a loss."""
        return [Term("loss", 1.0, sum(example.targets for example in chosen))]

    def term_sums(self, examples: Sequence[ChainExample]) -> list[Tensor]:
        """Return the sum of the term over a micro-batch."""
        return [self.model.loss(chain_batch(examples, self.model.device))]

    def measures(self) -> dict[str, float]:
        """Return what the decoder reads of the held-out rows, after the first step and every `read_back_steps`."""
        if self.step % self.args.read_back_steps and self.step not in (1, self.total_steps):
            return {}
        tokens = right = answers = 0
        self.model.eval()
        for examples in chunks(self.held_out, self.args.per_device_train_batch_size):
            batch = chain_batch(examples, self.model.device)
            found = call_inside(self.model, self.model.right, batch)
            tokens += int(batch.piece.sum())
            right += int((found & batch.piece).sum())
            answers += int((found | batch.piece | ~batch.target).all(-1).sum())
        self.model.train()
        return {"latent/read_back": right / max(1, tokens), "latent/read_answers": answers / len(self.held_out)}


def write_labels(args: EncodeConfig, rows: Sequence[Any], tokenizer: Any, prompt_format: PromptFormat) -> None:
    """Write the soft labels of all rows, from the models of the phase `union`. Collective: every rank must call it."""
    labels = label_rows(load_parts(args, "labels"), args, rows, tokenizer, prompt_format)
    on_rank_zero(lambda: write_soft_labels(Path(args.output_dir) / LABEL_FILE, labels))


def chunks(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Return `items` cut into chunks of `size`, of which the last may be smaller."""
    return [items[start : start + size] for start in range(0, len(items), size)]


@torch.no_grad()
def label_rows(
    model: ChainModel, args: EncodeConfig, rows: Sequence[Any], tokenizer: Any, prompt_format: PromptFormat
) -> SoftLabels:
    """Return the soft labels of all rows, whatever their length. Each rank computes its share.

    Raises:
        DataError: a row has no chain of thought.
    """
    model.eval()
    own: list[tuple[int, Tensor, Tensor]] = []
    given = (args, prompt_format, end_marker_ids(tokenizer, prompt_format.end_marker))
    parts = chunks(range(rank(), len(rows), world_size()), args.per_device_train_batch_size)
    with progress_bar("labels ", len(parts)) as bar:
        for numbers in parts:
            examples = [chain_example(tokenizer, rows[n], n + 1, *given) for n in numbers]
            batch = chain_batch(examples, model.device)
            labels, steps = model.soft_labels(batch), batch.cut.sum(-1).tolist()
            own += zip(numbers, *(tensor.cpu().split(steps) for tensor in labels), strict=True)
            bar.advance()
    every = sorted(all_gather(own), key=lambda row: row[0])
    return replace(
        join_rows([(probs, ids) for _, probs, ids in every], args.output_dir),
        compression=args.compression,
        vocabulary=len(embedding_table(model.decoder)),
        prompts=hashed_prompts(tokenizer, rows, prompt_format),
    )
