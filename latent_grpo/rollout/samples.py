"""The record of a batch of responses that is not made of tensors: prompts, texts, answers and rewards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class Samples:
    """Lists of R that go with the R rows of a `Rollout`."""

    prompts: list[Any]  # strings, or lists of chat messages
    completions: list[str]  # the visible texts
    answers: list[Any]  # the references
    rewards: dict[str, list[float]]  # by the name of the reward function, without its weight

    def select(self, rows: Iterable[int]) -> Samples:
        """Return the samples of the rows with these indices, in this order."""
        rows = list(rows)

        def pick(values: list[Any]) -> list[Any]:
            return [values[i] for i in rows]

        rewards = {name: pick(values) for name, values in self.rewards.items()}
        return Samples(pick(self.prompts), pick(self.completions), pick(self.answers), rewards)


def concatenate_samples(parts: Sequence[Samples]) -> Samples:
    """Return the samples of all parts in one record. The parts, at least one, have the same reward functions."""
    return Samples(
        prompts=[prompt for part in parts for prompt in part.prompts],
        completions=[text for part in parts for text in part.completions],
        answers=[answer for part in parts for answer in part.answers],
        rewards={name: [reward for part in parts for reward in part.rewards[name]] for name in parts[0].rewards},
    )
