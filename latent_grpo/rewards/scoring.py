"""Which reward functions a run uses, and the rewards of a batch."""

from __future__ import annotations

import importlib.util
import math
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from latent_grpo.rewards.functions import REWARDS, Completion, RewardFunc

_EXCERPT_CHARACTERS = 80


class RewardError(RuntimeError):
    """A reward function that failed: the message names the function and the sample it failed on."""


class Scores(NamedTuple):
    """Rewards of N samples by F functions: ``per_function`` [F][N] unweighted, ``total`` [N] the weighted sums."""

    per_function: list[list[float]]
    total: list[float]


def resolve_reward(spec: str | RewardFunc) -> RewardFunc:
    """The reward function that ``spec`` stands for.

    Args:
        spec: a function, a name in ``REWARDS``, ``"module:function"`` or ``"path/to/file.py:function"``.

    Raises:
        ValueError: there is no such function; the message holds ``spec``.
    """
    if callable(spec):
        return spec
    if spec in REWARDS:
        return REWARDS[spec]
    source, _, name = spec.rpartition(":") if isinstance(spec, str) else ("", "", "")
    if not source or not name:
        raise ValueError(
            f"reward {spec!r} is not one of {', '.join(REWARDS)}; give one of these, "
            "'module:function' or 'path/to/file.py:function'"
        )
    try:
        module = _load_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except Exception as error:  # the user's module runs here, and may raise anything
        raise ValueError(f"reward {spec!r}: cannot load {source!r} ({type(error).__name__}: {error})") from error
    function: RewardFunc | None = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"reward {spec!r}: {source!r} has no function {name!r}")
    return function


def _load_file(path: Path) -> Any:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise FileNotFoundError("no such file")
    name = f"_latent_grpo_reward_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise ImportError("not a Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look their module up by name
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def score(
    reward_funcs: Sequence[RewardFunc],
    weights: Sequence[float] | None,
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    columns: Mapping[str, Any],
) -> Scores:
    """Rewards of N samples by every function, and their weighted sums.

    Args:
        reward_funcs: F functions, each called as ``f(prompts=..., completions=..., **columns)``.
        weights: F weights; None weighs every function 1.
        prompts, completions: N each.
        columns: the further keyword arguments: data columns and ``completion_ids`` as lists of N, or anything else.

    Returns:
        ``Scores``; None from a function (not applicable to that sample) counts as 0.

    Raises:
        RewardError: a function raised, or did not return N finite numbers; names the function and the sample.
        ValueError: as many weights as functions, or prompts as completions, were not given.
    """
    weights = [1.0] * len(reward_funcs) if weights is None else weights
    if len(weights) != len(reward_funcs):
        raise ValueError(f"{len(weights)} reward weights for {len(reward_funcs)} reward functions; give one each")
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts for {len(completions)} completions; give one each")
    per_function = [_rewards_of(function, prompts, completions, columns) for function in reward_funcs]
    total = [
        sum((weight * rewards[i] for weight, rewards in zip(weights, per_function, strict=True)), 0.0)
        for i in range(len(completions))
    ]
    return Scores(per_function, total)


def _rewards_of(
    function: RewardFunc, prompts: Sequence[Any], completions: Sequence[Completion], columns: Mapping[str, Any]
) -> list[float]:
    def failure(index: int, what: str) -> RewardError:
        sample = f"prompt {_excerpt(prompts[index])}, completion {_excerpt(completions[index])}" if completions else ""
        return RewardError(f"reward function {_name(function)!r} {what} on sample {index}: {sample}")

    try:
        returned = function(prompts=prompts, completions=completions, **columns)
    except Exception as error:
        index = _first_failing(function, prompts, completions, columns)
        raise failure(index, f"raised {type(error).__name__}: {error}") from error
    try:
        values = list(returned)
    except TypeError as error:
        raise failure(0, f"returned a {type(returned).__name__}, not a list of rewards,") from error
    if len(values) != len(completions):
        missing = min(len(values), max(len(completions) - 1, 0))
        raise failure(missing, f"returned {len(values)} rewards for {len(completions)} completions; first wrong")
    rewards = [_reward_value(value) for value in values]
    for index, reward in enumerate(rewards):
        if not math.isfinite(reward):
            raise failure(index, f"returned {values[index]!r:.40}, not a finite number,")
    return rewards


def _reward_value(value: Any) -> float:
    """The reward as a float; NaN for what is not a number, which the caller reports."""
    if value is None:
        return 0.0
    try:
        return math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.nan


def _first_failing(
    function: RewardFunc, prompts: Sequence[Any], completions: Sequence[Completion], columns: Mapping[str, Any]
) -> int:
    """The first sample that fails alone; 0 if the failure takes the whole batch."""
    count = len(completions)
    for i in range(count):
        single = {name: [v[i]] if isinstance(v, list | tuple) and len(v) == count else v for name, v in columns.items()}
        try:
            function(prompts=[prompts[i]], completions=[completions[i]], **single)
        except Exception:  # whatever it raises is the failure looked for
            return i
    return 0


def _name(function: RewardFunc) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def _excerpt(value: Any) -> str:
    text = repr(value)
    half = _EXCERPT_CHARACTERS // 2
    return text if len(text) <= _EXCERPT_CHARACTERS else f"{text[:half]}...{text[-half:]}"


def reward_names(functions: Sequence[Callable[..., Any]]) -> list[str]:
    """A name for every reward function, a number behind those that share one."""
    names = [str(getattr(f, "__name__", type(f).__name__)) for f in functions]
    return [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]
