"""How reward functions are called: keywords, asynchronous functions, None, logs, and where a failing one failed."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from latent_grpo.errors import ConfigError, RewardError
from latent_grpo.rewards import time_limit
from latent_grpo.rewards.resolve import resolve_reward, resolve_rewards
from latent_grpo.rewards.scoring import metric_means, reward_names, score

PROMPTS, COMPLETIONS = ["p", "q", "r"], ["a", "bb", "ccc"]


def rewards_of(function: Any, **columns: Any) -> list[float | None]:
    return score([function], None, PROMPTS, COMPLETIONS, columns).per_function[0]


async def slow_length(completions: list[str], scale: float = 1.0, **columns: Any) -> list[float]:
    await asyncio.sleep(0.2)
    return [scale * len(text) for text in completions]


class AsyncObject:
    async def __call__(self, completions: list[str], **columns: Any) -> list[float | None]:
        await asyncio.sleep(0.2)
        return [None, *(float(len(text)) for text in completions[1:])]


def test_asynchronous_functions_of_every_kind_run_at_the_same_time() -> None:
    functions = [slow_length, partial(slow_length, scale=2.0), AsyncObject(), lambda **columns: slow_length(**columns)]
    score(functions[:1], None, PROMPTS, COMPLETIONS, {})
    start = time.perf_counter()
    scores = score(functions, [1.0, 1.0, 1.0, 0.0], PROMPTS, COMPLETIONS, {})
    assert time.perf_counter() - start < 0.5
    assert scores.per_function == [[1, 2, 3], [2, 4, 6], [None, 2, 3], [1, 2, 3]]
    assert scores.total == [3, 8, 12]


def test_an_asynchronous_function_works_inside_a_running_loop() -> None:
    async def notebook() -> list[float | None]:
        return rewards_of(slow_length)

    assert asyncio.run(notebook()) == [1, 2, 3]


def test_a_loop_lasts_from_call_to_call() -> None:
    loops = []

    async def remember(completions: list[str]) -> list[float]:
        loops.append(asyncio.get_running_loop())
        return [0.0] * len(completions)

    for _ in range(2):
        rewards_of(remember)
    assert loops[0] is loops[1]


def test_a_function_gets_the_keywords_that_it_names() -> None:
    def narrow(completions: list[str], answer: list[str], absent: int = 5) -> list[float]:
        assert absent == 5
        return [float(text == right) for text, right in zip(completions, answer, strict=True)]

    assert rewards_of(narrow, answer=["a", "b", "c"], other=[1, 2, 3]) == [1, 0, 0]

    def wide(**columns: Any) -> list[float]:
        assert {"prompts", "completions", "answer", "log_extra", "log_metric"} == set(columns)
        return [0.0] * 3

    assert rewards_of(wide, answer=["a", "b", "c"]) == [0, 0, 0]


def test_none_is_left_out_of_the_sum_and_a_sample_without_any_reward_has_none() -> None:
    def first(completions: list[str]) -> list[float | None]:
        return [None, 1.0, None]

    def second(completions: list[str]) -> list[float | None]:
        return [2.0, 3.0, None]

    with pytest.warns(UserWarning, match="None for 1 of 3 completions, the first to the prompt 'r'"):
        scores = score([first, second], [0.5, 2.0], PROMPTS, COMPLETIONS, {})
    assert scores.total[:2] == [4.0, 6.5]
    assert math.isnan(scores.total[2])
    assert scores.per_function == [[None, 1.0, None], [2.0, 3.0, None]]


def test_logs_of_functions() -> None:
    def logging(completions: list[str], log_extra: Any, log_metric: Any) -> list[float]:
        log_extra("length", [len(text) for text in completions])
        log_metric("mean_length", 2)
        log_metric("mean_length", 4)
        return [0.0] * len(completions)

    scores = score([logging], None, PROMPTS, COMPLETIONS, {})
    assert scores.extra == {"length": [1, 2, 3]}
    assert metric_means(scores.metrics, {"reward": 1.0}) == {"mean_length": 3.0}
    with pytest.raises(RewardError, match=r"log_metric\('mean_length', ...\) has the name of a metric"):
        metric_means(scores.metrics, {"mean_length": 1.0})

    def short(log_extra: Any, **columns: Any) -> list[float]:
        log_extra("length", [1])
        return [0.0]

    with pytest.raises(RewardError, match=r"log_extra\('length', ...\) got 1 values for 3 completions"):
        rewards_of(short)


def test_names() -> None:
    assert reward_names([partial(slow_length), AsyncObject(), slow_length]) == [
        "slow_length_0",
        "AsyncObject",
        "slow_length_2",
    ]


FILE = """import functools

