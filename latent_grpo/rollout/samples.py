"""The texts of responses, beside their rollout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class Samples:
    """What is known of R responses beyond their rollout; lists of R."""

    prompts: list[Any]
    completions: list[str]
    answers: list[Any]
    rewards: dict[str, list[float]]  # by reward function

    def select(self, rows: Iterable[int]) -> Samples:
        """A part of the rows."""
        rows = list(rows)

        def pick(values: list[Any]) -> list[Any]:
            return [values[i] for i in rows]

        rewards = {name: pick(values) for name, values in self.rewards.items()}
        return Samples(pick(self.prompts), pick(self.completions), pick(self.answers), rewards)


def concatenate_samples(parts: Sequence[Samples]) -> Samples:
    """One of several."""
    return Samples(
        [x for part in parts for x in part.prompts], [x for part in parts for x in part.completions],
        [x for part in parts for x in part.answers],
        {name: [x for part in parts for x in part.rewards[name]] for name in parts[0].rewards},
    )  # fmt: skip
