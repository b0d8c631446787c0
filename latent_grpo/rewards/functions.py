"""Reward functions for verifiable answers.

A reward function has TRL's signature, ``f(prompts, completions, **columns) -> list[float | None]``, and is called by
keyword. A completion is a string, or in conversational form ``[{"role": "assistant", "content": str}]``. The trainer
gives the whole response as completion, and as ``visible_text`` what follows the latent run, where answers are looked
for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from latent_grpo.rewards.answers import Completion, completion_text, is_correct, reference_text

RewardFunc = Callable[..., Sequence[float | None]]


def accuracy_reward(
    completions: Sequence[Completion], answer: Sequence[Any], visible_text: Sequence[str] | None = None, **kwargs: Any
) -> list[float]:
    """Return 1.0 for each completion whose answer equals the reference, else 0.0.

    The rules of reading and comparing answers are in `rewards/answers.py`.

    Args:
        completions: N completions, as strings or in conversational form.
        answer: N references, as strings or numbers.
        visible_text: N texts, in which the answer is looked for. Default: the completions.
        kwargs: the other columns, which are not used.

    Raises:
        ValueError: a reference is empty, or the number of references is not the number of completions.
    """
    pairs = zip(completions if visible_text is None else visible_text, answer, strict=True)
    return [
        float(is_correct(completion_text(completion), reference_text(reference))) for completion, reference in pairs
    ]


def exact_match_reward(
    completions: Sequence[Completion], answer: Sequence[Any], visible_text: Sequence[str] | None = None, **kwargs: Any
) -> list[float]:
    """Return 1.0 for each completion whose whole visible text equals the reference, both stripped, else 0.0.

    The arguments and errors are those of ``accuracy_reward``. The visible text is what follows the last ``</think>``,
    or the whole completion without one.
    """
    pairs = zip(completions if visible_text is None else visible_text, answer, strict=True)
    return [float(completion_text(completion) == reference_text(reference)) for completion, reference in pairs]


def soft_overlong_reward(
    completion_ids: Sequence[Sequence[int]], max_completion_length: int, soft_punish_cache: int | None = None, **_: Any
) -> list[float]:
    """Return a penalty for each response that comes close to the length limit (DAPO, arXiv 2503.14476, Eq. 13).

    It is 0.0 for responses that end before the last ``soft_punish_cache`` steps, and falls linearly over these steps to
    -1.0 at the limit.

    Args:
        completion_ids: N responses. Only their lengths are used, which include latent steps.
        max_completion_length: the limit of a response, in steps.
        soft_punish_cache: the number of last steps; None or 0 stands for a fifth of the limit.
    """
    cache = soft_punish_cache or max(1, max_completion_length // 5)
    free = max_completion_length - cache
    return [-min(max(len(ids) - free, 0) / cache, 1.0) for ids in completion_ids]


REWARDS: dict[str, RewardFunc] = {
    "accuracy": accuracy_reward,
    "exact_match": exact_match_reward,
    "soft_overlong": soft_overlong_reward,
}
