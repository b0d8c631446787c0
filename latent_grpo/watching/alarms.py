"""Alarms that warn of a run that cannot learn or collapses, from the metrics of its steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

WINDOW = 10  # logged steps that are averaged, at the start of the run and now


@dataclass(frozen=True)
class Alarm:
    """Fires once per run, when `alarming(start, now)` is true.

    start and now are means of the metric over WINDOW logged steps: the first steps of the run and the latest.
    """

    metric: str
    alarming: Callable[[float, float], bool]
    message: str  # a format string with {start} and {now}: what happened, what it means, what to do


ALARMS = (
    Alarm(
        "latent/mean_length",
        lambda start, now: now < 0.5 * start,
        "latent length fell from {start:.1f} to {now:.1f} steps: the latent run is collapsing; "
        "lower learning_rate or raise beta",
    ),
    Alarm(
        "latent/mixture_entropy",
        lambda start, now: now < 0.5 * start,
        "mixture entropy fell from {start:.3f} to {now:.3f} nats: latent steps turn into single tokens; "
        "lower learning_rate or raise noise_scale",
    ),
    Alarm(
        "frac_reward_zero_std",
        lambda start, now: now == 1.0,
        "rewards agree within every group: there is nothing to learn from; take harder or easier prompts, "
        "or raise num_generations or noise_scale",
    ),
    Alarm(
        "completions/clipped_ratio",
        lambda start, now: now > start + 0.25,
        "responses cut off by the limit rose from {start:.0%} to {now:.0%}: the end marker is being lost; "
        "lower learning_rate, or raise beta or max_completion_length",
    ),
)


def first_alarms(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a metric and a line for each alarm that the first rollout of a run sets off: cause and remedy."""
    if values.get("completions/clipped_ratio") == 1.0:
        share = values.get("latent/share")
        if share is None:
            cause = "check with doctor --model that prompts and end of sequence are those that the model knows"
        elif share == 1.0:
            cause = "the warm start does not yet end its latent runs: train it longer"
        else:
            cause = "latent runs end, but the text behind them does not: train the warm start longer"
        yield "completions/clipped_ratio", f"every response was cut off; {cause}, or raise max_completion_length"
    elif values.get("frac_reward_zero_std") == 1.0 and values.get("reward_std") == 0.0:
        yield (
            "reward",
            f"every response has the reward {values['reward']:g}: there is nothing to learn; look at some with "
            "num_completions_to_print, and check that the reward reads them and that the prompts are not too hard",
        )


class Alarms:
    """The alarms of one run. Feed `update` the metrics of every logged step, in order."""

    def __init__(self) -> None:
        self.start: dict[str, list[float]] = {alarm.metric: [] for alarm in ALARMS}
        self.recent: dict[str, deque[float]] = {alarm.metric: deque(maxlen=WINDOW) for alarm in ALARMS}
        self.fired: set[str] = set()
        self.begun = False  # whether a rollout was seen

    def update(self, values: dict[str, Any]) -> list[str]:
        """Return a line for each alarm that these values set off. Each alarm fires once per run."""
        lines = []
        if not self.begun and values.get("phase") == "train":
            self.begun = True
            for name, line in first_alarms(values):
                self.fired.add(name)
                lines.append(f"step {values['step']}: {line}")
        for alarm in ALARMS:
            name, value = alarm.metric, values.get(alarm.metric)
            if value is None or values.get("phase") != "train":  # alarms are about reinforcement only
                continue
            start, recent = self.start[name], self.recent[name]
            if len(start) < WINDOW:
                start.append(value)
            recent.append(value)
            if len(recent) < WINDOW or name in self.fired:
                continue
            start_mean, now = sum(start) / WINDOW, sum(recent) / WINDOW
            if alarm.alarming(start_mean, now):
                self.fired.add(name)
                lines.append(f"step {values['step']}: {alarm.message.format(start=start_mean, now=now)}")
        return lines
