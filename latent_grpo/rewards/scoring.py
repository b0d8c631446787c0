"""Find the reward functions of a run, and score a batch of completions with them."""

from __future__ import annotations

import importlib.util
import math
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from latent_grpo.errors import RewardError
from latent_grpo.rewards.answers import Completion
from latent_grpo.rewards.functions import REWARDS, RewardFunc

_EXCERPT_CHARACTERS = 80  # of a prompt or a completion in an error message


class Scores(NamedTuple):
    """Rewards of N samples by F functions."""

    per_function: list[list[float]]  # [F][N], without the weights
    total: list[float]  # [N], the weighted sums


def resolve_reward(spec: str | RewardFunc) -> RewardFunc:
    """Return the reward function that ``spec`` stands for.

    Args:
        spec: a function, a name in ``REWARDS``, ``"module:function"`` or ``"path/to/file.py:function"``.

    Raises:
        ValueError: there is no such function. The message contains ``spec``.
    """
    if callable(spec):
        return spec
    if spec in REWARDS:
        return REWARDS[spec]
    source, _, name = spec.rpartition(":") if isinstance(spec, str) else ("", "", "")
    if not source or not name:
        raise ValueError(
            f"reward {spec!r} is not one of {', '.join(REWARDS)}; give one of them, "
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
    """Run a Python file as a module of its own and return it."""
    path = path.expanduser().resolve()
    if not path.is_file():
        raise FileNotFoundError("no such file")
    # The checksum keeps two files of the same name in different folders apart.
    name = f"_latent_grpo_reward_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look their module up by name
    try:
        spec.loader.exec_module(module)
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
    """Score N samples with every function, and return the rewards and their weighted sums.

    Args:
        reward_funcs: F functions, each called as ``f(prompts=..., completions=..., **columns)``.
        weights: F weights. None gives every function the weight 1.
        prompts: N prompts.
        completions: N completions.
        columns: further keyword arguments of the functions: data columns and ``completion_ids`` as lists of N, and
            values of any other kind.

    Returns:
        ``Scores``. A function returns None for a sample that it does not apply to; None counts as 0.

    Raises:
        RewardError: a function raised, or did not return N finite numbers. The message names the function and the
            sample.
        ValueError: the number of weights is not F, or the number of prompts is not N.
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


def reward_names(functions: Sequence[RewardFunc]) -> list[str]:
    """Return one name per reward function. Functions of the same name get their index behind it."""
    names = [_name(function) for function in functions]
    return [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]


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


def _first_failing(
    function: RewardFunc, prompts: Sequence[Any], completions: Sequence[Completion], columns: Mapping[str, Any]
) -> int:
    """Return the index of the first sample that fails by itself, or 0 if only the batch as a whole fails."""
    count = len(completions)
    for i in range(count):
        # Columns of N values belong to the samples; every other value goes to each call as it is.
        single = {name: [v[i]] if isinstance(v, list | tuple) and len(v) == count else v for name, v in columns.items()}
        try:
            function(prompts=[prompts[i]], completions=[completions[i]], **single)
        except Exception:  # of any kind: the caller reports the error of the whole batch
            return i
    return 0


def _reward_value(value: Any) -> float:
    """Return the reward as a float, or NaN if it is not a number, which the caller reports."""
    if value is None:
        return 0.0
    try:
        # `float` would accept the string "1".
        return math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.nan


def _name(function: RewardFunc) -> str:
    # A partial or an object with __call__ has no name.
    return str(getattr(function, "__name__", type(function).__name__))


def _excerpt(value: Any) -> str:
    text = repr(value)
    half = _EXCERPT_CHARACTERS // 2
    return text if len(text) <= _EXCERPT_CHARACTERS else f"{text[:half]}...{text[-half:]}"
