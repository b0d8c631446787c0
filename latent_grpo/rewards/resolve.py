"""Find the reward functions that a run names: in this package, in a module, in a file, or as a reward model."""

from __future__ import annotations

import importlib.util
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from latent_grpo.errors import ConfigError, require
from latent_grpo.rewards.functions import REWARDS, RewardFunc
from latent_grpo.rewards.reward_model import RewardModel

RewardFuncs = str | RewardFunc | nn.Module | Sequence[str | RewardFunc | nn.Module]


def resolve_rewards(
    given: RewardFuncs, weights: Sequence[float] | None, tokenizers: Any = None, device: Any = None
) -> list[RewardFunc]:
    """Return the reward functions of a run, for one or several of what `resolve_reward` takes.

    Args:
        given: one or several functions, models or names.
        weights: one per function, or None.
        tokenizers: of the reward models: one, or a list with an entry for each of `given`.
        device: where reward models are put.

    Raises:
        ConfigError: there is no such function, or the numbers of functions, weights and tokenizers differ.
    """
    chosen = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    require(bool(chosen), "reward_funcs", given, "give at least one reward")
    own = tokenizers if isinstance(tokenizers, list | tuple) else [tokenizers] * len(chosen)
    remedy = f"give one for each of the {len(chosen)} rewards"
    require(len(own) == len(chosen), "reward_processing_classes", f"a list of {len(own)}", remedy)
    try:
        resolved = [resolve_reward(each, tokenizer, device) for each, tokenizer in zip(chosen, own, strict=True)]
    except ValueError as error:
        raise ConfigError(str(error)) from error
    require(weights is None or len(weights) == len(resolved), "reward_weights", weights, remedy)
    return resolved


def resolve_reward(spec: str | RewardFunc | nn.Module, tokenizer: Any = None, device: Any = None) -> RewardFunc:
    """Return the reward function that ``spec`` stands for.

    Args:
        spec: a function; a name in ``REWARDS``; ``"module:function"``; ``"path/to/file.py:function"``; or a reward
            model: a sequence classifier with one label, its folder, or its Hub name (``owner/name``).
        tokenizer: of a reward model. Default: the tokenizer beside the model.
        device: where a reward model is put. Default: where it is.

    Raises:
        ValueError: there is no such function or model. The message contains ``spec``.
    """
    if isinstance(spec, nn.Module):
        return RewardModel.of(spec, tokenizer, device)
    if callable(spec):
        return spec
    if spec in REWARDS:
        return REWARDS[spec]
    if isinstance(spec, str) and _is_model(spec):
        return RewardModel.load(spec, tokenizer, device)
    source, _, name = spec.rpartition(":") if isinstance(spec, str) else ("", "", "")
    if not source or not name:
        raise ValueError(
            f"reward {spec!r} is not one of {', '.join(REWARDS)}; give one of them, "
            "'module:function', 'path/to/file.py:function', or a reward model's folder or Hub name"
        )
    try:
        module = _load_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except Exception as error:  # the user's module runs here, and may raise anything
        raise ValueError(f"reward {spec!r}: cannot load {source!r} ({type(error).__name__}: {error})") from error
    function: RewardFunc | None = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"reward {spec!r}: {source!r} has no function {name!r}")
    return resolve_reward(function, tokenizer, device)


def _is_model(spec: str) -> bool:
    if (Path(spec).expanduser() / "config.json").is_file():
        return True
    # A Hub name has one slash, and no colon as a function has.
    return ":" not in spec and spec.count("/") == 1 and all(spec.split("/")) and not spec.startswith((".", "~"))


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
