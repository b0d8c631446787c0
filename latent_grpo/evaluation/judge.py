"""Responses of a model to problems, and what is recorded of each: text, reward, lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from latent_grpo.config import LatentSampling
from latent_grpo.errors import ModelError
from latent_grpo.model import end_marker_ids
from latent_grpo.prompts import PromptFormat, encode_prompts
from latent_grpo.rewards.calls import call_all
from latent_grpo.rollout.generate import generate_latent
from latent_grpo.rollout.trajectory import Rollout, marker_span, visible_text

CORRECT = 0.5  # a response with a reward above this solves its problem
SAMPLE_STREAMS = 2**32  # sample j of problem i draws from the stream i + j * SAMPLE_STREAMS
RUN_SEEDS = 2**31  # seeds of runs, which take the place of j, are below this


def is_solved(reward: float | None) -> bool:
    """Return whether a response with this reward, None if there is none, solves its problem."""
    return reward is not None and reward > CORRECT


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
class Judge:
    """The responses of one model to batches of problems. Prompts are ids and mask [N, L].

    With `run_seeds`, a problem gets one sampled response per run. Otherwise it gets one noise-free, greedy response,
    and `num_samples` sampled ones, of which only the number of correct ones is kept.
    """

    model: Any
    tokenizer: Any
    sampling: LatentSampling
    prompt_format: PromptFormat
    reward: Callable[..., Any]
    num_samples: int
    run_seeds: Sequence[int]
    max_rows: int  # responses that are decoded at a time
    columns: Sequence[str]  # of the data, which the reward gets

    def records(self, rows: list[Any], numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Return a record per problem. `numbers` are the indices of the problems in the data.

        A record has number, prompt, answer, `responses` (those of the runs, or the greedy one) and, if there are
        samples, `solved`: how many of them are correct.
        """
        prompts = [row["prompt"] for row in rows]
        ids, mask = encode_prompts(self.tokenizer, prompts, self.model.device, prompt_format=self.prompt_format)
        if self.run_seeds:
            # The seed picks the streams. So all runs are decoded together, and a prompt is computed once for them.
            key = replace(self.sampling, seed=0)
            responses = self.described(self.sample(key, ids, mask, numbers, self.run_seeds), rows, len(self.run_seeds))
            solved = [sum(response["correct"] for response in of_one) for of_one in responses]
        else:
            greedy = replace(self.sampling, noise="none", temperature=0.0)
            responses = self.described(generate_latent(self.model, ids, mask, greedy), rows, 1)
            solved = self.solved(rows, ids, mask, numbers) if self.num_samples else []
        records = [
            {"number": i, "prompt": row["prompt"], "answer": row.get("answer"), "responses": of_one}
            for i, row, of_one in zip(numbers, rows, responses, strict=True)
        ]
        for record, count in zip(records, solved, strict=False):
            record["solved"] = count
        return records

    def solved(self, rows: list[Any], ids: Tensor, mask: Tensor, numbers: Sequence[int]) -> list[int]:
        """Return the number of correct samples per problem."""
        # Sample j has the same stream whatever `num_samples` is, so more samples keep the first ones.
        rollout = self.sample(self.sampling, ids, mask, numbers, range(self.num_samples))
        _, rewards = self.read(rollout, [row for row in rows for _ in range(self.num_samples)])
        correct = [is_solved(reward) for reward in rewards]
        return [sum(correct[i : i + self.num_samples]) for i in range(0, len(correct), self.num_samples)]

    def sample(
        self, sampling: LatentSampling, ids: Tensor, mask: Tensor, numbers: Sequence[int], places: Sequence[int]
    ) -> Rollout:
        """Return one response to every problem for each of `places`, which set its noise stream."""
        streams = torch.tensor([i + j * SAMPLE_STREAMS for i in numbers for j in places], device=ids.device)
        count = len(places)
        return generate_latent(
            self.model, ids, mask, sampling, num_generations=count, row_ids=streams, max_rows=self.max_rows
        )

    def described(self, rollout: Rollout, rows: list[Any], width: int) -> list[list[dict[str, Any]]]:
        """Return what is recorded of each response, as one list of `width` responses per problem."""
        texts, rewards = self.read(rollout, [row for row in rows for _ in range(width)])
        if self.sampling.latent:
            # A latent run has ended where a text step follows it, the first of which is the end marker.
            reasoning, ended = rollout.latent_steps, (~rollout.is_latent & rollout.mask).any(-1)
        else:
            reasoning = self.reasoning_tokens(rollout)
            ended = reasoning < rollout.lengths
        columns = (reasoning.tolist(), rollout.lengths.tolist(), ended.tolist(), rollout.finished.tolist())
        responses = [
            {
                "response": text,
                "reward": value,
                "correct": is_solved(value),
                "reasoning_steps": steps,
                "response_length": length,
                "ended": end,
                "truncated": not finished,
            }
            for text, value, steps, length, end, finished in zip(texts, rewards, *columns, strict=True)
        ]
        return [responses[i : i + width] for i in range(0, len(responses), width)]

    def read(self, rollout: Rollout, rows: list[Any]) -> tuple[list[str], list[float | None]]:
        """Return the visible texts and the rewards of the responses to `rows`, None where the reward does not apply."""
        texts = visible_text(self.tokenizer, rollout, self.prompt_format.end_marker)
        columns = {name: [row.get(name) for row in rows] for name in self.columns}
        columns["visible_text"] = texts
        return texts, call_all([self.reward], [row["prompt"] for row in rows], texts, columns)[0]

    def reasoning_tokens(self, rollout: Rollout) -> Tensor:
        """Return the number of tokens before the end marker [R] of text responses, however their tokens spell it."""
        counts, lengths, marker = tokens_before(rollout, self.marker()), rollout.lengths, self.prompt_format.end_marker
        for row in (counts == lengths).nonzero().flatten().tolist():
            ids = rollout.token[row, : int(lengths[row])].tolist()
            span = marker_span(self.tokenizer, ids, marker, []) if marker else None
            counts[row] = counts[row] if span is None else span[0]
        return counts

    def marker(self) -> list[int]:
        """Return the ids of the end marker, or none if the tokenizer cannot spell it, which text does not need."""
        try:
            return end_marker_ids(self.tokenizer, self.prompt_format.end_marker)
        except ModelError:
            return []
