"""What an update learns from: groups of responses with rewards, sampled until enough groups disagree.

Every rank samples and scores its share of a rollout's prompts. Then all ranks get the whole rollout, so that each drops
groups and takes advantages as a single process would. The noise of a response depends on its number in the whole
rollout, so responses do not depend on the number of ranks.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerState

from latent_grpo.config import LatentGRPOConfig, LatentSampling
from latent_grpo.errors import RewardError
from latent_grpo.parallel.process_group import all_gather, raise_together, rank, world_size
from latent_grpo.parallel.work_split import rows_of_groups, snake_draft
from latent_grpo.prompts import PromptFormat, encode_prompts
from latent_grpo.rewards.columns import check_columns, reward_columns
from latent_grpo.rewards.scoring import reward_names, score
from latent_grpo.rollout.generate import generate_latent
from latent_grpo.rollout.response_text import response_texts
from latent_grpo.rollout.samples import Samples, concatenate_samples
from latent_grpo.rollout.slot_cache import rows_within
from latent_grpo.rollout.trajectory import Rollout, concatenate, latent_share, mixture_entropy, visible_text
from latent_grpo.seeds import derive_seed, shuffle_seed

AGREEMENT = 1e-6  # rewards that differ by less are equal up to the rounding of their sums
POSITION = ("prompts_seen", "generations", "tokens_seen")  # what a checkpoint keeps


@dataclass
class Groups:
    """R responses, group after group, with their rewards and texts."""

    rollout: Rollout
    rewards: Tensor  # [R] float32; NaN without one
    samples: Samples

    def select(self, rows: Tensor) -> Groups:
        """Return the responses `rows` [n] int64, in that order."""
        return Groups(self.rollout.select(rows), self.rewards[rows], self.samples.select(rows.tolist()))

    def to(self, device: torch.device | str) -> Groups:
        """Return the same groups with their tensors on `device`."""
        return replace(self, rollout=self.rollout.to(device), rewards=self.rewards.to(device))


def concatenate_groups(several: Sequence[Groups]) -> Groups:
    """Concatenate the responses of several `Groups`."""
    rollout = concatenate([groups.rollout for groups in several])
    rewards = torch.cat([groups.rewards for groups in several])
    return Groups(rollout, rewards, concatenate_samples([groups.samples for groups in several]))


class Collector:
    """Sample responses to the rows of a data set. Each epoch has its own order, a function of (seed, epoch).

    Args:
        args: the options of the run.
        sampling: the options of a rollout, with the ids of the tokenizer.
        rows: the data set; each row is a mapping with the key "prompt".
        tokenizer: the tokenizer.
        reward_funcs: functions with TRL's signature.
        prompt_format: how prompts are put to the model, and the end marker.

    Attributes:
        prompts_per_batch: prompts of one rollout, P. Each has `args.num_generations` responses.
        prompts_seen, generations, tokens_seen: prompts, rollouts and tokens of both so far. A checkpoint keeps them.
        state: the progress of the run, which reward functions get as `trainer_state`. The trainer keeps it up to date.
    """

    def __init__(
        self,
        args: LatentGRPOConfig,
        sampling: LatentSampling,
        rows: Sequence[Any],
        tokenizer: Any,
        reward_funcs: Sequence[Callable[..., Any]],
        prompt_format: PromptFormat,
    ) -> None:
        self.args, self.sampling, self.rows = args, sampling, rows
        self.tokenizer, self.reward_funcs, self.prompt_format = tokenizer, reward_funcs, prompt_format
        self.prompts_per_batch = args.generation_batch_size // args.num_generations
        self.prompts_seen = self.generations = self.tokens_seen = 0
        self.columns = reward_columns(rows)  # of the data
        check_columns(reward_funcs, rows, self.columns)
        self.state = TrainerState()

    def collect(self, model: Any, step: int) -> tuple[Groups, dict[str, float]]:
        """Return the groups for update number `step`, and the metrics of their rollouts.

        Collective: every rank must call it; every rank gets all groups. Warns if `max_generation_batches` rollouts did
        not give enough groups. Without a single group that disagrees, the last rollout is returned: its
        advantages are zero.
        """
        args, started = self.args, time.perf_counter()
        kept: list[Groups] = []
        all_rewards: list[Tensor] = []
        all_samples: list[Samples] = []
        kept_count = 0
        # Dynamic sampling: new prompts replace the groups that agree, from which nothing can be learnt.
        for _ in range(args.max_generation_batches):
            groups = self.sample(model)
            self.tokens_seen += tokens_of(groups.rollout)
            all_rewards.append(groups.rewards)
            all_samples.append(groups.samples)
            keep = self.groups_to_keep(groups.rewards, self.prompts_per_batch - kept_count)
            kept_count += int(keep.sum())
            if keep.any():
                rows = keep.repeat_interleave(args.num_generations).nonzero().squeeze(-1)
                kept.append(groups.select(rows))
            if kept_count >= self.prompts_per_batch or not args.group_filter:
                break
        else:
            if args.max_generation_batches > 1:
                warnings.warn(
                    f"step {step}: {kept_count} of {self.prompts_per_batch} groups after "
                    f"{args.max_generation_batches} rollouts; training on what there is",
                    stacklevel=2,
                )
        batch = concatenate_groups(kept or [groups])
        everything = concatenate_samples(all_samples)
        batch.samples.metrics = everything.metrics
        seconds = time.perf_counter() - started
        # The metrics are of all responses. The filter would hide prompts that are always or never solved.
        by_group = torch.cat(all_rewards).view(-1, args.num_generations)
        values = {
            "reward": float(by_group.nanmean()),
            "reward_std": nan_std(by_group.flatten()),
            "frac_reward_zero_std": agreeing_share(by_group),
            **function_metrics(everything.rewards),
            "groups_kept": kept_count / len(by_group),
            "epoch": self.prompts_seen / len(self.rows),
            "num_tokens": self.tokens_seen,
            **rollout_metrics(batch.rollout, latent=args.latent),
            "time_rollout": seconds,
            "tokens_per_second": int(batch.rollout.mask.sum()) / max(seconds, 1e-9),
        }
        return batch, values

    def groups_to_keep(self, rewards: Tensor, limit: int) -> Tensor:
        """Return which groups of rewards [R] to keep, one bool per group: the first `limit` groups that disagree.

        A group of equal rewards has no advantages; a response without a reward takes no part. Without `group_filter`,
        every group counts as one that disagrees.
        """
        groups = rewards.view(-1, self.args.num_generations)
        lowest, highest = groups.nan_to_num(torch.inf).amin(-1), groups.nan_to_num(-torch.inf).amax(-1)
        keep = (lowest < highest) | (not self.args.group_filter)
        return keep & (keep.cumsum(0) <= limit)

    def sample(self, model: Any) -> Groups:
        """Return scored responses to the next prompts. Collective: every rank must call it, and gets all responses."""
        rows = [self.rows[i] for i in self.next_prompts()]
        prompts = [row["prompt"] for row in rows]
        ids, mask = encode_prompts(self.tokenizer, prompts, model.device, self.prompt_format)
        sampling = replace(self.sampling, seed=derive_seed(self.args.seed, self.generations))
        self.generations += 1
        if world_size() == 1:
            return self.respond(model, sampling, rows, ids, mask, range(len(rows)))
        # By the length of the prompts: the length of a response is not known before it is sampled.
        shares = snake_draft(mask.sum(-1).tolist(), world_size())
        own, failed = None, None
        try:
            own = self.respond(model, sampling, rows, ids, mask, shares[rank()])
        except RewardError as error:  # the other ranks are about to wait for this one
            failed = error
        raise_together(failed)
        assert own is not None
        gathered = concatenate_groups(all_gather([own.to("cpu")])).to(model.device)
        # The gathered prompts stand rank after rank. Put them back into the order of the rollout.
        order = torch.tensor([index for share in shares for index in share]).argsort()
        return gathered.select(rows_of_groups(order, self.args.num_generations).to(model.device))

    def respond(
        self,
        model: Any,
        sampling: LatentSampling,
        rows: Sequence[Any],
        ids: Tensor,
        mask: Tensor,
        indices: Sequence[int],
    ) -> Groups:
        """Return scored responses to some prompts of a rollout.

        rows, ids [P, L], mask [P, L]: all prompts of the rollout. indices: those that this rank answers.
        """
        args, width = self.args, self.args.num_generations
        index = torch.tensor(list(indices), device=ids.device)
        streams = rows_of_groups(index, width)  # numbers of the responses in the whole rollout
        max_rows = None  # how many responses are decoded at a time; the others wait for a free slot
        if args.rollout_memory is not None:
            tokens = ids.shape[1] + args.max_completion_length
            max_rows = rows_within(args.rollout_memory, model, tokens)
        rollout = generate_latent(
            model, ids[index], mask[index], sampling, num_generations=width, row_ids=streams, max_rows=max_rows
        )
        rewards, samples = self.judge(rollout, [rows[i] for i in indices for _ in range(width)])
        return Groups(rollout, rewards, samples)

    def judge(self, rollout: Rollout, rows: list[Any]) -> tuple[Tensor, Samples]:
        """Return the rewards [R] float32 and the texts of responses. rows [R]: the data row of each response.

        Reward functions get what TRL gives them: prompts, completions (messages if the prompt is a list of messages),
        `completion_ids`, `trainer_state`, and every other column of the data, with None where a row lacks it. Besides,
        they get `visible_text`, and two options that `soft_overlong` needs.
        """
        args = self.args
        texts = visible_text(self.tokenizer, rollout, self.prompt_format.end_marker)
        columns: dict[str, Any] = {name: [row.get(name) for row in rows] for name in self.columns}
        columns |= {"trainer_state": self.state, "visible_text": texts}
        columns["completion_ids"] = [
            token[mask].tolist() for token, mask in zip(rollout.token, rollout.mask, strict=True)
        ]
        columns |= {name: getattr(args, name) for name in ("max_completion_length", "soft_punish_cache")}
        given = texts
        if args.reward_completions == "response":
            given = response_texts(self.tokenizer, rollout, self.prompt_format, texts, args.latent)
        completions: list[Any] = [
            text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
            for text, row in zip(given, rows, strict=True)
        ]
        prompts = [row["prompt"] for row in rows]
        scores = score(self.reward_funcs, args.reward_weights, prompts, completions, columns, args.reward_timeout)
        by_function = dict(zip(reward_names(self.reward_funcs), scores.per_function, strict=True))
        answers = [row.get("answer") for row in rows]
        samples = Samples(prompts, texts, answers, by_function, scores.extra, scores.metrics)
        return torch.tensor(scores.total, dtype=torch.float32, device=rollout.token.device), samples

    def position(self) -> dict[str, int]:
        """Return how far the data has been read, for a checkpoint."""
        return {name: getattr(self, name) for name in POSITION}

    def restore(self, position: Mapping[str, int]) -> None:
        """Go to a `position`, or to the start if it is empty."""
        for name in POSITION:
            setattr(self, name, position.get(name, 0))

    def next_prompts(self) -> list[int]:
        """Return the indices of the next `prompts_per_batch` rows. Every epoch has a new order."""
        indices: list[int] = []
        # The order is drawn again from the epoch's number, so that a resumed run needs only `prompts_seen`.
        for position in range(self.prompts_seen, self.prompts_seen + self.prompts_per_batch):
            epoch, offset = divmod(position, len(self.rows))
            if not indices or offset == 0:  # a batch may reach over the end of an epoch
                generator = torch.Generator().manual_seed(shuffle_seed(derive_seed(self.args.seed, epoch)))
                order = torch.randperm(len(self.rows), generator=generator).tolist()
            indices.append(order[offset])
        self.prompts_seen += self.prompts_per_batch
        return indices


def function_metrics(rewards: Mapping[str, Sequence[float | None]]) -> dict[str, float]:
    """Return mean and standard deviation of each function's rewards, without its weight, where it applies.

    A function that applies nowhere has none. The deviation has Bessel's correction.
    """
    values: dict[str, float] = {}
    for name, given in rewards.items():
        applied = torch.tensor([reward for reward in given if reward is not None], dtype=torch.float64)
        if len(applied):
            values[f"rewards/{name}/mean"] = float(applied.mean())
            values[f"rewards/{name}/std"] = float(applied.std()) if len(applied) > 1 else 0.0
    return values


def agreeing_share(rewards: Tensor) -> float:
    """Return the share of groups of rewards [P, G] whose rewards agree, up to rounding, without NaN rewards."""
    spread = rewards.nan_to_num(-torch.inf).amax(-1) - rewards.nan_to_num(torch.inf).amin(-1)
    return float((spread < AGREEMENT).double().mean())  # -inf where a group has no reward at all


def nan_std(rewards: Tensor) -> float:
    """Return the standard deviation of rewards [R] with Bessel's correction, without NaN; 0 of fewer than two."""
    scored = rewards[~rewards.isnan()]
    return float(scored.std()) if len(scored) > 1 else 0.0


