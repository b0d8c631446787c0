"""Reward functions for verifiable answers.

A reward function has TRL's signature, ``f(prompts, completions, **columns) -> list[float | None]``, and is called by
keyword. A completion is a string, or in conversational form ``[{"role": "assistant", "content": str}]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from latent_grpo.rewards.answers import is_correct

RewardFunc = Callable[..., Sequence[float | None]]
Completion = str | Sequence[Mapping[str, Any]]


def accuracy_reward(completions: Sequence[Completion], answer: Sequence[Any], **kwargs: Any) -> list[float]:
    """1.0 for each completion whose answer equals the reference, else 0.0; `rewards/answers.py` has the rules.

    Args:
        completions: N completions, as strings or in conversational form.
        answer: N references, as strings or numbers.
        kwargs: the other columns, which are not used.

    Raises:
        ValueError: a reference is empty, or there are not as many references as completions.
    """
    pairs = zip(completions, answer, strict=True)
    return [float(is_correct(_visible_text(completion), _reference(gold))) for completion, gold in pairs]


def exact_match_reward(completions: Sequence[Completion], answer: Sequence[Any], **kwargs: Any) -> list[float]:
    """1.0 for each completion whose whole visible text equals the reference, both stripped, else 0.0.

    The arguments and errors are those of ``accuracy_reward``. The visible text is what follows the last ``</think>``,
    or the whole completion where there is none.
    """
    pairs = zip(completions, answer, strict=True)
    return [float(_visible_text(completion) == _reference(gold)) for completion, gold in pairs]


def soft_overlong_reward(
    completion_ids: Sequence[Sequence[int]], max_completion_length: int, soft_punish_cache: int | None = None, **_: Any
) -> list[float]:
    """0.0 for responses that end early, falling to -1.0 over the last steps before the limit (DAPO, arXiv 2503.14476).

    Args:
        completion_ids: N responses; their lengths count, latent steps included.
        max_completion_length: the limit of a response.
        soft_punish_cache: how many last steps; default a fifth of the limit.
    """
    cache = soft_punish_cache or max(1, max_completion_length // 5)
    free = max_completion_length - cache
    return [-min(max(len(ids) - free, 0) / cache, 1.0) for ids in completion_ids]


REWARDS: dict[str, RewardFunc] = {
    "accuracy": accuracy_reward, "exact_match": exact_match_reward, "soft_overlong": soft_overlong_reward
}  # fmt: skip


def _visible_text(completion: Completion) -> str:
    if not isinstance(completion, str):
        completion = str(completion[-1].get("content") or "") if completion else ""
    return completion.rpartition("</think>")[2].strip()


def _reference(gold: Any) -> str:
    text = "" if gold is None else str(gold).strip()
    if not text:
        raise ValueError("a reference answer is empty; every row needs one")
    return text
