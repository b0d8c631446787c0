"""The trainer of the warm start, and a measure of what a warm model reads out of its latent steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import set_seed

from latent_grpo.config import LatentSFTConfig
from latent_grpo.model import body, check_vocabulary, embedding_table, lm_head, positions
from latent_grpo.parallel.fsdp import call_inside, copy_to_full, shard
from latent_grpo.parallel.process_group import all_reduce_max, all_reduce_sum, rank, world_size
from latent_grpo.parallel.work_split import pad_to_count, snake_draft
from latent_grpo.prompts import resolve_format
from latent_grpo.saving.checkpoint import Checkpoints
from latent_grpo.saving.interrupt import graceful_interrupt
from latent_grpo.saving.model_files import save_model
from latent_grpo.seeds import rank_seed
from latent_grpo.sft.examples import Example, build_examples, check_examples, collate
from latent_grpo.sft.inputs import input_mixtures
from latent_grpo.sft.loss import batch_loss
from latent_grpo.update.lora import add_adapters
from latent_grpo.update.optimizer import Updater
from latent_grpo.watching.metrics import Metrics, progress_bar


class LatentSFTTrainer:
    """Train the warm start: a model that reasons in latent steps, which Latent-GRPO then improves.

    With several processes, make the trainer and call its methods on every rank, within `latent_grpo.process_group()`.

    Args:
        model: a Hugging Face causal LM, which is trained in place.
        args: the options.
        train_dataset: rows (dicts, or a `datasets.Dataset`) with `prompt`, `chain` and `answer`.
        processing_class: the tokenizer.

    Attributes:
        full_model: the model that is saved. With one process it is `model`; with several, a copy on rank 0's CPU.
        prompt_format: how prompts are put to the model; saved with it.
        step: number of finished optimizer steps.

    Raises:
        ConfigError, ModelError, DataError: an option, model or data set cannot be used; one line with the remedy.
    """

    def __init__(self, model: Any, args: LatentSFTConfig, train_dataset: Sequence[Any], processing_class: Any) -> None:
        set_seed(args.seed)  # new adapters start from random values
        self.model, self.args, self.tokenizer = model, args, processing_class
        self.output_dir = Path(args.output_dir)
        self.prompt_format = resolve_format(args, args.model_name_or_path)
        check_vocabulary(model, processing_class, self.prompt_format, latent=True)
        self.examples = build_examples(processing_class, train_dataset, args, self.prompt_format)
        check_examples(processing_class, self.examples, len(embedding_table(model)))
        self.batch_rows = args.update_size(world_size())
        epochs_of_steps = round(args.num_train_epochs * len(self.examples) / self.batch_rows)
        self.total_steps = args.max_steps if args.max_steps > 0 else max(1, epochs_of_steps)
        if args.use_peft:
            add_adapters(model, args)
        self.full_model = shard(model, sampling=False)
        self.updater = Updater(model, args, self.total_steps, args.freeze_embeddings)
        written = (args, model, self.full_model, processing_class, self.prompt_format)
        self.checkpoints = Checkpoints("sft", *written, self.updater, train_dataset, self.total_steps)
        set_seed(rank_seed(args.seed, rank()))  # dropout draws
        self.generator = torch.Generator().manual_seed(args.seed)
        self.queue: list[int] = []  # indices of the next examples
        self.step = 0
        self.metrics: Metrics

    def train(self, resume_from_checkpoint: str | bool | None = None) -> dict[str, float]:
        """Train to the last step, write the model to `output_dir`, and return the metrics of the last step.

        Args:
            resume_from_checkpoint: a checkpoint folder of this run, or True for the newest one in `output_dir`.
                Default: `args.resume_from_checkpoint`.

        Raises:
            ConfigError: the checkpoint is missing, torn or of another run, or a new run would overwrite an old one.
            KeyboardInterrupt: after SIGINT. The step at hand is finished and a checkpoint is written first.
        """
        args = self.args
        choice = args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        history = self.resume(choice) if choice else None
        self.metrics = Metrics(args, history)
        values: dict[str, float] = dict(history[-1]) if history else {}
        self.model.train()
        with graceful_interrupt() as interrupt, progress_bar("Latent-SFT ", self.total_steps, self.step) as bar:
            while self.step < self.total_steps:
                values = self.update(self.next_examples())
                self.step += 1
                if self.step % args.logging_steps == 0:
                    self.metrics.write({"phase": "sft", "step": self.step, **values})
                bar.advance(f"loss {values['loss']:.3f}")
                # All ranks stop if one was interrupted: a checkpoint needs all of them.
                stop = bool(all_reduce_max(interrupt.requested))
                if stop or (args.save_steps and self.step % args.save_steps == 0):
                    self.save()
                if stop:
                    raise KeyboardInterrupt
        self.metrics.close()
        copy_to_full(self.full_model, self.model)
        save_model(self.output_dir, self.full_model, self.tokenizer, self.prompt_format)
        return values

    def save(self) -> Path:
        """Write `output_dir/checkpoint-STEP` and return its path. Collective: every rank must call it."""
        position = {"queue": self.queue, "generator": self.generator.get_state()}
        return self.checkpoints.save(self.step, position, self.metrics.history)

    def resume(self, choice: str | bool) -> list[dict[str, Any]]:
        """Restore a checkpoint of this run (`train` says which `choice` there is). Return its metrics so far."""
        self.step, position, history = self.checkpoints.resume(choice)
        self.queue = position["queue"]
        self.generator.set_state(position["generator"])
        return history

    def next_examples(self) -> list[int]:
        """Return the indices of the next step's examples. Every epoch has a new order; epochs follow without end."""
        while len(self.queue) < self.batch_rows:
            self.queue += torch.randperm(len(self.examples), generator=self.generator).tolist()
        indices, self.queue = self.queue[: self.batch_rows], self.queue[self.batch_rows :]
        return indices

    def update(self, indices: list[int]) -> dict[str, float]:
        """Take one optimizer step over the examples `indices`, and return its metrics.

        Collective: every rank must call it with the same indices; each computes its share, in micro-batches.
        """
        args, size = self.args, self.args.per_device_train_batch_size
        chosen = [self.examples[i] for i in indices]
        elements = sum(len(e.response) for e in chosen)
        share = snake_draft([len(e.prompt) + len(e.response) for e in chosen], world_size())[rank()]
        micro_batches = [[chosen[i] for i in share[start : start + size]] for start in range(0, len(share), size)]
        total = torch.zeros((), dtype=torch.float64)
        for examples, counts in pad_to_count(micro_batches, chosen[:1], all_reduce_max(len(micro_batches))):
            batch = collate(examples, self.model.device)
            # The factor makes the sums a mean over the elements of all ranks. A filler counts 0.
            loss = call_inside(self.model, batch_loss, self.model, batch, args, self.step) * (counts / elements)
            self.updater.backward(loss)
            total += float(loss.detach())
        learning_rate = self.updater.learning_rate  # of this step: `step` moves the schedule on
        return {"loss": float(all_reduce_sum(total)), "grad_norm": self.updater.step(), "learning_rate": learning_rate}


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
        embeds = input_mixtures(batch, embedding_table(model))
        hidden = body(model, embeds[:, :-1], batch.mask[:, :-1], positions(batch.mask[:, :-1]))
        predicted = F.linear(hidden, lm_head(model)).argmax(-1)
        text = batch.response[:, 1:] & ((batch.weights[:, 1:] > 0).sum(-1) == 1)
        right += int(((predicted == batch.ids[:, 1:, 0]) | ~text).all(-1).sum())
    return right / max(1, len(examples))
