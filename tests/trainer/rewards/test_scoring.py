"""Which reward functions can be named, how they are weighed, and how a failing one is reported."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from latent_grpo.errors import RewardError
from latent_grpo.rewards.functions import accuracy_reward, exact_match_reward
from latent_grpo.rewards.resolve import resolve_reward
from latent_grpo.rewards.scoring import score


def test_resolve_reward(tmp_path: Path) -> None:
    assert resolve_reward("accuracy") is accuracy_reward
    assert resolve_reward(exact_match_reward) is exact_match_reward
    assert resolve_reward("latent_grpo.rewards.functions:exact_match_reward") is exact_match_reward
    path = tmp_path / "mine.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n"
        "@dataclass\nclass Scale:\n    by: float = 3.0\n\n"
        "def tripled(completions, **kwargs):\n    return [Scale().by * len(each) for each in completions]\n",
        encoding="utf-8",
    )
    assert resolve_reward(f"{path}:tripled")(completions=["ab"]) == [6.0]


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("acuracy", "accuracy, exact_match"),
        ("", "accuracy, exact_match"),
        (":f", "accuracy, exact_match"),
        (3, "accuracy, exact_match"),
        ("no_such_module:f", "cannot load 'no_such_module'"),
        ("none.py:f", "no such file"),
        ("math:no_such_function", "has no function 'no_such_function'"),
        ("math:pi", "has no function 'pi'"),
    ],
)
def test_unknown_reward_is_named(spec: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        resolve_reward(spec)
    assert repr(spec) in str(caught.value)


def test_broken_reward_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("raise KeyError('inside')", encoding="utf-8")
    with pytest.raises(ValueError, match="KeyError: 'inside'"):
        resolve_reward(f"{path}:f")


def test_score_weighs_the_functions() -> None:
    def length(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        assert columns["completion_ids"] == [[1], [2, 3]]
        return [None, 2]

    def as_tensor(completions: list[str], **columns: Any) -> Any:
        return torch.tensor([True, False])

    columns = {"answer": ["4", "5"], "completion_ids": [[1], [2, 3]]}
    scores = score([accuracy_reward, length, as_tensor], [1.0, 0.25, -1.0], ["a", "b"], ["4", "5"], columns)
    assert scores.per_function == [[1.0, 1.0], [None, 2.0], [1.0, 0.0]]
    assert scores.total == [0.0, 1.5]
    with pytest.warns(UserWarning, match="1 of 2 completions"):
        assert score([length], None, ["a", "b"], ["4", "5"], columns).total[1] == 2.0
    assert score([], None, [], [], {}).total == []


def raises_on_bad(completions: list[str], tag: list[int], **columns: Any) -> list[float]:
    if "bad" in completions:
        raise KeyError("inner")
    return [float(len(str(each))) for each in tag]


FAILING: dict[str, tuple[Any, int, list[str]]] = {
    "raises": (raises_on_bad, 2, ["'raises_on_bad'", "KeyError", "inner"]),
    "partial raises": (partial(raises_on_bad), 2, ["'raises_on_bad'", "KeyError"]),
    "nan": (lambda **columns: [0.0, float("nan"), 0.0], 1, ["nan", "not a finite number"]),
    "infinite": (lambda **columns: [0.0, 0.0, float("inf")], 2, ["inf", "not a finite number"]),
    "not a number": (lambda **columns: [0.0, "1", 0.0], 1, ["'1'", "not a finite number"]),
    "too few": (lambda **columns: [0.0, 0.0], 2, ["2 rewards for 3 completions"]),
    "too many": (lambda **columns: [0.0] * 4, 2, ["4 rewards for 3 completions"]),
    "no list": (lambda **columns: None, 0, ["NoneType"]),
    "missing column": (accuracy_reward, 0, ["'accuracy_reward'", "answer"]),
}


@pytest.mark.parametrize(("function", "index", "parts"), FAILING.values(), ids=FAILING)
def test_failing_reward_is_named(function: Any, index: int, parts: list[str]) -> None:
    prompts = ["first prompt", "second prompt", "third " + "prompt " * 50]
    completions = ["good", "fine", "bad"]
    with pytest.raises(RewardError) as caught:
        score([function], None, prompts, completions, {"tag": [1, 2, 3]})
    message = str(caught.value)
    for part in [f"sample {index}", prompts[index][:12], repr(completions[index]), *parts]:
        assert part in message
    assert len(message) < 400


def test_failure_of_the_whole_batch_names_its_first_sample() -> None:
    def batch_only(completions: list[str], **columns: Any) -> list[float]:
        if len(completions) > 1:
            raise MemoryError("too many")
        return [0.0]

    with pytest.raises(RewardError, match="'batch_only' raised MemoryError: too many on sample 0"):
        score([batch_only], None, ["p", "q"], ["c", "d"], {})


def test_score_checks_its_lengths() -> None:
    with pytest.raises(ValueError, match="2 reward weights for 1 reward functions"):
        score([accuracy_reward], [1.0, 2.0], ["p"], ["c"], {"answer": ["1"]})
    with pytest.raises(ValueError, match="1 prompts for 2 completions"):
        score([accuracy_reward], None, ["p"], ["c", "d"], {"answer": ["1"]})
