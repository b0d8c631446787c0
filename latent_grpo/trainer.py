"""Latent-GRPO: sample groups, reward, advantages, clipped updates (SPEC 7).

What departs from the textbook: groups whose rewards are all equal are dropped and sampled again; responses cut off by
the limit get no advantage; at the first response step one correct response a group keeps its advantage; noise is
one-sided, so that a latent step's update points the way of the advantage. The model stays in evaluation mode: dropout
would make the ratio compare unlike things.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

from latent_grpo.collect import WORD, Collector
from latent_grpo.config import ConfigError, LatentGRPOConfig, require
from latent_grpo.evaluation import evaluate
from latent_grpo.model import end_marker_ids, eos_ids, lm_head, load_model, load_tokenizer
from latent_grpo.parallel.fsdp import call_inside, copy_to_full, pad_to_count, shard
from latent_grpo.parallel.process_group import all_reduce_max, all_reduce_sum, rank, world_size
from latent_grpo.parallel.work_split import share_of_rank
from latent_grpo.rewards.scoring import resolve_reward
from latent_grpo.rollout.samples import Samples
from latent_grpo.rollout.trajectory import Rollout
from latent_grpo.saving.checkpoint import Checkpoints, graceful_interrupt, save_model
from latent_grpo.update.lora import add_adapters, without_adapters
from latent_grpo.update.loss import (
    batch_std,
    mean_logprob,
    response_mask,
    share_of_update,
    step_advantages,
    update_loss,
)
from latent_grpo.update.micro_batches import micro_batches, rows_of
from latent_grpo.update.optimizer import Updater
from latent_grpo.update.replay import replay_logprob
from latent_grpo.watching.metrics import Metrics, progress_bar
from latent_grpo.watching.response_log import print_samples, write_completions
from latent_kernels import PolicyStats, group_advantages


@dataclass
class Batch:
    """A rollout with everything that its update needs. R responses, T steps."""

    rollout: Rollout
    group: Tensor  # [R] int64
    rewards: Tensor  # [R] float32
    old_logprob: Tensor  # [R, T]
    ref_logprob: Tensor | None  # [R, T]
    advantages: Tensor  # [R, T]
    samples: Samples | None = None  # the texts, for the logs


class LatentGRPOTrainer:
    """Trains a causal LM with Latent-GRPO, or with text GRPO where `args.latent` is False.

    Args:
        model: a Hugging Face causal LM, or its folder or Hub name.
        reward_funcs: TRL reward functions (or names, see `resolve_reward`).
        args: options.
        train_dataset, eval_dataset: rows (dicts, or a `datasets.Dataset`) with `prompt`; other columns go to the
        rewards. processing_class: the tokenizer; default: the model folder's.
    Raises ConfigError, ModelError, DataError (one line each) for what cannot be used.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: str | Callable[..., Any] | Sequence[str | Callable[..., Any]] | None = None,
        args: LatentGRPOConfig | None = None,
        train_dataset: Sequence[Any] | None = None,
        eval_dataset: Sequence[Any] | None = None,
        processing_class: Any = None,
    ) -> None:
        self.args = args = args or LatentGRPOConfig()
        self.output_dir = Path(args.output_dir)
        set_seed(args.seed)
        name = model if isinstance(model, str) else model.config._name_or_path
        self.tokenizer = processing_class or load_tokenizer(name)
        self.model = load_model(model, args.dtype, args.device) if isinstance(model, str) else model
        self.device = self.model.device
        functions = reward_funcs if reward_funcs is not None else args.reward_funcs
        chosen = [functions] if isinstance(functions, str) or callable(functions) else list(functions)
        try:
            self.reward_funcs = [resolve_reward(f) for f in chosen]
        except ValueError as error:
            raise ConfigError(str(error)) from error
        weights, count = args.reward_weights, len(self.reward_funcs)
        fits = weights is None or len(weights) == count
        require(fits, "reward_weights", weights, f"give one for each of the {count} rewards")
        require(not args.eval_steps or bool(eval_dataset), "eval_steps", args.eval_steps, "it needs an eval_dataset")
        if not train_dataset:
            raise ConfigError("train_dataset is empty; give rows with a 'prompt' column")
        self.rows, self.eval_rows = train_dataset, eval_dataset
        self.sampling = replace(args.sampling(), eos_token_id=eos_ids(self.model, self.tokenizer))
        if args.latent:
            self.sampling.end_token_id = end_marker_ids(self.tokenizer, args.end_marker)[0]
            vocab = len(lm_head(self.model))
            require(args.latent_top_k <= vocab, "latent_top_k", args.latent_top_k, f"the vocabulary has {vocab} tokens")
        self.collector = Collector(args, self.sampling, self.rows, self.tokenizer, self.reward_funcs)
        prompts = self.collector.prompts_per_batch
        remedy = f"{world_size()} processes share its {prompts} prompts; give each one or more"
        require(prompts >= world_size(), "generation_batch_size", args.generation_batch_size, remedy)
        per_epoch = max(1, len(self.rows) // prompts)
        self.total_steps = args.max_steps if args.max_steps > 0 else max(1, round(per_epoch * args.num_train_epochs))
        self.update_size = args.update_size(world_size())
        updates = args.num_iterations * -(-args.generation_batch_size // self.update_size)
        if args.use_peft:
            add_adapters(self.model, args)
        # Samples and scores; the model itself where there is one process.
        self.whole = shard(self.model, sampling=True)
        self.updater = Updater(self.model, args, self.total_steps * updates, args.freeze_embeddings)
        self.reference = self.whole if args.use_peft and args.beta > 0 else None  # with its adapters disabled
        if args.beta > 0 and not args.use_peft:
            self.reference = (
                load_model(name, args.dtype, str(self.device)) if isinstance(model, str) else _frozen_copy(self.whole)
            )
        self.checkpoints = Checkpoints(
            "train", args, self.model, self.whole, self.tokenizer, self.updater, self.rows, self.total_steps
        )
        self.step = 0
        set_seed(args.seed + rank())  # rewards may draw
        self.metrics: Metrics

    def train(self, resume_from_checkpoint: str | bool | None = None) -> dict[str, float]:
        """Run to the last step and save; the last step's metrics. KeyboardInterrupt after a checkpoint on SIGINT."""
        args = self.args
        choice = args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        history = self.resume(choice) if choice else None
        self.metrics = Metrics(args, history)
        values: dict[str, float] = dict(history[-1]) if history else {}
        with graceful_interrupt() as interrupt, progress_bar("Latent-GRPO", self.total_steps, self.step) as bar:
            while self.step < self.total_steps:
                batch, values = self.collect()
                values |= self.update(batch)
                self.step += 1
                if args.eval_steps and self.step % args.eval_steps == 0:
                    values |= self.evaluate()
                if self.step % args.logging_steps == 0:
                    self.metrics.write({"phase": "train", "step": self.step, **values})
                    self.log_completions(batch)
                bar.advance(f"reward {values['reward']:.3f}  steps {values['response_length']:.1f}")
                stop = bool(all_reduce_max(interrupt.requested))
                if stop or (args.save_steps and self.step % args.save_steps == 0):
                    self.save()
                if stop:
                    raise KeyboardInterrupt
        self.metrics.close()
        save_model(self.output_dir, self.whole, self.tokenizer)
        return values

    def collect(self) -> tuple[Batch, dict[str, float]]:
        """A batch to learn from, and the metrics of its rollout."""
        groups, values = self.collector.collect(self.whole, self.step + 1)
        started = time.perf_counter()
        batch, gap = self.prepare(groups.rollout, groups.rewards)
        batch.samples = groups.samples
        return batch, {**values, **gap, "time_old_logprob": time.perf_counter() - started}

    @torch.no_grad()
    def prepare(self, rollout: Rollout, rewards: Tensor) -> tuple[Batch, dict[str, float]]:
        """Old (and reference) log-probs, advantages, and the gap between the sampler's and the trainer's log-probs."""
        args, gap = self.args, {}
        old = rollout.logprob
        if args.old_logprobs == "recompute":
            old = self.logprobs(self.whole, rollout)
            gap["logprob_gap"] = float(((old - rollout.logprob).abs() * rollout.mask).sum() / rollout.mask.sum())
            self.check_gap(gap["logprob_gap"])
        group = torch.arange(len(rewards), device=self.device) // args.num_generations
        result = group_advantages(
            rewards, group, invalid_mask=~rollout.finished, invalid=args.invalid,
            normalize_std=args.scale_rewards == "group", mean_logprob=mean_logprob(old, rollout.mask),
            first_token=args.first_token if args.latent else "all",
        )  # fmt: skip
        advantages = step_advantages(result.advantages, result.first_step, old.shape[1])
        if args.scale_rewards == "batch":
            counted = rollout.finished if args.invalid == "exclude" else torch.ones_like(rollout.finished)
            advantages = advantages / batch_std(rewards, counted)
        if args.importance_sampling_cap is not None:
            weights = (old - rollout.logprob).exp().clamp_max(args.importance_sampling_cap)
            advantages = advantages * torch.where(rollout.mask, weights, 1.0)
        with without_adapters(self.reference):
            reference = None if self.reference is None else self.logprobs(self.reference, rollout)
        return Batch(rollout, group, rewards, old, reference, advantages), gap

    def logprobs(self, model: Any, rollout: Rollout) -> Tensor:
        """Log-probs [R, T] under `model`, a micro-batch at a time, each rank its share of the rows."""
        out = torch.zeros_like(rollout.logprob)
        mine = share_of_rank(rollout, torch.arange(len(out), device=out.device), rank(), world_size())
        for rows in self.micro_batches(rollout, mine):
            part = replay_logprob(model, rollout.select(rows), self.args.temperature)
            out[rows, : part.shape[1]] = part
        return all_reduce_sum(out)

    def micro_batches(self, rollout: Rollout, rows: Tensor) -> list[Tensor]:
        """Rows that are replayed together."""
        return micro_batches(rollout, rows, self.args.per_device_train_batch_size, self.args.micro_batch_tokens)

    def check_gap(self, gap: float) -> None:
        """Say so where sampler and trainer disagree more than `max_logprob_gap`."""
        if gap > self.args.max_logprob_gap:
            warnings.warn(
                f"step {self.step + 1}: sampled log-probs are off the trainer's by {gap:.3g} nats, over "
                f"max_logprob_gap {self.args.max_logprob_gap:g}; "
                "use old_logprobs recompute with importance_sampling_cap 2",
                stacklevel=2,
            )

    def update(self, batch: Batch) -> dict[str, float]:
        """PPO epochs over the batch in mini-batches of whole groups; metrics of the updates."""
        args, started = self.args, time.perf_counter()
        sums: dict[str, float] = {}
        updates = 0
        for epoch in range(args.num_iterations):
            generator = torch.Generator().manual_seed((args.seed * WORD + self.step) * args.num_iterations + epoch)
            groups = torch.randperm(len(batch.rewards) // args.num_generations, generator=generator)
            for mini in rows_of(groups, args.num_generations).to(self.device).split(self.update_size):
                stats = self.accumulate(batch, mini)
                if updates == 0 and args.old_logprobs == "rollout":
                    sums["logprob_gap"] = stats["abs_log_ratio"]
                    self.check_gap(sums["logprob_gap"])
                stats["grad_norm"] = self.updater.step()
                updates += 1
                for name, value in stats.items():
                    sums[f"sum_{name}"] = sums.get(f"sum_{name}", 0.0) + value
        copy_to_full(self.whole, self.model)
        means = {name[4:]: value / updates for name, value in sums.items() if name.startswith("sum_")}
        for unused in ("abs_log_ratio", *(() if args.entropy_coef else ("entropy",))):
            means.pop(unused)
        return {
            **means, **{k: v for k, v in sums.items() if not k.startswith("sum_")},
            "learning_rate": self.updater.learning_rate, "skipped_updates": self.updater.skipped,
            "time_update": time.perf_counter() - started,
        }  # fmt: skip

    def accumulate(self, batch: Batch, rows: Tensor) -> dict[str, float]:
        """Gradients of one mini-batch, each rank's of its share of the rows, a micro-batch at a time; its
        statistics."""
        args = self.args
        carried = response_mask(batch.rollout, args.loss_on)
        total = carried[rows].sum()
        sums = torch.zeros(1 + len(PolicyStats._fields), dtype=torch.float64)
        parts = self.micro_batches(batch.rollout, share_of_rank(batch.rollout, rows, rank(), world_size()))
        for part, real in pad_to_count(parts, rows[:1], all_reduce_max(len(parts))):
            rollout = batch.rollout.select(part)
            steps = rollout.mask.shape[1]
            mask, responses = carried[part, :steps] & real, real * len(part) / len(rows)
            loss, stats = call_inside(
                self.model, update_loss, self.model, rollout, batch.old_logprob[part, :steps],
                batch.advantages[part, :steps], mask,
                None if batch.ref_logprob is None else batch.ref_logprob[part, :steps], args,
            )  # fmt: skip
            loss = loss * share_of_update(args, mask, total, responses)
            self.updater.backward(loss)
            sums[0] += float(loss.detach())
            tokens = float(mask.sum() / total.clamp_min(1))
            sums[1:] += tokens * torch.nan_to_num(torch.stack(stats)).double().cpu()
        return dict(zip(("loss", *PolicyStats._fields), all_reduce_sum(sums).tolist(), strict=True))

    def evaluate(self) -> dict[str, float]:
        """Pass@1 and lengths on the evaluation rows, noise-free."""
        if not self.eval_rows:
            return {}
        result = evaluate(self.whole, self.tokenizer, self.eval_rows, self.sampling, end_marker=self.args.end_marker)
        return {f"eval_{name}": value for name, value in result.items() if isinstance(value, int | float)}

    def log_completions(self, batch: Batch) -> None:
        """Print responses and write them to the Parquet log, as asked for; rank 0 alone."""
        if rank():
            return
        assert batch.samples is not None
        print_samples(batch.samples, batch.rewards, self.args.num_completions_to_print)
        if self.args.log_completions:
            write_completions(
                self.output_dir, self.step, self.tokenizer, batch.samples, batch.rollout, batch.rewards,
                batch.advantages,
            )  # fmt: skip

    def save(self) -> Path:
        """Write `checkpoint-STEP`."""
        position = {"prompts_seen": self.collector.prompts_seen, "generations": self.collector.generations}
        return self.checkpoints.save(self.step, position, self.metrics.history)

    def resume(self, choice: str | bool) -> list[dict[str, Any]]:
        """Go on from a checkpoint of this run; its metrics so far."""
        self.step, position, history = self.checkpoints.resume(choice)
        self.collector.prompts_seen, self.collector.generations = position["prompts_seen"], position["generations"]
        return history


def _frozen_copy(model: Any) -> Any:
    """The initial model, kept for the KL penalty."""
    import copy

    return copy.deepcopy(model).requires_grad_(False).eval()
