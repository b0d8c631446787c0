"""The reward functions: the forms of completions, the references, and the length penalty."""

from __future__ import annotations

from typing import Any

import pytest

from latent_grpo.rewards.functions import accuracy_reward, exact_match_reward, soft_overlong_reward


def test_conversational_completions() -> None:
    chat: list[Any] = [[{"role": "assistant", "content": r"\boxed{4}"}], [{"role": "assistant", "content": None}], []]
    assert accuracy_reward(chat, ["4"] * 3) == [1.0, 0.0, 0.0]


def test_exact_match() -> None:
    completions: list[Any] = [
        " 42\n",
        "<think>x</think> 42",
        "42.0",
        r"\boxed{42}",
        [{"role": "assistant", "content": "42"}],
    ]
    assert exact_match_reward(completions, ["42"] * 5, prompts=["p"] * 5) == [1.0, 1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("function", [accuracy_reward, exact_match_reward])
def test_references_are_checked(function: Any) -> None:
    for empty in (None, " "):
        with pytest.raises(ValueError, match="reference answer is empty"):
            function(completions=["1"], answer=[empty])
    with pytest.raises(ValueError, match=r"shorter|longer"):
        function(completions=["1", "2"], answer=["1"])


def test_soft_overlong_follows_the_formula_of_dapo() -> None:
    limit, cache = 20, 8
    lengths = [0, 1, 12, 13, 16, 19, 20, 25]
    # Eq. 13: 0 up to limit - cache, then (limit - cache - length) / cache, and -1 beyond the limit.
    expected = [0.0, 0.0, 0.0, -1 / 8, -4 / 8, -7 / 8, -1.0, -1.0]
    ids = [[7] * length for length in lengths]
    assert soft_overlong_reward(ids, limit, cache, prompts=None) == expected
    assert soft_overlong_reward(ids, limit) == soft_overlong_reward(ids, limit, 4)
    assert soft_overlong_reward([[1, 2]], 2) == [-1.0]
