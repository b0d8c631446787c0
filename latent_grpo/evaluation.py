"""Evaluation: Pass@1 noise-free and under noise, unbiased pass@k, reasoning tokens, all with bootstrap intervals.

Problems are split across the ranks of torch.distributed where that is initialised. Noise comes from row streams, one a
(problem, sample), so the responses depend neither on the ranks nor on the batches.
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
from latent_grpo.model import ModelError, encode_prompts, end_marker_ids
from latent_grpo.parallel.process_group import all_gather, rank, world_size
from latent_grpo.rewards.functions import accuracy_reward
from latent_grpo.rollout.generate import generate_latent
from latent_grpo.rollout.trajectory import Rollout, visible_text
from latent_grpo.watching.metrics import progress_bar

CORRECT = 0.5  # a reward above this counts as solved
CONFIDENCE, RESAMPLES = 0.95, 1000
SAMPLE_STREAMS = 2**32  # sample j of problem i draws from the stream i + j * SAMPLE_STREAMS
MEANS = {
    "pass_at_1": "correct", "reasoning_tokens": "reasoning_tokens", "response_length": "response_length",
    "end_marker_rate": "ended", "truncation_rate": "truncated",
}  # fmt: skip


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate 1 - C(n - c, k) / C(n, k) of solving a problem in k tries, from n samples of which c are
    right. Whole numbers until the last division, so exact to its rounding for every n."""
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs at least {k} samples, got {samples}")
    if not 0 <= correct <= samples:
        raise ValueError(f"{correct} of {samples} samples cannot be right")
    tries = comb(samples, k)
    return (tries - comb(samples - correct, k)) / tries


def bootstrap_interval(
    values: Sequence[float], *, confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = 0
) -> list[float]:
    """Percentile bootstrap interval [low, high] of the mean, by drawing problems with replacement. The same for the
    same seed; [nan, nan] without values. Problems that all agree have an interval of width 0."""
    if not len(values):
        return [float("nan")] * 2
    generator, data = np.random.default_rng(seed), np.asarray(values, dtype=np.float64)
    means = [float(data[generator.integers(len(data), size=len(data))].mean()) for _ in range(resamples)]
    tail = (1.0 - confidence) / 2.0
    return [float(bound) for bound in np.quantile(means, (tail, 1.0 - tail))]


def tokens_before(rollout: Rollout, end_marker: Sequence[int]) -> Tensor:
    """Text tokens before the end marker [R], the ids of which must all be there, in order.

    A response without it counts in full: all of it may be reasoning.
    """
    width = len(end_marker)
    if not 0 < width <= rollout.token.shape[1]:
        return rollout.lengths
    marker = torch.tensor(end_marker, device=rollout.token.device)
    found = (rollout.token.unfold(1, width, 1) == marker).all(-1) & rollout.mask.unfold(1, width, 1).all(-1)
    return torch.where(found.any(-1), found.long().argmax(-1), rollout.lengths)


