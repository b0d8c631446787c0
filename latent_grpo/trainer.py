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

from latent_grpo.checkpoint import find_checkpoint, graceful_interrupt, load_checkpoint, save_checkpoint, save_model
from latent_grpo.config import ConfigError, LatentGRPOConfig, require
from latent_grpo.evaluate import evaluate
from latent_grpo.loss import mean_logprob, replay, replay_logprob, response_mask, step_advantages
from latent_grpo.metrics import Metrics, progress_bar
from latent_grpo.model import encode_prompts, end_marker_ids, eos_ids, lm_head, load_model, load_tokenizer
from latent_grpo.optim import Updater
from latent_grpo.reward import resolve_reward, score
from latent_grpo.rollout import Rollout, concatenate, generate_latent, mixture_entropy, visible_text
from latent_kernels import PolicyStats, fused_policy_loss, group_advantages

AGGREGATIONS = {"dapo": "token-mean", "grpo": "seq-mean-token-mean", "dr_grpo": "seq-mean-token-sum-norm"}
WORD = 2**31


@dataclass
class Batch:
    """A rollout with everything that its update needs. R responses, T steps."""

    rollout: Rollout
    group: Tensor  # [R] int64
    rewards: Tensor  # [R] float32
    old_logprob: Tensor  # [R, T]
    ref_logprob: Tensor | None  # [R, T]
    advantages: Tensor  # [R, T]


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
        if not train_dataset:
            raise ConfigError("train_dataset is empty; give rows with a 'prompt' column")
        self.rows, self.eval_rows = train_dataset, eval_dataset
        self.sampling = replace(args.sampling(), eos_token_id=eos_ids(self.model, self.tokenizer))
        if args.latent:
            self.sampling.end_token_id = end_marker_ids(self.tokenizer, args.end_marker)[0]
            vocab = len(lm_head(self.model))
            require(args.latent_top_k <= vocab, "latent_top_k", args.latent_top_k, f"the vocabulary has {vocab} tokens")
        self.prompts_per_batch = args.generation_batch_size // args.num_generations
        per_epoch = max(1, len(self.rows) // self.prompts_per_batch)
        self.total_steps = args.max_steps if args.max_steps > 0 else max(1, round(per_epoch * args.num_train_epochs))
        rows_per_update = args.per_device_train_batch_size * args.gradient_accumulation_steps
        updates = args.num_iterations * -(-args.generation_batch_size // rows_per_update)
        self.updater = Updater(self.model, args, self.total_steps * updates, args.freeze_embeddings)
        self.reference = None
        if args.beta > 0:
            self.reference = (
                load_model(name, args.dtype, str(self.device)) if isinstance(model, str) else _frozen_copy(model)
            )
        self.step = self.prompts_seen = self.generations = 0

    def train(self, resume_from_checkpoint: str | bool | None = None) -> dict[str, float]:
        """Run to the last step and save; the last step's metrics. KeyboardInterrupt after a checkpoint on SIGINT."""
        args = self.args
        choice = resume_from_checkpoint if resume_from_checkpoint is not None else args.resume_from_checkpoint
        if choice:
            self.resume(find_checkpoint(self.output_dir, choice))
        metrics = Metrics(self.output_dir / "metrics.jsonl", args.report_to, resume=bool(choice))
        values: dict[str, float] = {}
        with graceful_interrupt() as interrupt, progress_bar("Latent-GRPO", self.total_steps, self.step) as bar:
            while self.step < self.total_steps:
                batch, values = self.collect()
                values |= self.update(batch)
                self.step += 1
                if args.eval_steps and self.step % args.eval_steps == 0:
                    values |= self.evaluate()
                if self.step % args.logging_steps == 0:
                    metrics.write({"phase": "train", "step": self.step, **values})
                bar.advance(f"reward {values['reward']:.3f}  steps {values['response_length']:.1f}")
                if interrupt.requested or (args.save_steps and self.step % args.save_steps == 0):
                    self.save()
                if interrupt.requested:
                    raise KeyboardInterrupt
        metrics.close()
        save_model(self.output_dir, self.model, self.tokenizer)
        return values

    def collect(self) -> tuple[Batch, dict[str, float]]:
        """Sample until enough groups disagree in their rewards; old log-probs and advantages; metrics of the
        rollout."""
        args, started = self.args, time.perf_counter()
        rollouts: list[Rollout] = []
        rewards: list[Tensor] = []
        seen_rewards: list[Tensor] = []
        kept_groups, seen_groups = 0, 0
        for _ in range(args.max_generation_batches):
            rollout, reward = self.sample()
            groups = reward.view(-1, args.num_generations)
            keep = (groups != groups[:, :1]).any(-1) if args.group_filter else torch.ones(len(groups), dtype=torch.bool)
            seen_groups, seen_rewards = seen_groups + len(groups), [*seen_rewards, reward]
            keep[keep.cumsum(0) > self.prompts_per_batch - kept_groups] = False
            kept_groups += int(keep.sum())
            if keep.any():
                index = keep.repeat_interleave(args.num_generations).nonzero().squeeze(-1)
                rollouts.append(rollout.select(index.to(self.device)))
                rewards.append(reward[index])
            if kept_groups >= self.prompts_per_batch or not args.group_filter:
                break
        else:
            if args.max_generation_batches > 1:
                warnings.warn(
                    f"step {self.step + 1}: {kept_groups} of {self.prompts_per_batch} groups after "
                    f"{args.max_generation_batches} rollouts; training on what there is", stacklevel=2,
                )  # fmt: skip
        sampled = time.perf_counter()
        if not rollouts:  # every group agrees: an update of zero advantages
            rollouts, rewards = [rollout], [reward]
        everything, reward = concatenate(rollouts), torch.cat(rewards)
        batch, gap = self.prepare(everything, reward.to(self.device))
        all_rewards = torch.cat(seen_rewards)
        tokens = int(everything.mask.sum())
        values = {
            "reward": float(all_rewards.mean()),
            "reward_std": float(all_rewards.view(-1, args.num_generations).std(-1).mean())
            if args.num_generations > 1
            else 0.0,
            "groups_kept": kept_groups / seen_groups,
            **rollout_metrics(everything),
            **gap,
            "time_rollout": sampled - started,
            "time_old_logprob": time.perf_counter() - sampled,
            "tokens_per_second": tokens / max(sampled - started, 1e-9),
        }
        return batch, values

    def sample(self) -> tuple[Rollout, Tensor]:
        """One rollout of the next prompts, and its rewards [R] on the CPU."""
        args = self.args
        rows = [self.rows[i] for i in self.next_prompts()]
        prompts = [row["prompt"] for row in rows]
        ids, mask = encode_prompts(self.tokenizer, prompts, self.device, args.max_prompt_length)
        sampling = replace(self.sampling, seed=args.seed * WORD + self.generations)
        self.generations += 1
        rollout = generate_latent(self.model, ids, mask, sampling, num_generations=args.num_generations)
        texts = visible_text(self.tokenizer, rollout, args.end_marker)
        repeated = [row for row in rows for _ in range(args.num_generations)]
        columns: dict[str, Any] = {k: [row[k] for row in repeated] for k in rows[0] if k != "prompt"}
        columns["completion_ids"] = [t[m].tolist() for t, m in zip(rollout.token, rollout.mask, strict=True)]
        completions: list[Any] = [
            text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
            for text, row in zip(texts, repeated, strict=True)
        ]
        scores = score(self.reward_funcs, args.reward_weights, [r["prompt"] for r in repeated], completions, columns)
        if args.log_completions and self.step % args.logging_steps == 0:
            for prompt, text, value in list(zip(prompts, texts, scores.total, strict=False))[: args.log_completions]:
                print(f"[{value:.2f}] {str(prompt)[-160:]!r} -> {text!r}")
        return rollout, torch.tensor(scores.total, dtype=torch.float32)

    def next_prompts(self) -> list[int]:
        """Indices of the next prompts: every epoch a new order, a function of (seed, epoch) alone."""
        chosen: list[int] = []
        for position in range(self.prompts_seen, self.prompts_seen + self.prompts_per_batch):
            epoch, offset = divmod(position, len(self.rows))
            if not chosen or offset == 0:
                generator = torch.Generator().manual_seed(self.args.seed * WORD + epoch)
                order = torch.randperm(len(self.rows), generator=generator).tolist()
            chosen.append(order[offset])
        self.prompts_seen += self.prompts_per_batch
        return chosen

    @torch.no_grad()
    def prepare(self, rollout: Rollout, rewards: Tensor) -> tuple[Batch, dict[str, float]]:
        """Old (and reference) log-probs, advantages, and the gap between the sampler's and the trainer's log-probs."""
        args, gap = self.args, {}
        old = rollout.logprob
        if args.old_logprobs == "recompute":
            old = self.logprobs(self.model, rollout)
            gap["logprob_gap"] = float(((old - rollout.logprob).abs() * rollout.mask).sum() / rollout.mask.sum())
        group = torch.arange(len(rewards), device=self.device) // args.num_generations
        result = group_advantages(
            rewards, group, invalid_mask=~rollout.finished, invalid=args.invalid,
            normalize_std=args.scale_rewards == "group", mean_logprob=mean_logprob(old, rollout.mask),
            first_token=args.first_token if args.latent else "all",
        )  # fmt: skip
        advantages = step_advantages(result.advantages, result.first_step, old.shape[1])
        reference = None if self.reference is None else self.logprobs(self.reference, rollout)
        return Batch(rollout, group, rewards, old, reference, advantages), gap

    def logprobs(self, model: Any, rollout: Rollout) -> Tensor:
        """Log-probs [R, T] under `model`, a micro-batch at a time."""
        out = torch.zeros_like(rollout.logprob)
        for rows in torch.arange(len(out), device=out.device).split(self.args.per_device_train_batch_size):
            part = replay_logprob(model, rollout.select(rows), self.args.temperature)
            out[rows, : part.shape[1]] = part
        return out

    def update(self, batch: Batch) -> dict[str, float]:
        """PPO epochs over the batch in mini-batches of whole groups; metrics of the updates."""
        args, started = self.args, time.perf_counter()
        size = args.per_device_train_batch_size * args.gradient_accumulation_steps
        sums: dict[str, float] = {}
        updates = 0
        for epoch in range(args.num_iterations):
            generator = torch.Generator().manual_seed((args.seed * WORD + self.step) * args.num_iterations + epoch)
            groups = torch.randperm(len(batch.rewards) // args.num_generations, generator=generator)
            order = (groups.unsqueeze(-1) * args.num_generations + torch.arange(args.num_generations)).flatten()
            for mini in order.to(self.device).split(size):
                stats = self.accumulate(batch, mini)
                if updates == 0 and args.old_logprobs == "rollout":
                    sums["logprob_gap"] = stats["abs_log_ratio"]
                stats["grad_norm"] = self.updater.step()
                updates += 1
                for name, value in stats.items():
                    sums[f"sum_{name}"] = sums.get(f"sum_{name}", 0.0) + value
        means = {name[4:]: value / updates for name, value in sums.items() if name.startswith("sum_")}
        means.pop("abs_log_ratio")
        return {
            **means, **{k: v for k, v in sums.items() if not k.startswith("sum_")},
            "learning_rate": self.updater.learning_rate, "skipped_updates": self.updater.skipped,
            "time_update": time.perf_counter() - started,
        }  # fmt: skip

    def accumulate(self, batch: Batch, rows: Tensor) -> dict[str, float]:
        """Gradients of one mini-batch, a micro-batch at a time; its statistics."""
        args = self.args
        aggregation = AGGREGATIONS[args.loss_type]
        carried = response_mask(batch.rollout, args.loss_on)
        total = carried[rows].sum() if aggregation == "token-mean" else torch.tensor(len(rows))
        sums = dict.fromkeys(("loss", *PolicyStats._fields), 0.0)
        for part in rows.split(args.per_device_train_batch_size):
            rollout = batch.rollout.select(part)
            steps = rollout.mask.shape[1]
            mask = carried[part, :steps]
            # The operator averages over this micro-batch; weigh it by its share of the mini-batch.
            share = mask.sum() / total.clamp_min(1) if aggregation == "token-mean" else len(part) / total
            if aggregation == "seq-mean-token-sum-norm":
                share = share * steps / args.max_completion_length
            loss, stats = fused_policy_loss(
                replay(self.model, rollout), lm_head(self.model), rollout.ids, rollout.scores,
                batch.old_logprob[part, :steps], batch.advantages[part, :steps], mask,
                temperature=args.temperature, margin_gradient=args.margin_gradient,
                clip_low=args.epsilon,
                clip_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
                dual_clip=args.delta, aggregation=aggregation,
                ref_logprob=None if batch.ref_logprob is None else batch.ref_logprob[part, :steps], kl_coef=args.beta,
            )  # fmt: skip
            (loss * share).backward()
            weight = len(part) / len(rows)
            sums["loss"] += float(loss.detach() * share)
            for name, value in zip(PolicyStats._fields, stats, strict=True):
                sums[name] += weight * float(torch.nan_to_num(value))
        return sums

    def evaluate(self) -> dict[str, float]:
        """Pass@1 and lengths on the evaluation rows, noise-free."""
        if not self.eval_rows:
            return {}
        result = evaluate(self.model, self.tokenizer, self.eval_rows, self.sampling, end_marker=self.args.end_marker)
        return {f"eval_{name}": value for name, value in result.items() if isinstance(value, int | float)}

    def save(self) -> Path:
        """Write `checkpoint-STEP`."""
        tensors = {"updater": self.updater.state_dict(), "rng": torch.get_rng_state()}
        state = {"step": self.step, "prompts_seen": self.prompts_seen, "generations": self.generations}
        return save_checkpoint(self.output_dir, self.step, self.model, self.tokenizer, tensors, state)

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint of this configuration."""
        tensors, state = load_checkpoint(folder)
        weights = load_model(str(folder), self.args.dtype, str(self.device))
        self.model.load_state_dict(weights.state_dict())
        self.updater.load_state_dict(tensors["updater"])
        torch.set_rng_state(tensors["rng"])
        self.step, self.prompts_seen, self.generations = state["step"], state["prompts_seen"], state["generations"]


def rollout_metrics(rollout: Rollout) -> dict[str, float]:
    """Lengths, shares and entropy of a rollout."""
    lengths, latent = rollout.lengths.float(), rollout.latent_steps.float()
    return {
        "response_length": float(lengths.mean()),
        "latent_length": float(latent.mean()),
        "latent_share": float(latent.sum() / lengths.sum()),
        "mixture_entropy": float(mixture_entropy(rollout).sum() / latent.sum().clamp_min(1)),
        "truncated": float((~rollout.finished).float().mean()),
    }


def _frozen_copy(model: Any) -> Any:
    """The initial model, kept for the KL penalty."""
    import copy

    return copy.deepcopy(model).requires_grad_(False).eval()