def tokens_of(rollout: Rollout) -> int:
    """Return the number of tokens of the responses, each with its prompt, as TRL counts them."""
    return int(rollout.mask.sum() + rollout.prompt_mask.sum(-1)[rollout.prompt_index].sum())


def rollout_metrics(rollout: Rollout, *, latent: bool) -> dict[str, float]:
    """Return lengths of the responses in steps, the share that was cut off, and the entropy of text steps in nats.

    latent: return lengths, shares and mixture entropy of the latent steps too. The share per prompt is the mean of the
    shares of each prompt's responses, in which a prompt with long responses weighs no more than another.
    """
    lengths, ended, text = rollout.lengths.float(), rollout.finished, rollout.mask & ~rollout.is_latent
    of_ended = lengths[ended] if ended.any() else lengths.new_zeros(1)
    values = {
        f"completions/{name}": float(value)
        for suffix, some in (("length", lengths), ("terminated_length", of_ended))
        for name, value in (
            (f"mean_{suffix}", some.mean()),
            (f"min_{suffix}", some.min()),
            (f"max_{suffix}", some.max()),
        )
    }
    values["completions/clipped_ratio"] = float((~ended).float().mean())
    if text.any():
        values["entropy"] = -float(rollout.logprob[text].mean())
    if latent:
        steps = rollout.latent_steps.float()
        values |= {
            "latent/mean_length": float(steps.mean()),
            "latent/share": float(steps.sum() / lengths.sum()),
            "latent/share_per_prompt": float(latent_share(rollout).mean()),
            "latent/mixture_entropy": float(mixture_entropy(rollout).sum() / steps.sum().clamp_min(1)),
        }
    return values
