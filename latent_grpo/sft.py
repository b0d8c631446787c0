"""Latent-SFT, the warm start (arXiv 2510.15522): tokens of a chain of thought become targets of latent steps.

Each `compression` consecutive chain tokens give one latent target, the uniform distribution over them. Its input is the
mixture of their embeddings, perturbed by Gumbel noise if asked, as sampling will perturb it. Its loss is
KL(target || model). The end marker, the answer and EOS have the cross-entropy loss. The loss of an update is the mean
over the response elements of its examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import set_seed

from latent_grpo.config import LatentSFTConfig
from latent_grpo.errors import DataError
from latent_grpo.model import body, embedding_table, end_marker_ids, lm_head, positions, prompt_ids
from latent_grpo.parallel.fsdp import call_inside, copy_to_full, shard
from latent_grpo.parallel.process_group import all_reduce_max, all_reduce_sum, rank, world_size
from latent_grpo.parallel.work_split import pad_to_count, snake_draft
from latent_grpo.saving.checkpoint import Checkpoints
from latent_grpo.saving.interrupt import graceful_interrupt
from latent_grpo.saving.model_files import save_model
from latent_grpo.seeds import rank_seed
from latent_grpo.update.activation_checkpointing import recomputed
from latent_grpo.update.lora import add_adapters
from latent_grpo.update.optimizer import Updater
from latent_grpo.watching.metrics import Metrics, progress_bar
from latent_kernels import GUMBEL_HIGH, GUMBEL_LOW, philox_uniform

LOSS_CHUNK = 1024  # rows of logits that exist at a time
MOST_COMPONENTS = 2**12  # limit of `compression`; gives every component of an element its own noise stream


@dataclass
class Example:
    """One training text: the prompt's tokens, and the components of every response element (one id: a text token)."""

    prompt: list[int]
    response: list[list[int]]
    number: int = 0  # of the row in the data set; names the noise streams


@dataclass
class SFTBatch:
    """B examples padded to L elements of C components. Prompts are padded on the left, responses on the right."""

    ids: Tensor  # [B, L, C] int64, 0 in unused places
    weights: Tensor  # [B, L, C] float32, 0 in unused places; the weights of an element sum to 1
    mask: Tensor  # [B, L] int64, 0 on padding
    response: Tensor  # [B, L] bool, elements with a loss
    numbers: Tensor  # [B] int64, numbers of the examples


def build_example(tokenizer: Any, row: Any, args: LatentSFTConfig, marker: list[int], number: int) -> Example:
    """Return the tokens of a row with "prompt", "chain" and "answer". marker: ids of the end marker."""
    chain = tokenizer(row["chain"], add_special_tokens=False)["input_ids"]
    width = args.compression if args.latent else 1
    latents = [chain[i : i + width] for i in range(0, len(chain), width)]
    answer = tokenizer(args.answer_template.format(answer=row["answer"]), add_special_tokens=False)["input_ids"]
    text = [[token] for token in [*marker, *answer, tokenizer.eos_token_id]]
    return Example(prompt_ids(tokenizer, row["prompt"]), latents + text, number)


def build_examples(tokenizer: Any, rows: Sequence[Any], args: LatentSFTConfig) -> list[Example]:
    """Return an example of every row that fits the length limits.

    Raises:
        DataError: a row has no chain, or no row fits.
    """
    marker = end_marker_ids(tokenizer, args.end_marker)
    examples = []
    for number, row in enumerate(rows, 1):
        if not row.get("chain"):
            raise DataError(
                f"row {number} has no chain of thought; Latent-SFT needs one, name its column with --chain_column"
            )
        example = build_example(tokenizer, row, args, marker, number)
        fits_prompt = args.max_prompt_length is None or len(example.prompt) <= args.max_prompt_length
        if fits_prompt and len(example.response) <= args.max_completion_length:
            examples.append(example)
    if not examples:
        raise DataError("no row fits max_prompt_length and max_completion_length; raise them")
    return examples


def collate(examples: Sequence[Example], device: torch.device) -> SFTBatch:
    """Pad examples to one batch on `device`."""
    prompt_width = max(len(e.prompt) for e in examples)
    response_width = max(len(e.response) for e in examples)
    components = max(len(element) for e in examples for element in e.response)
    empty = [0] * components
    ids, weights = [], []
    for example in examples:
        elements = [[i] for i in example.prompt] + example.response
        left = [empty] * (prompt_width - len(example.prompt))
        right = [empty] * (response_width - len(example.response))
        padding = [[0] * (components - len(e)) for e in elements]
        ids.append([*left, *(e + p for e, p in zip(elements, padding, strict=True)), *right])
        shares = [[1.0 / len(e)] * len(e) + [0.0] * len(p) for e, p in zip(elements, padding, strict=True)]
        weights.append([*left, *shares, *right])
    weight = torch.tensor(weights, dtype=torch.float32)
    mask = weight.sum(-1) > 0
    response = mask & (torch.arange(prompt_width + response_width) >= prompt_width)
    numbers = torch.tensor([example.number for example in examples])
    return SFTBatch(*(x.to(device) for x in (torch.tensor(ids), weight, mask.long(), response, numbers)))


