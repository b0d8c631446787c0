"""Latent-SFT, the warm start (arXiv 2510.15522): chain-of-thought tokens become latent targets.

`compression` consecutive chain tokens are one latent target, the uniform distribution over them. Its input is their
embedding mixture, optionally perturbed by Gumbel noise as sampling will; its loss is KL(target || model). The end
marker, the answer and EOS carry cross-entropy. Both are means over the positions of a batch, added over all of them.
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
from latent_grpo.data.rows import DataError
from latent_grpo.model import body, embedding_table, end_marker_ids, lm_head, positions, prompt_ids
from latent_grpo.parallel.fsdp import call_inside, copy_to_full, pad_to_count, shard
from latent_grpo.parallel.process_group import all_reduce_max, all_reduce_sum, rank, world_size
from latent_grpo.parallel.work_split import snake_draft
from latent_grpo.saving.checkpoint import Checkpoints, graceful_interrupt, save_model
from latent_grpo.update.activation_checkpointing import recomputed
from latent_grpo.update.lora import add_adapters
from latent_grpo.update.optimizer import Updater
from latent_grpo.watching.metrics import Metrics, progress_bar
from latent_kernels import philox_uniform

LOSS_CHUNK = 1024  # rows of logits alive at a time
MOST_COMPONENTS = 2**12  # of a latent target


@dataclass
class Example:
    """One training text: a prompt, and the components of every response element (one id for a text token)."""

    prompt: list[int]
    response: list[list[int]]
    number: int = 0  # of its row in the data, which names its noise


@dataclass
class SFTBatch:
    """Padded examples: B rows, L elements, C components an element. Prompts are left-padded, responses right-padded."""

    ids: Tensor  # [B, L, C], 0 where unused
    weights: Tensor  # [B, L, C], 0 where unused
    mask: Tensor  # [B, L]
    response: Tensor  # [B, L] bool, elements that carry a loss
    numbers: Tensor  # [B] of the examples


def build_example(tokenizer: Any, row: Any, args: LatentSFTConfig, marker: list[int], number: int) -> Example:
    """Tokens of a row with prompt, chain and answer."""
    chain = tokenizer(row["chain"], add_special_tokens=False)["input_ids"]
    width = args.compression if args.latent else 1
    latents = [chain[i : i + width] for i in range(0, len(chain), width)]
    answer = tokenizer(args.answer_template.format(answer=row["answer"]), add_special_tokens=False)["input_ids"]
    return Example(
        prompt_ids(tokenizer, row["prompt"]), latents + [[i] for i in [*marker, *answer, tokenizer.eos_token_id]],
        number,
    )  # fmt: skip


def build_examples(tokenizer: Any, rows: Sequence[Any], args: LatentSFTConfig) -> list[Example]:
    """Every row that fits the limits; DataError where a row has no chain, or none fits."""
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
    """Pad examples to one batch."""
    left = max(len(e.prompt) for e in examples)
    right = max(len(e.response) for e in examples)
    components = max(len(element) for e in examples for element in e.response)
    empty = [0] * components
    ids, weights = [], []
    for example in examples:
        elements = [[i] for i in example.prompt] + example.response
        before = [empty] * (left - len(example.prompt))
        after = [empty] * (right - len(example.response))
        padding = [[0] * (components - len(e)) for e in elements]
        ids.append([*before, *(e + p for e, p in zip(elements, padding, strict=True)), *after])
        shares = [[1.0 / len(e)] * len(e) + [0.0] * len(p) for e, p in zip(elements, padding, strict=True)]
        weights.append([*before, *shares, *after])
    weight = torch.tensor(weights, dtype=torch.float32)
    mask = weight.sum(-1) > 0
    response = mask & (torch.arange(left + right) >= left)
    numbers = torch.tensor([example.number for example in examples])
    return SFTBatch(*(x.to(device) for x in (torch.tensor(ids), weight, mask.long(), response, numbers)))


def input_mixtures(
    batch: SFTBatch, table: Tensor, gumbel_scale: float = 0.0, seed: int = 0, step: int = 0
) -> Tensor:  # fmt: skip
    """Input embeddings [B, L, D]: mixtures of the targets, Gumbel-perturbed on latent elements where asked."""
    weights = batch.weights
    if gumbel_scale > 0:
        noise = gumbel_noise(batch, seed, step) * gumbel_scale
        perturbed = (weights.log() + noise).nan_to_num(neginf=-torch.inf).softmax(-1).nan_to_num(0.0)
        weights = torch.where((weights > 0).sum(-1, keepdim=True) > 1, perturbed, weights)
    # F.embedding and not indexing: its gradient adds up in one order, whatever the number of threads.
    return (weights.unsqueeze(-1) * F.embedding(batch.ids, table).float()).sum(2).to(table.dtype)


def gumbel_noise(batch: SFTBatch, seed: int, step: int) -> Tensor:
    """Clamped Gumbel noise of every component [B, L, C] float32: a function of (seed, step, example, place, component),
    so that it does not depend on the batch around an example."""
    _, elements, components = batch.ids.shape
    start = elements - int(batch.response.sum(-1).max())  # of the responses, which all start there
    place = (torch.arange(elements, device=batch.ids.device) - start).clamp_min(0)
    within = place.unsqueeze(-1) * MOST_COMPONENTS + torch.arange(components, device=place.device)
    streams = batch.numbers.view(-1, 1, 1) * 2**32 + within
    draws = philox_uniform(streams.flatten(), seed=seed, step=step).view(streams.shape)
    return (-torch.log(-torch.log(draws))).clamp(-1.5, 3.0).float()


def target_loss(hidden: Tensor, head: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Sum over rows of KL(target || model), which is the cross-entropy where the target is one token. 0-d float32.

    hidden [N, D], ids and weights [N, C]; logits are recomputed in the backward pass, LOSS_CHUNK rows at a time.
    """

    def rows(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        log_probs = F.linear(hidden, head).float().log_softmax(-1).gather(-1, ids)
        return (weights * (weights.clamp_min(1e-30).log() - log_probs)).sum()

    # Equal ids in one target are one component of their summed weight.
    same = ids.unsqueeze(-1) == ids.unsqueeze(-2)
    first = torch.tril(same, -1).logical_and(weights.unsqueeze(-2) > 0).any(-1)
    weights = torch.where(first, 0.0, (same * weights.unsqueeze(-2)).sum(-1)) * (weights > 0)
    parts = zip(hidden.split(LOSS_CHUNK), ids.split(LOSS_CHUNK), weights.split(LOSS_CHUNK), strict=True)
    return torch.stack([checkpoint(rows, h, i, w, use_reentrant=False) for h, i, w in parts]).sum()


def batch_loss(model: Any, batch: SFTBatch, args: LatentSFTConfig, step: int) -> Tensor:
    """Sum of the losses of the batch's response elements, each predicted from what stands before it. 0-d float32."""
    embeds = input_mixtures(batch, embedding_table(model), args.gumbel_scale, args.seed, step)
    with recomputed(model, args.gradient_checkpointing):
        hidden = body(model, embeds[:, :-1], batch.mask[:, :-1], positions(batch.mask[:, :-1]))
    carried = batch.response[:, 1:]
    ids, weights = batch.ids[:, 1:][carried], batch.weights[:, 1:][carried]
    return target_loss(hidden[carried], lm_head(model), ids, weights)


class LatentSFTTrainer:
    """Trains the warm start. rows: dicts with prompt, chain and answer."""

    def __init__(self, model: Any, args: LatentSFTConfig, train_dataset: Sequence[Any], processing_class: Any) -> None:
        set_seed(args.seed)
        self.model, self.args, self.tokenizer = model, args, processing_class
        self.output_dir = Path(args.output_dir)
        self.examples = build_examples(processing_class, train_dataset, args)
        self.batch_rows = args.update_size(world_size())
        epochs = round(args.num_train_epochs * len(self.examples) / self.batch_rows)
        self.total_steps = args.max_steps if args.max_steps > 0 else max(1, epochs)
        if args.use_peft:
            add_adapters(model, args)
        self.whole = shard(model, sampling=False)
        self.updater = Updater(model, args, self.total_steps, args.freeze_embeddings)
        self.checkpoints = Checkpoints(
            "sft", args, model, self.whole, processing_class, self.updater, train_dataset, self.total_steps
        )
        set_seed(args.seed + rank())  # dropout draws
        self.generator = torch.Generator().manual_seed(args.seed)
        self.queue: list[int] = []  # indices of the examples that come next
        self.step = 0
        self.metrics: Metrics

    def train(self, resume_from_checkpoint: str | bool | None = None) -> dict[str, float]:
        """Run to the last step and save; the last step's metrics. KeyboardInterrupt after a checkpoint on SIGINT."""
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
                stop = bool(all_reduce_max(interrupt.requested))
                if stop or (args.save_steps and self.step % args.save_steps == 0):
                    self.save()
                if stop:
                    raise KeyboardInterrupt
        self.metrics.close()
        copy_to_full(self.whole, self.model)
        save_model(self.output_dir, self.whole, self.tokenizer)
        return values

    def save(self) -> Path:
        """Write `checkpoint-STEP`."""
        position = {"queue": self.queue, "generator": self.generator.get_state()}
        return self.checkpoints.save(self.step, position, self.metrics.history)

    def resume(self, choice: str | bool) -> list[dict[str, Any]]:
        """Go on from a checkpoint of this run; its metrics so far."""
        self.step, position, history = self.checkpoints.resume(choice)
        self.queue = position["queue"]
        self.generator.set_state(position["generator"])
        return history

    def next_examples(self) -> list[int]:
        """Indices of the next step's examples, a new order every epoch, without end."""
        while len(self.queue) < self.batch_rows:
            self.queue += torch.randperm(len(self.examples), generator=self.generator).tolist()
        chosen, self.queue = self.queue[: self.batch_rows], self.queue[self.batch_rows :]
        return chosen

    def update(self, indices: list[int]) -> dict[str, float]:
        """One optimizer step over the examples of `indices`."""
        args, size = self.args, self.args.per_device_train_batch_size
        chosen = [self.examples[i] for i in indices]
        elements = sum(len(e.response) for e in chosen)
        hand = snake_draft([len(e.prompt) + len(e.response) for e in chosen], world_size())[rank()]
        parts = [[chosen[i] for i in hand[start : start + size]] for start in range(0, len(hand), size)]
        total = torch.zeros((), dtype=torch.float64)
        for part, real in pad_to_count(parts, chosen[:1], all_reduce_max(len(parts))):
            batch = collate(part, self.model.device)
            loss = call_inside(self.model, batch_loss, self.model, batch, args, self.step) * (real / elements)
            self.updater.backward(loss)
            total += float(loss.detach())
        learning_rate = self.updater.learning_rate
        return {"loss": float(all_reduce_sum(total)), "grad_norm": self.updater.step(), "learning_rate": learning_rate}


@torch.no_grad()
def gold_chain_accuracy(model: Any, examples: Sequence[Example], batch_size: int = 256) -> float:
    """Share of examples whose text (end marker, answer, EOS) is read out right, greedily, after the gold latents."""
    model.eval()
    right = 0
    for start in range(0, len(examples), batch_size):
        chosen = examples[start : start + batch_size]
        batch = collate(chosen, model.device)
        embeds = input_mixtures(batch, embedding_table(model))
        hidden = body(model, embeds[:, :-1], batch.mask[:, :-1], positions(batch.mask[:, :-1]))
        guess = F.linear(hidden, lm_head(model)).argmax(-1)
        text = batch.response[:, 1:] & ((batch.weights[:, 1:] > 0).sum(-1) == 1)
        right += int(((guess == batch.ids[:, 1:, 0]) | ~text).all(-1).sum())
    return right / max(1, len(examples))