def helper(text):
    return {}[text]

def fails(completions, **columns):
    texts = list(completions)
    return [helper(text) for text in texts]

async def fails_later(completions, **columns):
    return [helper(text) for text in completions]

class Judge:
    def __call__(self, completions, **columns):
        raise ValueError("first line\\nsecond line")

judge = Judge()

def needs(completions, gold):
    return [0.0]

bound = functools.partial(fails)
def wrong(completions, **columns):
    return [0.0, float("inf"), None]
"""


@pytest.mark.parametrize(
    ("name", "line", "parts"),
    [
        ("fails", 4, ["'fails' raised KeyError: 'a' on sample 0", "completion 'a'"]),
        ("fails_later", 4, ["'fails_later' raised KeyError: 'a'"]),
        ("judge", 15, ["'Judge' raised ValueError: first line on sample 0"]),
        ("needs", 19, ["'needs' raised TypeError", "'gold'"]),
        ("bound", 4, ["'fails' raised KeyError"]),
        ("wrong", 23, ["'wrong' returned inf, not a finite number or None, on sample 1", "completion 'bb'"]),
    ],
)
def test_a_failing_function_is_named_with_its_file_and_line(
    name: str, line: int, parts: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(FILE, encoding="utf-8")
    function = resolve_reward(f"{path}:{name}")
    with pytest.raises(RewardError) as caught:
        score([function], None, PROMPTS, COMPLETIONS, {})
    message = str(caught.value)
    for part in [f"({path}:{line})", *parts]:
        assert part in message, message
    assert "\n" not in message
    assert "returned" in message or caught.value.__cause__ is not None


def test_a_run_needs_a_reward() -> None:
    with pytest.raises(ConfigError, match=r"reward_funcs is \[\]: give at least one reward"):
        resolve_rewards([], None)


def hanging(completions: list[str], **columns: Any) -> list[float]:
    with contextlib.suppress(Exception):  # as a client does that must never fail
        time.sleep(30)
    return [0.0] * len(completions)


async def hanging_client(completions: list[str], **columns: Any) -> list[float]:
    await asyncio.sleep(30)
    return [0.0] * len(completions)


@pytest.mark.parametrize("function", [hanging, hanging_client])
def test_a_function_that_hangs_is_stopped_at_the_limit(
    function: Any, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(time_limit, "SLOW_SECONDS", 0.1)
    before = signal.getsignal(signal.SIGUSR2)
    start = time.perf_counter()
    with pytest.raises(RewardError, match=f"{function.__name__}.* ran longer than reward_timeout 0.5 s"):
        score([function], None, PROMPTS, COMPLETIONS, {}, timeout=0.5)
    assert time.perf_counter() - start < 10
    assert f"{function.__name__}" in capfd.readouterr().err  # the line that says what the run waits for
    assert signal.getsignal(signal.SIGUSR2) == before
    assert score([slow_length], None, PROMPTS, COMPLETIONS, {}, timeout=20.0).total == [1, 2, 3]


def test_a_limit_holds_in_a_thread_too() -> None:
    def slow(completions: list[str], **columns: Any) -> list[float]:
        time.sleep(0.4)
        return [0.0] * len(completions)

    caught: list[BaseException] = []

    def run() -> None:
        try:
            score([slow], None, PROMPTS, COMPLETIONS, {}, timeout=0.2)
        except RewardError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert "ran longer than reward_timeout 0.2 s" in str(caught[0])
