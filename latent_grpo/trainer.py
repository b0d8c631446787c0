"""Latent-GRPO (arXiv 2604.27998): sample groups of responses, reward them, take advantages, update with a clipped loss.

How it differs from textbook GRPO:
- Groups whose rewards are all equal are dropped, and other prompts are sampled in their place.
- A response that the length limit cut off gets no advantage.
- At the first response step, only one correct response per group keeps its advantage.
- The noise is one-sided, so the update of a latent step has the sign of its advantage (Eq. 15).
- The model stays in evaluation mode: dropout would put noise on the ratio of new to old probabilities.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerState, set_seed

from latent_grpo.architecture import check_context, check_prompt_lengths
from latent_grpo.collect import Collector
from latent_grpo.config import LatentGRPOConfig, LatentSampling
from latent_grpo.data.rows import with_own_columns
from latent_grpo.decoding_proof import check_decoding
from latent_grpo.errors import require
from latent_grpo.evaluation import evaluate
from latent_grpo.model import check_vocabulary, end_marker_ids, eos_ids, lm_head, load_model, load_tokenizer
from latent_grpo.parallel.fsdp import call_inside, copy_to_full, shard
from latent_grpo.parallel.process_group import all_reduce_max, all_reduce_sum, rank, world_size
from latent_grpo.parallel.work_split import pad_to_count, rows_of_groups, share_of_rank
from latent_grpo.prompts import require_rows, resolve_format, with_short_prompts
from latent_grpo.rewards.columns import check_columns, reward_columns
from latent_grpo.rewards.functions import accuracy_reward
from latent_grpo.rewards.resolve import RewardFuncs, resolve_rewards
from latent_grpo.rewards.scoring import metric_means
from latent_grpo.rollout.slot_cache import check_memory
from latent_grpo.rollout.trajectory import Rollout
from latent_grpo.saving.checkpoint import Checkpoints
from latent_grpo.saving.interrupt import stops
from latent_grpo.saving.model_files import check_saved_weights, save_model
from latent_grpo.saving.run_folder import only_run_in
from latent_grpo.seeds import derive_seed, rank_seed, shuffle_seed
from latent_grpo.update.length import run_length
from latent_grpo.update.lora import add_adapters, without_adapters
from latent_grpo.update.loss import (
    Batch,
    entropy_share,
    loss_mask,
    policy_advantages,
    replay_with_gradients,
    share_of_update,
    step_logprob,
    update_loss,
)
from latent_grpo.update.micro_batches import micro_batches
from latent_grpo.update.optimizer import Updater
from latent_grpo.update.probe import start_probe
from latent_grpo.update.replay import replay_logprob, warn_of_gap
from latent_grpo.update.statistics import GAP, update_metrics
from latent_grpo.watching.header import train_header
from latent_grpo.watching.metrics import Metrics, progress_bar
from latent_grpo.watching.names import evaluation_metrics
from latent_grpo.watching.response_log import print_completions, write_completions
from latent_kernels import PolicyStats


class LatentGRPOTrainer:
    """Train a causal LM with Latent-GRPO, or with text GRPO if `args.latent` is False.

    With several processes, make the trainer and call its methods on every rank, within `latent_grpo.process_group()`.

    Args:
        model: a Hugging Face causal LM, or its folder or Hub name. A given model is trained in place.
        reward_funcs: one or several reward functions with TRL's signature, reward models, or their names (see
            `resolve_reward`). Default: `args.reward_funcs`.
        args: the options. Default: `LatentGRPOConfig()`.
        train_dataset: rows (dicts, or a `datasets.Dataset`) with `prompt`, or with columns that
            `load_rows` knows or the options name. The reward functions get the other columns.
        eval_dataset: rows with `prompt` and `answer`. Needed if `args.eval_steps` is set.
        processing_class: the tokenizer. Default: the tokenizer in the model's folder.
        reward_processing_classes: the tokenizer of a reward model, or a list with an entry for each of `reward_funcs`,
            None for a function. Default: the tokenizer beside the reward model.

    Attributes:
        model: the trained model, sharded if there are several processes.
        full_model: the model that samples, scores and is saved. With one process it is `model` itself.
        reference: the model of the KL penalty, or None. With LoRA it is `full_model`, used with disabled adapters.
        step: number of finished steps. One step is one rollout with all its updates; `max_steps` counts the updates.

    Raises:
        ConfigError, ModelError, DataError: an option, model or data set cannot be used; one line with the remedy.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: RewardFuncs | None = None,
        args: LatentGRPOConfig | None = None,
        train_dataset: Sequence[Any] | None = None,
        eval_dataset: Sequence[Any] | None = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
    ) -> None:
        self.args = args = args or LatentGRPOConfig()
        self.output_dir = Path(args.output_dir)
        set_seed(args.seed)  # new adapters start from random values
        model = os.fspath(model) if isinstance(model, os.PathLike) else model
        loaded = isinstance(model, str)
        self.model = load_model(model, args.dtype, args.device) if loaded else model
        check_decoding(self.model)  # it says what is no model
        source = model if loaded else model.config._name_or_path
        self.tokenizer = processing_class or load_tokenizer(source)
        check_saved_weights(self.model)
        self.device = self.model.device
        chosen = args.reward_funcs if reward_funcs is None else reward_funcs
        self.reward_funcs = resolve_rewards(chosen, args.reward_weights, reward_processing_classes, self.device)
        self.prompt_format = resolve_format(args, source if loaded else args.model_name_or_path or source)
        self._prepare_data(*with_own_columns(args, train_dataset=train_dataset, eval_dataset=eval_dataset))
        self.sampling = self._sampling_options()
        used = (self.sampling, self.rows, self.tokenizer, self.reward_funcs, self.prompt_format)
        self.collector = Collector(args, *used)
        self.update_size = args.update_size(world_size())
        prompts, remedy = self.collector.prompts_per_batch, "{} processes share its {} prompts; give each one or more"
        shared = remedy.format(world_size(), prompts)
        require(prompts >= world_size(), "generation_batch_size", args.generation_batch_size, shared)
        self.length = run_length(args, len(self.rows), self.update_size)
        self.total_steps = self.length.rollouts
        self._prepare_models(source if loaded else None)
        written = (args, self.model, self.full_model, self.tokenizer, self.prompt_format)
        self.checkpoints = Checkpoints("train", *written, self.updater, self.rows, self.length.updates)
        self.step = 0
        set_seed(rank_seed(args.seed, rank()))  # reward functions may draw
        self.metrics: Metrics

    def _prepare_data(self, train_dataset: Any, eval_dataset: Any) -> None:
        """Check the rows, and leave long prompts out as the options ask."""
        args, config, data = self.args, self.model.config, (train_dataset, eval_dataset)
        require_rows("train_dataset", train_dataset)
        if args.eval_steps or eval_dataset is not None:
            require(eval_dataset is not None, "eval_steps", args.eval_steps, "it needs an eval_dataset")
            require_rows("eval_dataset", eval_dataset)
        lengths = check_vocabulary(self.model, self.tokenizer, self.prompt_format, args.latent, *data)
        check_context(config, {"dataset": lengths[0], "eval_dataset": lengths[1]}, args.max_prompt_length)
        self.rows, self.eval_rows = (
            with_short_prompts(rows, tokens, args.max_prompt_length, args.long_prompts)
            for rows, tokens in zip(data, lengths, strict=True)
        )
        check_memory(self.model, lengths[0], args)
        for rows in (self.rows, self.eval_rows):
            check_prompt_lengths(config, self.tokenizer, rows, self.prompt_format, args.max_completion_length)
        if self.eval_rows:
            check_columns([accuracy_reward], self.eval_rows, reward_columns(self.eval_rows))

    def _sampling_options(self) -> LatentSampling:
        """Return the options of a rollout, with the token ids that end a latent run and a response."""
        args = self.args
        sampling = replace(args.sampling(), eos_token_id=eos_ids(self.model, self.tokenizer))
        if args.latent:
            sampling.end_token_id = end_marker_ids(self.tokenizer, self.prompt_format.end_marker)[0]
            vocab = len(lm_head(self.model))
            require(args.latent_top_k <= vocab, "latent_top_k", args.latent_top_k, f"the vocabulary has {vocab} tokens")
        return sampling

    def _prepare_models(self, path: str | None) -> None:
        """Add adapters, shard the model, and make the optimizer and the reference model.

        path: where the initial model can be loaded from again; None if it was given as an object.
        """
        args = self.args
        if args.use_peft:
            add_adapters(self.model, args)
        self.full_model = shard(self.model, sampling=True)
        self.updater = Updater(self.model, args, self.length.updates, args.freeze_embeddings)
        self.reference = None  # a second model in memory, so only for a KL penalty
        if args.beta > 0 and args.use_peft:
            self.reference = self.full_model
        elif args.beta > 0 and path is not None:
            self.reference = load_model(path, args.dtype, str(self.device))
        elif args.beta > 0:
            self.reference = copy.deepcopy(self.full_model).requires_grad_(False).eval()

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
        args = self.args
        choice = args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        with only_run_in(self.output_dir), stops(args, self.checkpoints) as stop:
            history = self.resume(choice) if choice else None
            header = train_header(args, self.full_model, len(self.rows), self.total_steps, self.length.note())
            self.metrics = Metrics(args, history, header)
            self.checkpoints.record()
            values: dict[str, float] = dict(history[-1]) if history else {}
            with progress_bar(args.label(), self.total_steps, self.step) as bar:
                while not self.length.reached(self.step, self.updater.updates):
                    values = self.take_step()
                    bar.advance(f"reward {values['reward']:.3f}  steps {values['completions/mean_length']:.1f}")
                    self.checkpoints.mark(self.step, self.collector.position(), self.metrics.history)
                    stop.after_step(self.step, self.save)
            self.metrics.close()
            save_model(self.output_dir, self.full_model, self.tokenizer, self.prompt_format)
        return values

    def take_step(self) -> dict[str, float]:
        """Sample, score, update, and write the metrics as the options ask. Return them."""
        args, started = self.args, time.perf_counter()
        batch, values = self.collect()
        probe = start_probe(self.full_model, batch.rollout, args, self.step + 1)
        values |= self.update(batch, self.length.updates_left(self.updater.updates))
        values |= probe()
        assert batch.samples is not None
        values |= metric_means(batch.samples.metrics, values)
        values["step_time"] = time.perf_counter() - started
        self.step += 1
        if args.eval_steps and self.step % args.eval_steps == 0:
            values |= self.evaluate()
        if self.step % args.logging_steps == 0:
            self.metrics.write({"phase": "train", "step": self.step, **values})
            self.log_completions(batch)
        return values

    def collect(self) -> tuple[Batch, dict[str, float]]:
        """Return a batch to learn from, and the metrics of its rollout."""
        self.collector.state = self.state()
        groups, values = self.collector.collect(self.full_model, self.step + 1)
        started = time.perf_counter()
        batch, gap = self.prepare(groups.rollout, groups.rewards)
        batch.samples = groups.samples
        return batch, {**values, **gap, "time_old_logprob": time.perf_counter() - started}

    def state(self) -> TrainerState:
        """Return the progress of the run, for reward functions: optimizer steps, their number, epoch, metrics."""
        state = TrainerState(global_step=self.updater.updates, max_steps=self.length.updates)
        state.epoch = self.collector.prompts_seen / len(self.rows)
        state.log_history = list(self.metrics.history) if hasattr(self, "metrics") else []
        return state

    @torch.no_grad()
    def prepare(self, rollout: Rollout, rewards: Tensor) -> tuple[Batch, dict[str, float]]:
        """Add old and reference log-probs and advantages to a rollout with rewards [R], group after group.

        Return the batch, and {GAP: mean |log-prob of the trainer - log-prob of the sampler| in nats}, which is empty
        with `old_logprobs` rollout.
        """
        args, gap, hidden, old = self.args, {}, None, rollout.logprob
        if args.old_logprobs == "recompute":
            hidden = self.only_replay(rollout)
            old = self.logprobs(self.full_model, rollout, hidden)
            distance = (step_logprob(old) - rollout.logprob).abs()
            gap[GAP] = float((distance * rollout.mask).sum() / rollout.mask.sum())
            warn_of_gap(gap[GAP], args.max_logprob_gap, self.step + 1)
        group = torch.arange(len(rewards), device=self.device) // args.num_generations
        advantages = policy_advantages(args, rollout, rewards, group, step_logprob(old))
        with without_adapters(self.reference):
            reference = None if self.reference is None else self.logprobs(self.reference, rollout)
        return Batch(rollout, group, rewards, old, reference, advantages, hidden=hidden), gap

    def only_replay(self, rollout: Rollout) -> Tensor | None:
        """Return hidden states [R, T, D] with gradients that serve old log-probs and loss alike, or None.

        They do if the rollout is one micro-batch of one update: then the policy that is updated is the old one.
        """
        args, rows = self.args, torch.arange(len(rollout.mask), device=self.device)
        one_update = args.num_iterations == 1 and self.update_size >= len(rows) and world_size() == 1
        one = one_update and len(self.micro_batches(rollout, rows)) == 1
        return replay_with_gradients(self.full_model, rollout.select(rows), args) if one else None

    def logprobs(self, model: Any, rollout: Rollout, hidden: Tensor | None = None) -> Tensor:
        """Return the log-probs [R, T] float32 of a rollout under a full model, in micro-batches.

        With a ratio for each component they are [R, T, K]. hidden: those of `only_replay`, if there are any.
        Collective: each rank computes its share of the rows, and every rank gets all of them.
        """
        args, each = self.args, self.args.importance_sampling_level == "component"
        out = torch.zeros(rollout.ids.shape if each else rollout.mask.shape, device=rollout.logprob.device)
        rows = share_of_rank(rollout, torch.arange(len(out), device=out.device), rank(), world_size())
        for micro_batch in self.micro_batches(rollout, rows):
            selected, known = rollout.select(micro_batch), None if hidden is None else hidden[micro_batch]
            logprob = replay_logprob(model, selected, args.temperature, args.method, each, known)
            out[micro_batch, : logprob.shape[1]] = logprob
        return all_reduce_sum(out)  # the rows of other ranks are 0 here

    def micro_batches(self, rollout: Rollout, rows: Tensor) -> list[Tensor]:
        """Divide `rows` [n] int64 into the micro-batches that are replayed together."""
        return micro_batches(rollout, rows, self.args.per_device_train_batch_size, self.args.micro_batch_tokens)

    def update(self, batch: Batch, limit: int | None = None) -> dict[str, float]:
        """Train `num_iterations` epochs on a batch, in mini-batches of whole groups. Return the metrics of the updates.

        limit: most updates, 1 or more. Default: all of the batch. The metrics are means over the updates. Only
        `learning_rate` and `skipped_updates` are the last values.
        """
        args, started = self.args, time.perf_counter()
        sums: dict[str, float] = {}
        gap: dict[str, float] = {}
        updates = 0
        for epoch in range(args.num_iterations):
            # On the CPU, so that every rank and every device draws the same order.
            seed = shuffle_seed(derive_seed(args.seed, self.step, epoch, args.num_iterations))
            generator = torch.Generator().manual_seed(seed)
            groups = torch.randperm(len(batch.rewards) // args.num_generations, generator=generator)
            for rows in rows_of_groups(groups, args.num_generations).to(self.device).split(self.update_size):
                if updates == limit:
                    break
                stats = self.accumulate(batch, rows)
                if updates == 0 and args.old_logprobs == "rollout":
                    # Before the first update the policy is the one that sampled: any log-ratio is a numerical gap.
                    gap[GAP] = stats["abs_log_ratio"]
                    warn_of_gap(gap[GAP], args.max_logprob_gap, self.step + 1)
                stats["grad_norm"] = self.updater.step()
                updates += 1
                for name, value in stats.items():
                    sums[name] = sums.get(name, 0.0) + value
        copy_to_full(self.full_model, self.model)
        return {
            **update_metrics(args, sums, updates),
            **gap,
            "learning_rate": self.updater.learning_rate,
            "skipped_updates": self.updater.skipped,
            "time_update": time.perf_counter() - started,
        }

    def accumulate(self, batch: Batch, rows: Tensor) -> dict[str, float]:
        """Add up the gradients of one mini-batch, `rows` [n] int64, and return its loss and statistics.

        Collective: each rank replays its share of the rows, in micro-batches. The statistics are those of all ranks.
        """
        args = self.args
        hidden, batch.hidden = batch.hidden, None  # a graph serves one backward pass
        active = loss_mask(args, batch.rollout)
        total = active[rows].sum()
        sums = torch.zeros(1 + len(PolicyStats._fields), dtype=torch.float64)
        own = self.micro_batches(batch.rollout, share_of_rank(batch.rollout, rows, rank(), world_size()))
        for micro_batch, counts in pad_to_count(own, rows[:1], all_reduce_max(len(own))):
            rollout = batch.rollout.select(micro_batch)
            steps = rollout.mask.shape[1]
            # A filler has an empty mask: it takes part in the collectives and adds nothing.
            mask = active[micro_batch, :steps] & counts
            response_share = counts * len(micro_batch) / len(rows)
            loss, stats = call_inside(
                self.model,
                update_loss,
                self.model,
                rollout,
                batch.old_logprob[micro_batch, :steps],
                batch.advantages[micro_batch, :steps],
                mask,
                None if batch.ref_logprob is None else batch.ref_logprob[micro_batch, :steps],
                args,
                entropy_share(args, mask, total, response_share),
                None if hidden is None else hidden[micro_batch, :steps],
            )
            loss = loss * share_of_update(args, mask, total, response_share)
            self.updater.backward(loss)
            sums[0] += float(loss.detach())
            # A statistic that was not computed is NaN: the entropy, if it has no coefficient.
            token_share = float(mask.sum() / total.clamp_min(1))
            sums[1:] += token_share * torch.nan_to_num(torch.stack(stats)).double().cpu()
        return dict(zip(("loss", *PolicyStats._fields), all_reduce_sum(sums).tolist(), strict=True))

    def evaluate(self) -> dict[str, float]:
        """Return Pass@1 and lengths on the evaluation rows, without noise, as `eval_NAME`; {} without rows."""
        if not self.eval_rows:
            return {}
        given = (self.full_model, self.tokenizer, self.eval_rows, self.sampling)
        return evaluation_metrics(evaluate(*given, prompt_format=self.prompt_format))

    def log_completions(self, batch: Batch) -> None:
        """Print responses and write them to the Parquet log, as the options ask. Only rank 0 does so."""
        if rank():
            return
        assert batch.samples is not None
        sampled = (self.step, self.tokenizer, batch.samples, batch.rollout, batch.rewards, batch.advantages)
        print_completions(*sampled, count=self.args.num_completions_to_print)
        if self.args.log_completions:
            write_completions(self.output_dir, *sampled)

    def save(self) -> Path:
        """Write `output_dir/checkpoint-STEP` and return its path. Collective: every rank must call it."""
        return self.checkpoints.save(self.step, self.collector.position(), self.metrics.history)

    def resume(self, choice: str | bool) -> list[dict[str, Any]]:
        """Restore a checkpoint (`train` says which `choice` there is). Return its metrics so far; [] at the start."""
        self.step, position, history = self.checkpoints.resume(choice)
        self.collector.restore(position)
        return history
