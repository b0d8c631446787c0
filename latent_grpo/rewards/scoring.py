"""Score a batch of completions with the reward functions of a run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from latent_grpo.errors import RewardError
from latent_grpo.rewards.answers import Completion
from latent_grpo.rewards.calls import call_all, name_of
from latent_grpo.rewards.functions import RewardFunc


@dataclass
class Scores:
    """Rewards of N samples by F functions, and what the functions logged."""

    per_function: list[list[float | None]]  # [F][N], without the weights; None where a function does not apply
    total: list[float]  # [N], the weighted sums; NaN where no function applies
    extra: dict[str, list[Any]] = field(default_factory=dict)  # columns of N values, by `log_extra`
    metrics: dict[str, list[float]] = field(default_factory=dict)  # values of one batch, by `log_metric`

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Add a column of N values to the log of responses. Given to reward functions, as in TRL."""
        count = len(self.total)
        if len(values) != count:
            raise ValueError(f"log_extra({column!r}, ...) got {len(values)} values for {count} completions")
        self.extra[column] = list(values)

    def log_metric(self, name: str, value: float) -> None:
        """Add a value to a metric, the mean of the values of one step. Given to reward functions, as in TRL."""
        self.metrics.setdefault(name, []).append(float(value))


def score(
    reward_funcs: Sequence[RewardFunc],
    weights: Sequence[float] | None,
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    columns: Mapping[str, Any],
    timeout: float | None = None,
) -> Scores:
    """Score N samples with every function, and return the rewards and their weighted sums.

    Args:
        reward_funcs: F functions, each called as ``f(prompts=..., completions=..., **columns)``, with ``log_extra`` and
            ``log_metric`` besides (see ``Scores``). A function may be asynchronous.
        weights: F weights. None gives every function the weight 1.
        prompts: N prompts.
        completions: N completions.
        columns: further keyword arguments of the functions: data columns and ``completion_ids`` as lists of N, and
            values of any other kind.
        timeout: seconds that one function may take; None sets no limit.

    Returns:
        ``Scores``. A function returns None for a sample that it does not apply to. The sum leaves it out. A sample that
        no function applies to has no reward: NaN, with a warning.

    Raises:
        RewardError: a function raised, took too long, or did not return N finite numbers or None. The message names
            the function with its file and line, and the sample.
        ValueError: the number of weights is not F, or the number of prompts is not N.
    """
    weights = [1.0] * len(reward_funcs) if weights is None else weights
    if len(weights) != len(reward_funcs):
        raise ValueError(f"{len(weights)} reward weights for {len(reward_funcs)} reward functions; give one each")
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts for {len(completions)} completions; give one each")
    scores = Scores([], [math.nan] * len(completions))
    logs: dict[str, Callable[..., None]] = {"log_extra": scores.log_extra, "log_metric": scores.log_metric}
    scores.per_function = call_all(reward_funcs, prompts, completions, {**columns, **logs}, timeout)
    scores.total = [_weighted_sum(weights, rewards) for rewards in zip(*scores.per_function, strict=True)]
    unscored = [i for i, value in enumerate(scores.total) if math.isnan(value)]
    if unscored:
        excerpt = f"{prompts[unscored[0]]!r:.80}"
        warnings.warn(
            f"every reward function returned None for {len(unscored)} of {len(completions)} completions, the first to "
            f"the prompt {excerpt}; they are left out",
            stacklevel=2,
        )
    return scores


def _weighted_sum(weights: Sequence[float], rewards: Sequence[float | None]) -> float:
    parts = [weight * reward for weight, reward in zip(weights, rewards, strict=True) if reward is not None]
    return sum(parts) if parts else math.nan


def reward_names(functions: Sequence[RewardFunc]) -> list[str]:
    """Return one name per reward function. Functions of the same name get their index behind it."""
    names = [name_of(function) for function in functions]
    return [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]


def metric_means(metrics: Mapping[str, Sequence[float]], taken: Mapping[str, Any]) -> dict[str, float]:
    """Return the mean of each metric of `log_metric`. RewardError for one whose name is `taken` by a run's own.

    Names of metrics that are not there at every step are taken too.
    """
    for name in metrics:
        if name in taken or name in ("phase", "step") or name.startswith("eval_"):
            raise RewardError(f"log_metric({name!r}, ...) has the name of a metric of the run; choose another name")
    return {name: sum(values) / len(values) for name, values in metrics.items() if values}
