"""What an update learns from: groups of responses with their rewards, sampled until enough groups disagree.

Every rank samples its share of a rollout's prompts and scores it; then all ranks have all of it, so that groups are
dropped, and advantages taken, as one process would. Noise streams are numbered by a response's place in the whole
rollout, so the responses do not depend on the number of ranks.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from latent_grpo.config import LatentGRPOConfig, LatentSampling
from latent_grpo.model import encode_prompts
from latent_grpo.parallel.process_group import all_gather, rank, world_size
from latent_grpo.parallel.work_split import snake_draft
from latent_grpo.rewards.scoring import reward_names, score
from latent_grpo.rollout.generate import generate_latent
from latent_grpo.rollout.samples import Samples, concatenate_samples
from latent_grpo.rollout.slot_cache import rows_within
from latent_grpo.rollout.trajectory import Rollout, concatenate, mixture_entropy, visible_text
from latent_grpo.update.micro_batches import rows_of

WORD = 2**31


@dataclass
class Groups:
    """Responses, group by group, with their rewards and texts."""

    rollout: Rollout
    rewards: Tensor  # [R] float32
    samples: Samples

    def select(self, rows: Tensor) -> Groups:
        """A part of the responses."""
        return Groups(self.rollout.select(rows), self.rewards[rows], self.samples.select(rows.tolist()))

    def to(self, device: torch.device | str) -> Groups:
        """The same with its tensors on `device`."""
        return replace(self, rollout=self.rollout.to(device), rewards=self.rewards.to(device))


def concatenate_groups(parts: Sequence[Groups]) -> Groups:
    """One of several."""
    rollout, rewards = concatenate([part.rollout for part in parts]), torch.cat([part.rewards for part in parts])
    return Groups(rollout, rewards, concatenate_samples([part.samples for part in parts]))


class Collector:
    """Samples responses to the rows of a data set, in an order that is a function of (seed, epoch) alone."""

    def __init__(
        self, args: LatentGRPOConfig, sampling: LatentSampling, rows: Sequence[Any], tokenizer: Any,
        reward_funcs: Sequence[Callable[..., Any]],
    ) -> None:  # fmt: skip
        self.args, self.sampling, self.rows = args, sampling, rows
        self.tokenizer, self.reward_funcs = tokenizer, reward_funcs
        self.prompts_per_batch = args.generation_batch_size // args.num_generations
        self.prompts_seen = self.generations = 0

    def collect(self, model: Any, step: int) -> tuple[Groups, dict[str, float]]:
        """Groups for update `step`, and the metrics of their rollouts."""
        args, started = self.args, time.perf_counter()
        kept: list[Groups] = []
        seen: list[Tensor] = []
        kept_groups = 0
        for _ in range(args.max_generation_batches):
            found = self.sample(model)
            seen.append(found.rewards)
            keep = self.groups_to_keep(found.rewards, self.prompts_per_batch - kept_groups)
            kept_groups += int(keep.sum())
            if keep.any():
                kept.append(found.select(keep.repeat_interleave(args.num_generations).nonzero().squeeze(-1)))
            if kept_groups >= self.prompts_per_batch or not args.group_filter:
                break
        else:
            if args.max_generation_batches > 1:
                warnings.warn(
                    f"step {step}: {kept_groups} of {self.prompts_per_batch} groups after "
                    f"{args.max_generation_batches} rollouts; training on what there is", stacklevel=2,
                )  # fmt: skip
        # Where every group agrees: an update of zero advantages.
        groups = concatenate_groups(kept or [found])
        seconds = time.perf_counter() - started
        all_rewards = torch.cat(seen).view(-1, args.num_generations)
        values = {
            "reward": float(all_rewards.mean()),
            "reward_std": float(all_rewards.std(-1).mean()),
            "groups_kept": kept_groups / len(all_rewards),
            **rollout_metrics(groups.rollout),
            "time_rollout": seconds,
            "tokens_per_second": int(groups.rollout.mask.sum()) / max(seconds, 1e-9),
        }
        return groups, values

    def groups_to_keep(self, rewards: Tensor, room: int) -> Tensor:
        """The first `room` groups that can be learnt from, of rewards [R]; bool, one a group."""
        groups = rewards.view(-1, self.args.num_generations)
        keep = (groups != groups[:, :1]).any(-1) | (not self.args.group_filter)
        return keep & (keep.cumsum(0) <= room)

    def sample(self, model: Any) -> Groups:
        """One rollout of the next prompts, the same on every rank."""
        rows = [self.rows[i] for i in self.next_prompts()]
        ids, mask = encode_prompts(
            self.tokenizer, [r["prompt"] for r in rows], model.device, self.args.max_prompt_length
        )
        sampling = replace(self.sampling, seed=self.args.seed * WORD + self.generations)
        self.generations += 1
        if world_size() == 1:
            return self.respond(model, sampling, rows, ids, mask, range(len(rows)))
        shares = snake_draft(mask.sum(-1).tolist(), world_size())
        mine = self.respond(model, sampling, rows, ids, mask, shares[rank()])
        everything = concatenate_groups(all_gather([mine.to("cpu")])).to(model.device)
        place = torch.tensor([number for share in shares for number in share]).argsort()
        return everything.select(rows_of(place, self.args.num_generations).to(model.device))

    def respond(
        self, model: Any, sampling: LatentSampling, rows: Sequence[Any], ids: Tensor, mask: Tensor,
        numbers: Sequence[int],
    ) -> Groups:  # fmt: skip
        """Scored responses to the prompts `numbers` of a rollout's rows."""
        args, width = self.args, self.args.num_generations
        index = torch.tensor(list(numbers), device=ids.device)
        streams = rows_of(index, width)
        max_rows = None
        if args.rollout_memory is not None:
            tokens = ids.shape[1] + args.max_completion_length
            max_rows = rows_within(args.rollout_memory, model.config, model.dtype, tokens)
        rollout = generate_latent(
            model, ids[index], mask[index], sampling, num_generations=width, row_ids=streams, max_rows=max_rows
        )
        rewards, samples = self.judge(rollout, [rows[i] for i in numbers for _ in range(width)])
        return Groups(rollout, rewards, samples)

    def judge(self, rollout: Rollout, rows: list[Any]) -> tuple[Tensor, Samples]:
        """Rewards [R] of responses to `rows` [R], and their texts."""
        args = self.args
        texts = visible_text(self.tokenizer, rollout, args.end_marker)
        columns: dict[str, Any] = {k: [row[k] for row in rows] for k in rows[0] if k != "prompt"}
        columns["completion_ids"] = [t[m].tolist() for t, m in zip(rollout.token, rollout.mask, strict=True)]
        columns |= {name: getattr(args, name) for name in ("max_completion_length", "soft_punish_cache")}
        completions: list[Any] = [
            text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
            for text, row in zip(texts, rows, strict=True)
        ]
        prompts = [row["prompt"] for row in rows]
        scores = score(self.reward_funcs, args.reward_weights, prompts, completions, columns)
        named = dict(zip(reward_names(self.reward_funcs), scores.per_function, strict=True))
        samples = Samples(prompts, texts, [row.get("answer") for row in rows], named)
        return torch.tensor(scores.total, dtype=torch.float32, device=rollout.token.device), samples

    def next_prompts(self) -> list[int]:
        """Indices of the next prompts: every epoch a new order."""
        chosen: list[int] = []
        for position in range(self.prompts_seen, self.prompts_seen + self.prompts_per_batch):
            epoch, offset = divmod(position, len(self.rows))
            if not chosen or offset == 0:
                generator = torch.Generator().manual_seed(self.args.seed * WORD + epoch)
                order = torch.randperm(len(self.rows), generator=generator).tolist()
            chosen.append(order[offset])
        self.prompts_seen += self.prompts_per_batch
        return chosen


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
