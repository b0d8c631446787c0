"""The loop that both stages of the warm start share: updates over shuffled examples, metrics, checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

from latent_grpo.config import WarmStartOptions
from latent_grpo.parallel.fsdp import call_inside, copy_to_full, shard
from latent_grpo.parallel.process_group import all_reduce_max, all_reduce_sum, rank, world_size
from latent_grpo.parallel.work_split import pad_to_count, snake_draft
from latent_grpo.prompts import PromptFormat
from latent_grpo.saving.checkpoint import Checkpoints
from latent_grpo.saving.interrupt import stops
from latent_grpo.saving.run_folder import only_run_in
from latent_grpo.seeds import rank_seed
from latent_grpo.update.optimizer import Updater
from latent_grpo.watching.header import warm_start_header
from latent_grpo.watching.metrics import Metrics, progress_bar


@dataclass
class Term:
    """A part of the loss of an update: a sum over the examples, divided by how much of it the update has."""

    name: str
    weight: float
    count: int  # of the update's terms in all micro-batches of all ranks


class UpdateLoop(ABC):
    """Train `model` on examples, in updates of `args.update_size` of them.

    Collective: make it and call its methods on every rank, within `latent_grpo.process_group()`.

    Args:
        model: the module to train, which is sharded here.
        args: the options.
        examples: training examples with a `length`.
        tokenizer, prompt_format: the tokenizer and how prompts are put to the model; both are saved with it.
        rows: the training data, which identifies the run.
        freeze_embeddings: as of `Updater`.

    Attributes:
        full_model: the model that is saved. With one process it is `model`; with several, a copy on rank 0's CPU.
        step: number of finished optimizer steps.
    """

    phase = "sft"  # in metrics and checkpoints
    label = "warm start"  # of the progress bar

    def __init__(
        self,
        model: Any,
        args: WarmStartOptions,
        examples: Sequence[Any],
        tokenizer: Any,
        prompt_format: PromptFormat,
        rows: Sequence[Any],
        freeze_embeddings: bool | None,
    ) -> None:
        self.model, self.args, self.examples = model, args, examples
        self.tokenizer, self.prompt_format = tokenizer, prompt_format
        self.output_dir = Path(args.output_dir)
        self.batch_rows = args.update_size(world_size())
        epochs_of_steps = round(args.num_train_epochs * len(self.examples) / self.batch_rows)
        self.total_steps = args.max_steps if args.max_steps > 0 else max(1, epochs_of_steps)
        self.full_model = shard(model, sampling=False)
        self.updater = Updater(model, args, self.total_steps, freeze_embeddings)
        written = (args, model, self.full_model, tokenizer, prompt_format)
        self.checkpoints = Checkpoints(self.phase, *written, self.updater, rows, self.total_steps)
        set_seed(rank_seed(args.seed, rank()))  # dropout draws
        self.generator = torch.Generator().manual_seed(args.seed)
        self.queue: list[int] = []  # indices of the next examples
        self.step = 0
        self.metrics: Metrics

    @abstractmethod
    def terms(self, chosen: Sequence[Any]) -> list[Term]:
        """Return the terms of the loss of an update over the examples `chosen`."""

    @abstractmethod
    def term_sums(self, examples: Sequence[Any]) -> list[Tensor]:
        """Return the sum of each term over a micro-batch, 0-d float32 with gradients."""

    def measures(self) -> dict[str, float]:
        """Return further metrics of the step that was just taken. Collective."""
        return {}

    def run(self, resume_from_checkpoint: str | bool | None = None) -> dict[str, float]:
        """Train to the last step and return the metrics of the last step. Errors are those of the trainers' `train`."""
        args = self.args
        choice = args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        with only_run_in(self.output_dir), stops(args, self.checkpoints) as stop:
            history = self.resume(choice) if choice else None
            header = warm_start_header(args, self.label, self.model, len(self.examples), self.total_steps)
            self.metrics = Metrics(args, history, header)
            self.checkpoints.record()
            values: dict[str, float] = dict(history[-1]) if history else {}
            self.model.train()
            with progress_bar(f"{self.label} ", self.total_steps, self.step) as bar:
                while self.step < self.total_steps:
                    values = self.update(self.next_examples())
                    self.step += 1
                    values |= {"epoch": self.step * self.batch_rows / len(self.examples), **self.measures()}
                    if self.step % args.logging_steps == 0:
                        self.metrics.write({"phase": self.phase, "step": self.step, **values})
                    bar.advance(f"loss {values['loss']:.3f}")
                    self.checkpoints.mark(self.step, self.position(), self.metrics.history)
                    stop.after_step(self.step, self.save)
            self.metrics.close()
            copy_to_full(self.full_model, self.model)
            self.finish(values)
        return values

    @abstractmethod
    def finish(self, values: dict[str, float]) -> None:
        """Write what the run has trained. values: the metrics of its last step. Collective."""

    def position(self) -> dict[str, Any]:
        """Return where the trainer stands in its data, for a checkpoint."""
        return {"queue": list(self.queue), "generator": self.generator.get_state()}

    def save(self) -> Path:
        """Write `output_dir/checkpoint-STEP` and return its path. Collective: every rank must call it."""
        return self.checkpoints.save(self.step, self.position(), self.metrics.history)

    def resume(self, choice: str | bool) -> list[dict[str, Any]]:
        """Restore a checkpoint (`train` says which `choice` there is). Return its metrics so far; [] at the start."""
        self.step, position, history = self.checkpoints.resume(choice)
        if position:
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
        size = self.args.per_device_train_batch_size
        chosen = [self.examples[i] for i in indices]
        terms = self.terms(chosen)
        share = snake_draft([e.length for e in chosen], world_size())[rank()]
        micro_batches = [[chosen[i] for i in share[start : start + size]] for start in range(0, len(share), size)]
        totals = torch.zeros(len(terms), dtype=torch.float64)
        for examples, counts in pad_to_count(micro_batches, chosen[:1], all_reduce_max(len(micro_batches))):
            sums = call_inside(self.model, self.term_sums, examples)
            # The factors make the sums means over the update's terms of all ranks. A filler counts 0.
            means = [value * (counts / max(1, term.count)) for value, term in zip(sums, terms, strict=True)]
            loss = torch.stack([term.weight * mean for term, mean in zip(terms, means, strict=True)]).sum()
            self.updater.backward(loss)
            totals += torch.stack([mean.detach().double().cpu() for mean in means])
        means_of_update = all_reduce_sum(totals).tolist()
        learning_rate = self.updater.learning_rate  # of this step: `step` moves the schedule on
        return {
            **loss_metrics(terms, means_of_update),
            "grad_norm": self.updater.step(),
            "learning_rate": learning_rate,
        }


def loss_metrics(terms: Sequence[Term], means: Sequence[float]) -> dict[str, float]:
    """Return the loss of an update, and its terms by their names if there are several."""
    loss = sum(term.weight * mean for term, mean in zip(terms, means, strict=True))
    single = {term.name: mean for term, mean in zip(terms, means, strict=True)} if len(terms) > 1 else {}
    return {"loss": loss, **single}