def evaluate(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Any],
    sampling: LatentSampling,
    *,
    pass_at: Sequence[int] = (1,),
    num_samples: int | None = None,
    batch_size: int = 64,
    end_marker: str = "</think>",
    reward: Callable[..., list[float]] = accuracy_reward,
    label: str = "Evaluation",
    show_progress: bool = False,
) -> dict[str, Any]:
    """Score `rows` (each with prompt and answer); the same result on every rank.

    pass_at: the k of pass@k under noise. num_samples: sampled responses a problem, default max(pass_at); one sample
    is drawn only where num_samples asks for it, so that the default is noise-free alone. batch_size: responses
    decoded at once. sampling: noise and temperature of the samples; its seed names their streams.

    Returns pass_at_1 (one noise-free, greedy response a problem), pass@k under noise for every k (pass@1 is the mean
    accuracy of the samples), and of the noise-free responses reasoning_tokens, response_length (means, in steps),
    end_marker_rate, truncation_rate; num_samples, problems; intervals, a 95% bootstrap interval over problems of
    every mean; and samples, a record a problem (prompt, answer, response, reward, correct, reasoning_tokens,
    response_length, ended, truncated, solved: how many of its samples are right).
    ValueError where pass_at asks for more than num_samples.
    """
    tries = num_samples if num_samples is not None else max(pass_at) if max(pass_at) > 1 else 0
    if tries and max(pass_at) > tries:
        raise ValueError(f"pass@{max(pass_at)} needs at least {max(pass_at)} samples, got num_samples {tries}")
    judge = _Judge(model, tokenizer, sampling, end_marker, reward)
    records: list[dict[str, Any]] = []
    mine = range(rank(), len(rows), world_size())
    batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    with progress_bar(label, len(batches), shown=show_progress) as bar:
        for numbers in batches:
            batch = [rows[i] for i in numbers]
            prompts = encode_prompts(tokenizer, [row["prompt"] for row in batch], model.device)
            found = judge.noise_free(batch, *prompts)
            if tries:
                solved = judge.solved(batch, *prompts, numbers, tries, batch_size)
                found = [{**record, "solved": count} for record, count in zip(found, solved, strict=True)]
            records += [{"number": i, **record} for i, record in zip(numbers, found, strict=True)]
            bar.advance(f"Pass@1 {sum(r['correct'] for r in records) / len(records):.3f}")
    records = sorted(all_gather(records), key=lambda record: int(record["number"]))
    values = {name: [float(r[key]) for r in records] for name, key in MEANS.items()}
    for k in pass_at if tries else ():
        values[f"pass@{k}"] = [pass_at_k(tries, r["solved"], k) for r in records]
    return {
        **{name: sum(column) / max(1, len(column)) for name, column in values.items()},
        "num_samples": tries, "problems": len(rows),
        "intervals": {name: bootstrap_interval(column) for name, column in values.items()},
        "samples": [{key: value for key, value in r.items() if key != "number"} for r in records],
    }  # fmt: skip


@dataclass
class _Judge:
    """Responses of one model and what they are worth. N rows with prompts [N, L] in `ids` and `mask`."""

    model: Any
    tokenizer: Any
    sampling: LatentSampling
    end_marker: str
    reward: Callable[..., list[float]]

    def noise_free(self, rows: list[Any], ids: Tensor, mask: Tensor) -> list[dict[str, Any]]:
        """A record of every row's greedy response."""
        rollout = generate_latent(self.model, ids, mask, replace(self.sampling, noise="none", temperature=0.0))
        texts, rewards = self.read(rollout, rows)
        if self.sampling.latent:
            reasoning, ended = rollout.latent_steps, (~rollout.is_latent & rollout.mask).any(-1)
        else:
            reasoning = tokens_before(rollout, self.marker())
            ended = reasoning < rollout.lengths
        columns = (reasoning.tolist(), rollout.lengths.tolist(), ended.tolist(), rollout.finished.tolist())
        return [
            {
                "prompt": row["prompt"], "answer": row["answer"], "response": text, "reward": value,
                "correct": value > CORRECT, "reasoning_tokens": steps, "response_length": length, "ended": end,
                "truncated": not finished,
            }
            for row, text, value, steps, length, end, finished in zip(rows, texts, rewards, *columns, strict=True)
        ]  # fmt: skip

    def solved(
        self, rows: list[Any], ids: Tensor, mask: Tensor, numbers: Sequence[int], tries: int, max_rows: int
    ) -> list[int]:
        """How many of every row's `tries` samples are right; `numbers` are the problems' places in the data."""
        streams = torch.tensor([i + j * SAMPLE_STREAMS for i in numbers for j in range(tries)], device=ids.device)
        rollout = generate_latent(
            self.model, ids, mask, self.sampling, num_generations=tries, row_ids=streams, max_rows=max_rows
        )
        _, rewards = self.read(rollout, [row for row in rows for _ in range(tries)])
        return [sum(r > CORRECT for r in rewards[i : i + tries]) for i in range(0, len(rewards), tries)]

    def read(self, rollout: Rollout, rows: list[Any]) -> tuple[list[str], list[float]]:
        """Texts and rewards of the responses to `rows`."""
        texts = visible_text(self.tokenizer, rollout, self.end_marker)
        prompts, answers = [row["prompt"] for row in rows], [row["answer"] for row in rows]
        return texts, self.reward(prompts=prompts, completions=texts, answer=answers)

    def marker(self) -> list[int]:
        """Ids of the end marker, none where the tokenizer cannot spell it: text responses need not have one."""
        try:
            return end_marker_ids(self.tokenizer, self.end_marker)
        except ModelError:
            return []