def input_mixtures(batch: SFTBatch, table: Tensor, gumbel_scale: float = 0.0, seed: int = 0, step: int = 0) -> Tensor:
    """Return the input embeddings [B, L, D] in the dtype of `table` [V, D]: the mixtures of the targets.

    With `gumbel_scale`, the weights of latent elements get Gumbel noise of (seed, step), times the scale.
    """
    weights = batch.weights
    if gumbel_scale > 0:
        noise = gumbel_noise(batch, seed, step) * gumbel_scale
        # Unused components have the logit -inf. An element of padding has only such logits, whose softmax is NaN.
        perturbed = (weights.log() + noise).nan_to_num(neginf=-torch.inf).softmax(-1).nan_to_num(0.0)
        weights = torch.where((weights > 0).sum(-1, keepdim=True) > 1, perturbed, weights)
    # F.embedding instead of indexing: its gradient adds up in one order, whatever the number of threads.
    return (weights.unsqueeze(-1) * F.embedding(batch.ids, table).float()).sum(2).to(table.dtype)


def gumbel_noise(batch: SFTBatch, seed: int, step: int) -> Tensor:
    """Return clamped Gumbel noise [B, L, C] float32, in [-1.5, 3], as for the latent steps of a rollout.

    It is a function of (seed, step, number of the example, position in the response, component), so it does not depend
    on the other examples of the batch.
    """
    _, elements, components = batch.ids.shape
    # All responses of a batch start at one position; the longest one reaches the end.
    start = elements - int(batch.response.sum(-1).max())
    position = (torch.arange(elements, device=batch.ids.device) - start).clamp_min(0)
    within_example = position.unsqueeze(-1) * MOST_COMPONENTS + torch.arange(components, device=position.device)
    streams = batch.numbers.view(-1, 1, 1) * 2**32 + within_example
    draws = philox_uniform(streams.flatten(), seed=seed, step=step).view(streams.shape)
    return (-torch.log(-torch.log(draws))).clamp(GUMBEL_LOW, GUMBEL_HIGH).float()


def target_loss(hidden: Tensor, head: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Return the sum over rows of KL(target || model), 0-d float32. For a target of one token it is the cross-entropy.

    hidden [N, D], head [V, D], ids [N, C] int64, weights [N, C] float32. LOSS_CHUNK rows of logits exist at a time; the
    backward pass computes them again.
    """

    def chunk_loss(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        log_probs = F.linear(hidden, head).float().log_softmax(-1).gather(-1, ids)
        # The clamp keeps 0 * log(0) at 0.
        return (weights * (weights.clamp_min(1e-30).log() - log_probs)).sum()

    # Equal ids in one target are one component with their summed weight; it stays at the first of them.
    same = ids.unsqueeze(-1) == ids.unsqueeze(-2)
    repeated = torch.tril(same, -1).logical_and(weights.unsqueeze(-2) > 0).any(-1)
    weights = torch.where(repeated, 0.0, (same * weights.unsqueeze(-2)).sum(-1)) * (weights > 0)
    chunks = zip(hidden.split(LOSS_CHUNK), ids.split(LOSS_CHUNK), weights.split(LOSS_CHUNK), strict=True)
    return torch.stack([checkpoint(chunk_loss, h, i, w, use_reentrant=False) for h, i, w in chunks]).sum()


def batch_loss(model: Any, batch: SFTBatch, args: LatentSFTConfig, step: int) -> Tensor:
    """Return the sum of the losses of a batch's response elements, each predicted by the one before it. 0-d float32."""
    embeds = input_mixtures(batch, embedding_table(model), args.gumbel_scale, args.seed, step)
    with recomputed(model, args.gradient_checkpointing):
        hidden = body(model, embeds[:, :-1], batch.mask[:, :-1], positions(batch.mask[:, :-1]))
    response = batch.response[:, 1:]
    ids, weights = batch.ids[:, 1:][response], batch.weights[:, 1:][response]
    return target_loss(hidden[response], lm_head(model), ids, weights)


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
        step: number of finished optimizer steps.

    Raises:
        ConfigError, ModelError, DataError: an option, model or data set cannot be used; one line with the remedy.
    """

    def __init__(self, model: Any, args: LatentSFTConfig, train_dataset: Sequence[Any], processing_class: Any) -> None:
        set_seed(args.seed)  # new adapters start from random values
        self.model, self.args, self.tokenizer = model, args, processing_class
        self.output_dir = Path(args.output_dir)
        self.examples = build_examples(processing_class, train_dataset, args)
        self.batch_rows = args.update_size(world_size())
        epochs_of_steps = round(args.num_train_epochs * len(self.examples) / self.batch_rows)
        self.total_steps = args.max_steps if args.max_steps > 0 else max(1, epochs_of_steps)
        if args.use_peft:
            add_adapters(model, args)
        self.full_model = shard(model, sampling=False)
        self.updater = Updater(model, args, self.total_steps, args.freeze_embeddings)
        self.checkpoints = Checkpoints(
            "sft", args, model, self.full_model, processing_class, self.updater, train_dataset, self.total_steps
        )
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
        save_model(self.output_dir, self.full_model, self.tokenizer)
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
