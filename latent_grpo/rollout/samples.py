"""The record of a batch of responses that is not made of tensors: prompts, texts, answers and rewards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Samples:
    """Lists of R that go with the R rows of a `Rollout`."""

    prompts: list[Any]  # strings, or lists of chat messages
    completions: list[str]  # the visible texts
    answers: list[Any]  # the references
    # By the name of the reward function, without its weight; None where it does not apply.
    rewards: dict[str, list[float | None]]
    extra: dict[str, list[Any]] = field(default_factory=dict)  # columns that reward functions logged
    metrics: dict[str, list[float]] = field(default_factory=dict)  # values that they logged; of batches, not of rows

    def select(self, rows: Iterable[int]) -> Samples:
        """Return the samples of the rows with these indices, in this order, with all metrics."""
        rows = list(rows)

        def pick(values: list[Any]) -> list[Any]:
            return [values[i] for i in rows]

        rewards = {name: pick(values) for name, values in self.rewards.items()}
        extra = {name: pick(values) for name, values in self.extra.items()}
        return Samples(pick(self.prompts), pick(self.completions), pick(self.answers), rewards, extra, self.metrics)


def concatenate_samples(parts: Sequence[Samples]) -> Samples:
    """Return the samples of all parts in one record. The parts, at least one, have the same reward functions.

    A part without one of the logged columns has None there.
    """
    columns = sorted({name for part in parts for name in part.extra})
    metrics = sorted({name for part in parts for name in part.metrics})
    return Samples(
        prompts=[prompt for part in parts for prompt in part.prompts],
        completions=[text for part in parts for text in part.completions],
        answers=[answer for part in parts for answer in part.answers],
        rewards={name: [reward for part in parts for reward in part.rewards[name]] for name in parts[0].rewards},
        extra={
            name: [value for part in parts for value in part.extra.get(name, [None] * len(part.prompts))]
            for name in columns
        },
        metrics={name: [value for part in parts for value in part.metrics.get(name, [])] for name in metrics},
    )
