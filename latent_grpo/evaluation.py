"""Evaluation: Pass@1 noise-free and under noise, unbiased pass@k, reasoning steps, all with bootstrap intervals.

The problems are split across the ranks of torch.distributed if it is initialised. Each sample of each problem has its
own noise stream, so the responses depend neither on the ranks nor on the batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import comb
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latent_grpo.config import LatentSampling
from latent_grpo.errors import ModelError
from latent_grpo.model import check_vocabulary, end_marker_ids
from latent_grpo.parallel.process_group import all_gather, rank, world_size
from latent_grpo.prompts import PromptFormat, encode_prompts
from latent_grpo.rewards.functions import accuracy_reward
from latent_grpo.rollout.generate import generate_latent
from latent_grpo.rollout.trajectory import Rollout, visible_text
from latent_grpo.watching.metrics import progress_bar

CORRECT = 0.5  # a response with a reward above this solves its problem
CONFIDENCE, RESAMPLES = 0.95, 1000  # of bootstrap intervals
SAMPLE_STREAMS = 2**32  # sample j of problem i draws from the stream i + j * SAMPLE_STREAMS
# Results that are means over problems, and the entry of a problem's record that each is the mean of.
MEANS = {
    "pass_at_1": "correct",
    "reasoning_steps": "reasoning_steps",
    "response_length": "response_length",
    "end_marker_rate": "ended",
    "truncation_rate": "truncated",
}


def evaluate(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Any],
    sampling: LatentSampling,
    *,
    pass_at: Sequence[int] = (1,),
    num_samples: int | None = None,
    batch_size: int = 64,
    prompt_format: PromptFormat | None = None,
    reward: Callable[..., list[float]] = accuracy_reward,
    label: str = "Evaluation",
    show_progress: bool = False,
) -> dict[str, Any]:
    """Score the responses of a model to N problems. Collective: every rank must call it, and gets the same result.

    Every problem gets one noise-free, greedy response, and `num_samples` responses under noise.

    Args:
        model, tokenizer: a causal LM and its tokenizer, as `generate_latent` and `encode_prompts` take them.
        rows: N problems with the keys `prompt` (a string or chat messages) and `answer` (the reference).
        sampling: noise and temperature of the samples, and the seed of their streams.
        pass_at: the k of pass@k.
        num_samples: samples per problem. The default is max(pass_at), or none if that is 1.
        batch_size: responses that are decoded at a time.
        prompt_format: how prompts are put to the model, and what ends the reasoning. Default: `PromptFormat()`.
        reward: called as `reward(prompts=..., completions=..., answer=...)`. A response with a reward above 0.5 is
            correct.
        label, show_progress: the name of the progress bar, and whether rank 0 draws it.

    Returns:
        pass_at_1: the share of problems that the noise-free response solves.
        pass@k: for every k, if there are samples, the unbiased estimate under noise. pass@1 is their mean accuracy.
        reasoning_steps, response_length: means over the noise-free responses, in steps.
        end_marker_rate, truncation_rate: shares of the noise-free responses.
        num_samples, problems: samples per problem, and N.
        intervals: for every mean above, its 95% bootstrap interval [low, high] over problems.
        samples: N records of the noise-free responses in the order of `rows`, with prompt, answer, response, reward,
            correct, reasoning_steps, response_length, ended, truncated, and `solved`, the number of correct samples.

    Raises:
        ValueError: a k of `pass_at` exceeds `num_samples`, or latent sampling has no `end_token_id`.
    """
    if num_samples is None:
        num_samples = max(pass_at) if max(pass_at) > 1 else 0
    if num_samples and max(pass_at) > num_samples:
        raise ValueError(f"pass@{max(pass_at)} needs at least {max(pass_at)} samples, got num_samples {num_samples}")
    prompt_format = prompt_format or PromptFormat()
    check_vocabulary(model, tokenizer, prompt_format, sampling.latent, rows)
    judge = _Judge(model, tokenizer, sampling, prompt_format, reward)
    local = range(rank(), len(rows), world_size())
    batches = [local[i : i + batch_size] for i in range(0, len(local), batch_size)]
    records: list[dict[str, Any]] = []
    with progress_bar(label, len(batches), shown=show_progress) as bar:
        for numbers in batches:
            records += judge.records([rows[i] for i in numbers], numbers, num_samples, batch_size)
            bar.advance(f"Pass@1 {sum(record['correct'] for record in records) / len(records):.3f}")
    records = sorted(all_gather(records), key=lambda record: int(record["number"]))
    return _summary(records, pass_at, num_samples)


def _summary(records: list[dict[str, Any]], pass_at: Sequence[int], num_samples: int) -> dict[str, Any]:
    values = {name: [float(record[key]) for record in records] for name, key in MEANS.items()}
    for k in pass_at if num_samples else ():
        values[f"pass@{k}"] = [pass_at_k(num_samples, record["solved"], k) for record in records]
    return {
        **{name: sum(column) / max(1, len(column)) for name, column in values.items()},
        "num_samples": num_samples,
        "problems": len(records),
        "intervals": {name: bootstrap_interval(column) for name, column in values.items()},
        "samples": [{key: value for key, value in record.items() if key != "number"} for record in records],
    }


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Return the unbiased estimate 1 - C(n - c, k) / C(n, k) of solving a problem in k tries.

    n is `samples`, and c is the number of correct ones. The binomials are whole numbers and only the last division
    rounds, so the estimate is exact to that rounding for every n.

    Raises:
        ValueError: k is not in 1 to n, or c is not in 0 to n.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} samples is not defined; choose k from 1 to the number of samples")
    if not 0 <= correct <= samples:
        raise ValueError(f"{correct} of {samples} samples cannot be right")
    subsets = comb(samples, k)
    return (subsets - comb(samples - correct, k)) / subsets


def bootstrap_interval(
    values: Sequence[float], *, confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = 0
) -> list[float]:
    """Return the percentile bootstrap interval [low, high] of the mean, from draws of problems with replacement.

    The same seed gives the same interval. Without values it is [nan, nan]. If all values are equal, it has width 0.
    """
    if not len(values):
        return [float("nan")] * 2
    generator, data = np.random.default_rng(seed), np.asarray(values, dtype=np.float64)
    means = [float(data[generator.integers(len(data), size=len(data))].mean()) for _ in range(resamples)]
    tail = (1.0 - confidence) / 2.0
    return [float(bound) for bound in np.quantile(means, (tail, 1.0 - tail))]


def tokens_before(rollout: Rollout, end_marker: Sequence[int]) -> Tensor:
    """Return the number of tokens before the whole end marker [R], given by its ids.

    A response without the marker counts in full, because all of it may be reasoning.
    """
    width = len(end_marker)
    if not 0 < width <= rollout.token.shape[1]:
        return rollout.lengths
    marker = torch.tensor(end_marker, device=rollout.token.device)
    starts = (rollout.token.unfold(1, width, 1) == marker).all(-1) & rollout.mask.unfold(1, width, 1).all(-1)
    return torch.where(starts.any(-1), starts.long().argmax(-1), rollout.lengths)


@dataclass
class _Judge:
    """The responses of one model to batches of problems, and their rewards. Prompts are ids and mask [N, L]."""

    model: Any
    tokenizer: Any
    sampling: LatentSampling
    prompt_format: PromptFormat
    reward: Callable[..., list[float]]

    def records(self, rows: list[Any], numbers: Sequence[int], num_samples: int, max_rows: int) -> list[dict[str, Any]]:
        """Return a record per problem. `numbers` are the indices of the problems in the data."""
        ids, mask = encode_prompts(
            self.tokenizer, [row["prompt"] for row in rows], self.model.device, prompt_format=self.prompt_format
        )
        records = self.noise_free(rows, ids, mask)
        if num_samples:
            solved = self.solved(rows, ids, mask, numbers, num_samples, max_rows)
            records = [{**record, "solved": count} for record, count in zip(records, solved, strict=True)]
        return [{"number": i, **record} for i, record in zip(numbers, records, strict=True)]

    def noise_free(self, rows: list[Any], ids: Tensor, mask: Tensor) -> list[dict[str, Any]]:
        """Return a record of the greedy response to each problem."""
        rollout = generate_latent(self.model, ids, mask, replace(self.sampling, noise="none", temperature=0.0))
        texts, rewards = self.read(rollout, rows)
        if self.sampling.latent:
            # A latent run has ended where a text step follows it, the first of which is the end marker.
            reasoning, ended = rollout.latent_steps, (~rollout.is_latent & rollout.mask).any(-1)
        else:
            reasoning = tokens_before(rollout, self.marker())
            ended = reasoning < rollout.lengths
        columns = (reasoning.tolist(), rollout.lengths.tolist(), ended.tolist(), rollout.finished.tolist())
        return [
            {
                "prompt": row["prompt"],
                "answer": row["answer"],
                "response": text,
                "reward": value,
                "correct": value > CORRECT,
                "reasoning_steps": steps,
                "response_length": length,
                "ended": end,
                "truncated": not finished,
            }
            for row, text, value, steps, length, end, finished in zip(rows, texts, rewards, *columns, strict=True)
        ]

    def solved(
        self, rows: list[Any], ids: Tensor, mask: Tensor, numbers: Sequence[int], num_samples: int, max_rows: int
    ) -> list[int]:
        """Return the number of correct samples per problem."""
        # Sample j has the same stream whatever `num_samples` is, so more samples keep the first ones.
        streams = torch.tensor([i + j * SAMPLE_STREAMS for i in numbers for j in range(num_samples)], device=ids.device)
        rollout = generate_latent(
            self.model, ids, mask, self.sampling, num_generations=num_samples, row_ids=streams, max_rows=max_rows
        )
        _, rewards = self.read(rollout, [row for row in rows for _ in range(num_samples)])
        correct = [reward > CORRECT for reward in rewards]
        return [sum(correct[i : i + num_samples]) for i in range(0, len(correct), num_samples)]

    def read(self, rollout: Rollout, rows: list[Any]) -> tuple[list[str], list[float]]:
        """Return the visible texts and the rewards of the responses to `rows`."""
        texts = visible_text(self.tokenizer, rollout, self.prompt_format.end_marker)
        prompts, answers = [row["prompt"] for row in rows], [row["answer"] for row in rows]
        return texts, self.reward(prompts=prompts, completions=texts, answer=answers)

    def marker(self) -> list[int]:
        """Return the ids of the end marker, or none if the tokenizer cannot spell it, which text does not need."""
        try:
            return end_marker_ids(self.tokenizer, self.prompt_format.end_marker)
        except ModelError:
            return []
