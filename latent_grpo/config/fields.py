"""How an option is declared: its default, its meaning, its range. Checks and groups read the declarations.

Configuration files and Python code can hold any value, so `check_options` checks what the command line does not."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import wraps
from numbers import Real
from os import PathLike, fspath
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from latent_grpo.errors import ConfigError, require, unknown_key

Config = TypeVar("Config")


@dataclass(frozen=True)
class Range:
    """The values that a number may take. Bounds belong to the range unless they are open. Infinity seldom does."""

    low: float | None = None
    high: float | None = None
    open_low: bool = False
    open_high: bool = False
    infinite: bool = False

    def holds(self, value: Any) -> bool:
        """Return whether a value is in the range. NaN never is."""
        above = self.low is None or (value > self.low if self.open_low else value >= self.low)
        below = self.high is None or (value < self.high if self.open_high else value <= self.high)
        return above and below and value == value

    def __str__(self) -> str:
        """Return the range in words, as `0 to 1` or `0 or more, below 1`."""
        if None not in (self.low, self.high) and not (self.open_low or self.open_high):
            return f"{self.low} to {self.high}"
        words = []
        if self.low is not None:
            words.append(f"above {self.low:g}" if self.open_low else f"{self.low:g} or more")
        if self.high is not None:
            words.append(f"below {self.high}" if self.open_high else f"at most {self.high}")
        return ", ".join(words)


POSITIVE, NON_NEGATIVE, ONE_OR_MORE = Range(0, open_low=True), Range(0), Range(1)
LARGEST = 1e9  # of a number without a bound of its own: beyond it is a slip, whose end would be an overflow
RATE = Range(0, 10, open_low=True)  # of learning: beyond it, AdamW throws every weight away at each step
SHARE, BELOW_ONE = Range(0, 1), Range(0, 1, open_high=True)


def option(default: Any, help: str, range: Range | None = None) -> Any:
    """Return a dataclass field with its documentation and, for a number, its range."""
    metadata = {"help": help, "range": range}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def default_of(item: Field[Any]) -> Any:
    """Return the default of a dataclass field."""
    return item.default_factory() if item.default_factory is not MISSING else item.default


def named(config_class: type[Config]) -> type[Config]:
    """Make a configuration answer an unknown option with ConfigError, which names the nearest one or what to use."""
    made: Any = config_class.__init__

    @wraps(made)
    def init(self: Any, *values: Any, **options: Any) -> None:
        known = [item.name for item in fields(config_class)]  # type: ignore[arg-type]
        for name in options:
            if name not in known:
                raise ConfigError(unknown_key(name, known))
        made(self, *values, **options)

    config_class.__init__ = init  # type: ignore[method-assign]
    return config_class


def check_options(config: Any) -> None:
    """Raise ConfigError for the first option that is no choice of its annotation, no list, no number or out of range.

    Configuration files and Python code can hold any value, so the command line's own checks are not enough.
    """
    kinds = get_type_hints(type(config))
    for item in fields(config):
        name, value, kind = item.name, getattr(config, item.name), kinds[item.name]
        alternatives = (kind, *get_args(kind))
        choices = next((get_args(part) for part in alternatives if get_origin(part) is Literal), ())
        if value is None and NoneType in alternatives:
            continue
        require(not choices or value in choices, name, value, f"choose from {', '.join(map(str, choices))}")
        require(value is not None, name, value, "give a value")
        for container, words in ((list, "a list"), (dict, "a mapping")):
            wanted = any(get_origin(part) is container for part in alternatives)
            require(not wanted or isinstance(value, container), name, value, f"give {words}")
        value = _plain(config, name, value)
        require(bool not in alternatives or isinstance(value, bool), name, value, "give true or false")
        # A text option may have further kinds, as a list.
        is_text = str in alternatives and not any(get_origin(part) is list for part in alternatives)
        require(not is_text or isinstance(value, str), name, value, "give a text")
        allowed = item.metadata.get("range")
        if allowed is not None:
            is_number = isinstance(value, Real) and not isinstance(value, bool)
            require(is_number and allowed.holds(value), name, value, f"give a number, {allowed}")
        for number in value if list[float] in alternatives else [value]:
            is_number = isinstance(number, Real) and not isinstance(number, bool)
            require(is_number or number is value, name, value, "give a list of numbers")
            bounded = (allowed is not None and allowed.infinite) or not is_number or -math.inf < number < math.inf
            require(bounded, name, value, "give a finite number")
            own = allowed is not None and (allowed.infinite or allowed.high is not None)
            require(own or not is_number or abs(number) <= LARGEST, name, value, f"give at most {LARGEST:.0e}")
        whole = int in alternatives and float not in alternatives and isinstance(value, Real)
        require(not whole or isinstance(value, int), name, value, "give a whole number")


def _plain(config: Any, name: str, value: Any) -> Any:
    """Return an option as a type that a checkpoint can write as JSON, and set it: NumPy's numbers, and paths."""
    if isinstance(value, Real) and hasattr(value, "item"):
        value = value.item()
        setattr(config, name, value)
    elif isinstance(value, PathLike):
        value = fspath(value)
        setattr(config, name, value)
    return value


def groups_of(config_class: type) -> Iterator[tuple[type, list[Field[Any]]]]:
    """Yield each dataclass that a configuration is made of, with the options that it introduces.

    An option that a subclass gives a new default stays in the group that introduced it.
    """
    seen: set[str] = set()
    by_name = {item.name: item for item in fields(config_class)}
    for part in reversed(config_class.__mro__[:-1]):
        own = [name for name in inspect.get_annotations(part) if name in by_name and name not in seen]
        seen.update(own)
        if own:
            yield part, [by_name[name] for name in own]
