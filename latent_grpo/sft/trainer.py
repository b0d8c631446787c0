"""The trainer of the warm start, and a measure of what a warm model reads out of its latent steps."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

from latent_grpo.architecture import check_context, check_length
from latent_grpo.config import LatentSFTConfig
from latent_grpo.data.rows import with_own_columns
from latent_grpo.decoding_proof import check_decoding
from latent_grpo.model import (
    body,
    check_vocabulary,
    embedding_table,
    end_marker_ids,
    head_of,
    positions,
)
from latent_grpo.parallel.process_group import all_reduce_sum
from latent_grpo.prompts import PromptFormat, require_rows, resolve_format
from latent_grpo.saving.model_files import check_saved_weights, save_model
from latent_grpo.sft.examples import Example, build_examples, check_examples, collate, with_chains
from latent_grpo.sft.inputs import ATTEMPTS, input_mixtures, perturbed_labels
from latent_grpo.sft.loop import Term, UpdateLoop
from latent_grpo.sft.loss import batch_loss, soft_label_losses
from latent_grpo.sft.soft_labels import SoftLabels, check_labels, hashed_prompts, read_soft_labels
from latent_grpo.update.lora import add_adapters


class LatentSFTTrainer(UpdateLoop):
    """Train the warm start: a model that reasons in latent steps, which Latent-GRPO then improves.

    With several processes, make the trainer and call its methods on every rank, within `latent_grpo.process_group()`.

    Args:
        model: a Hugging Face causal LM, which is trained in place.
        args: the options.
        train_dataset: rows (dicts, or a `datasets.Dataset`) with `prompt`, `chain` and `answer`. Soft labels replace
            the chain; so do a row's `latent_steps`, a list of texts, for latent steps.
        processing_class: the tokenizer.

    Attributes:
        full_model: the model that is saved. With one process it is `model`; with several, a copy on rank 0's CPU.
        prompt_format: how prompts are put to the model; saved with it.
        step: number of finished optimizer steps.

    Raises:
        ConfigError, ModelError, DataError: an option, model or data set cannot be used; one line with the remedy.
    """

    args: LatentSFTConfig

    def __init__(self, model: Any, args: LatentSFTConfig, train_dataset: Sequence[Any], processing_class: Any) -> None:
        check_decoding(model)
        check_saved_weights(model)
        set_seed(args.seed)  # new adapters start from random values
        (train_dataset,) = with_own_columns(args, train_dataset=train_dataset)
        require_rows("train_dataset", train_dataset)
        prompt_format = resolve_format(args, args.model_name_or_path or model.config._name_or_path)
        (lengths,) = check_vocabulary(model, processing_class, prompt_format, True, train_dataset)
        check_context(model.config, {"dataset": lengths}, args.max_prompt_length)
        # Soft labels are in place of chains, but are of the rows that `encode` kept.
        if args.targets == "uniform" or args.missing_chains == "drop":
            train_dataset = with_chains(train_dataset, args.missing_chains)
        data = (processing_class, train_dataset, args, prompt_format)
        examples = build_examples(*data, labels_of(model, *data) if args.soft_labels else None)
        check_examples(processing_class, examples, len(embedding_table(model)))
        check_length(model.config, max(len(example.prompt) + example.elements for example in examples))
        self.end_id = end_marker_ids(processing_class, prompt_format.end_marker)[0]
        self.failed, self.warned = 0, False  # rows of the step whose noise was drawn in vain
        if args.use_peft:
            add_adapters(model, args, args.lora_dropout)
        super().__init__(model, args, examples, processing_class, prompt_format, train_dataset, args.freeze_embeddings)

    def train(self, resume_from_checkpoint: str | bool | None = None) -> dict[str, float]:
        """Train to the last step, write the model to `output_dir`, and return the metrics of the last step.

        Args:
            resume_from_checkpoint: a checkpoint folder of this run, True for the newest one in `output_dir`, or "auto"
                to start or continue. Default: `args.resume_from_checkpoint`.

        Raises:
            ConfigError: the checkpoint is missing, damaged or of another run, or a new run would overwrite an old one.
            KeyboardInterrupt: after SIGINT or another signal. The step is finished and a checkpoint written first.
            SaveError, TrainingError: a file could not be written, or the numbers are no longer finite.
        """
        return self.run(resume_from_checkpoint)

    def finish(self, values: dict[str, float]) -> None:
        """Write the model."""
        save_model(self.output_dir, self.full_model, self.tokenizer, self.prompt_format)

    def terms(self, chosen: Sequence[Example]) -> list[Term]:
        """Return the mean over response elements; with soft labels, the means over text elements and over rows."""
        if self.args.targets == "uniform":
            return [Term("loss", 1.0, sum(example.elements for example in chosen))]
        text = sum(len(example.response) for example in chosen)
        return [Term("ce", self.args.ce_weight, text), Term("kl", self.args.kl_weight, len(chosen))]

    def term_sums(self, examples: Sequence[Example]) -> list[Tensor]:
        """Return the sum of each of `terms` over a micro-batch."""
        args, batch = self.args, collate(examples, self.model.device)
        if args.targets == "uniform":
            return [batch_loss(self.model, batch, args, self.step)]
        if args.gumbel_scale > 0:
            batch, failed = perturbed_labels(batch, args.gumbel_scale, args.seed, self.step, self.end_id)
            self.failed += failed
        return list(soft_label_losses(self.model, batch, args))

    def measures(self) -> dict[str, float]:
        """Return the share of rows that ATTEMPTS draws left with the end marker on top of a latent step. Collective."""
        if self.args.targets == "uniform" or self.args.gumbel_scale == 0:
            return {}
        share = float(all_reduce_sum(torch.tensor(self.failed))) / self.batch_rows
        if share and not self.warned:
            warnings.warn(
                f"{share:.0%} of the rows have the end marker on top of a latent step in each of {ATTEMPTS} draws of "
                "their noise; the last draw is used (metric latent/end_on_top)",
                stacklevel=2,
            )
        self.failed, self.warned = 0, self.warned or share > 0
        return {"latent/end_on_top": share}


def labels_of(
    model: Any, tokenizer: Any, rows: Sequence[Any], args: LatentSFTConfig, prompt_format: PromptFormat
) -> SoftLabels:
    """Return the soft labels of the rows. DataError if they cannot be read or do not belong to rows and model."""
    source = str(args.soft_labels)
    labels = read_soft_labels(source)
    check_labels(labels, source, len(rows), len(embedding_table(model)), hashed_prompts(tokenizer, rows, prompt_format))
    return labels


@torch.no_grad()
def gold_chain_accuracy(model: Any, examples: Sequence[Example], batch_size: int = 256) -> float:
    """Return the share of examples whose text the model predicts greedily, token by token, after the gold latents.

    The text is the end marker, the answer and EOS; every token of it must be right.
    """
    model.eval()
    right = 0
    for start in range(0, len(examples), batch_size):
        chosen = examples[start : start + batch_size]
        batch = collate(chosen, model.device)
        embeds = input_mixtures(batch, model)
        hidden = body(model, embeds[:, :-1], batch.mask[:, :-1], positions(batch.mask[:, :-1]))
        predicted = head_of(model).trained_logits(hidden).argmax(-1)
        text = batch.response[:, 1:] & ~batch.latent[:, 1:]
        right += int(((predicted == batch.ids[:, 1:, 0]) | ~text).all(-1).sum())
    return right / max(1, len(examples))
