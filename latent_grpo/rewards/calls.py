"""Call reward functions as TRL does, asynchronous ones at the same time, and say where a failing one failed."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from latent_grpo.errors import RewardError, first_line
from latent_grpo.rewards.time_limit import TimeLimitError, time_limit

_EXCERPT_CHARACTERS = 80  # of a prompt or a completion in an error message


def call_all(
    functions: Sequence[Callable[..., Any]],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Any],
    timeout: float | None = None,
) -> list[list[float | None]]:
    """Return the rewards [F][N] of F functions, None where a function does not apply.

    Functions are called by keyword, one after another. Then the asynchronous ones run together, on an event loop of
    their own, which lasts as long as the process. A function without ``**kwargs`` gets only the keywords that it names.

    Raises:
        RewardError: a function raised, ran longer than `timeout` seconds, or did not return N numbers. The message
            names the function with its file and line, and the sample.
    """
    given = {**columns, "prompts": prompts, "completions": completions}
    results: list[Any] = [None] * len(functions)
    waiting: dict[int, Awaitable[Any]] = {}
    for i, function in enumerate(functions):
        try:
            with time_limit(f"reward function {name_of(function)!r}", timeout):
                returned = function(**accepted(function, given))
        except TimeLimitError:
            raise _failure(function, f"ran longer than reward_timeout {timeout:g} s") from None
        except Exception as error:
            for awaitable in waiting.values():  # they would warn that nobody awaited them
                if inspect.iscoroutine(awaitable):
                    awaitable.close()
            index = _first_failing(function, prompts, completions, columns)
            raise _raised(function, error, index, given) from error
        if inspect.isawaitable(returned):
            waiting[i] = returned
        else:
            results[i] = returned
    late = "asynchronous reward functions " + ", ".join(name_of(functions[i]) for i in waiting)
    try:
        with time_limit(late, timeout) if waiting else nullcontext():
            outcomes = _run_together(list(waiting.values()))
    except TimeLimitError:
        raise RewardError(f"{late} ran longer than reward_timeout {timeout:g} s") from None
    for i, outcome in zip(waiting, outcomes, strict=True):
        if isinstance(outcome, Exception):
            raise _raised(functions[i], outcome, None, given) from outcome
        if isinstance(outcome, BaseException):
            raise outcome
        results[i] = outcome
    return [_checked(function, returned, given) for function, returned in zip(functions, results, strict=True)]


def accepted(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords of `given` that a function takes: those that it names, or all if it has ``**kwargs``."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a function of an extension module
        return dict(given)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(given)
    return {parameter.name: given[parameter.name] for parameter in parameters if parameter.name in given}


def required_arguments(function: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments without which a function cannot be called by keyword."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a function of an extension module
        return []
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [each.name for each in parameters if each.kind in by_keyword and each.default is each.empty]


def name_of(function: Callable[..., Any]) -> str:
    """Return the name of a function, of the function in a partial, or of the class of a callable object."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def _failure(function: Callable[..., Any], what: str, line: int | None = None) -> RewardError:
    """Return an error that names the function, what it did, its file, and `line` or the line of its definition."""
    code = _code_of(function)
    where = "" if code is None else f" ({code.co_filename}:{line or code.co_firstlineno})"
    return RewardError(f"reward function {name_of(function)!r} {what}{where}")


def _code_of(function: Callable[..., Any]) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None)
    # A callable object has its code in its class.
    return code or getattr(vars(type(function)).get("__call__"), "__code__", None)


_loop: asyncio.AbstractEventLoop | None = None


def _run_together(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
    """Return the results of awaitables that run at the same time. An exception is a result too."""
    global _loop
    if not awaitables:
        return []
    if _loop is None or _loop.is_closed():
        # In a thread, because a notebook already runs a loop in this one. One loop for all calls, so that a client
        # that a function keeps open stays usable.
        _loop = asyncio.new_event_loop()
        threading.Thread(target=_loop.run_forever, daemon=True, name="reward functions").start()

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*awaitables, return_exceptions=True)

    future = asyncio.run_coroutine_threadsafe(all_of_them(), _loop)
    try:
        return future.result()
    except BaseException:  # Ctrl-C: nobody waits for them any more
        future.cancel()
        raise


def _raised(function: Callable[..., Any], error: Exception, index: int | None, given: Mapping[str, Any]) -> RewardError:
    code = _code_of(function)
    line, trace = None, error.__traceback__
    while trace is not None:  # the innermost line of the user's own file
        if code is not None and trace.tb_frame.f_code.co_filename == code.co_filename:
            line = trace.tb_lineno
        trace = trace.tb_next
    what = f"raised {type(error).__name__}: {first_line(error)}"
    return _failure(function, what if index is None else f"{what} on {_sample(index, given)}", line)


def _sample(index: int, given: Mapping[str, Any]) -> str:
    if not given["completions"]:
        return f"sample {index}"
    return (
        f"sample {index}: prompt {_excerpt(given['prompts'][index])}, "
        f"completion {_excerpt(given['completions'][index])}"
    )


def _checked(function: Callable[..., Any], returned: Any, given: Mapping[str, Any]) -> list[float | None]:
    """Return N rewards as floats or None; RewardError names the first that is neither."""
    count = len(given["completions"])

    def failure(index: int, what: str) -> RewardError:
        return _failure(function, f"{what} on {_sample(index, given)}")

    try:
        if isinstance(returned, str | Mapping):
            raise TypeError
        values = list(returned)
    except TypeError as error:
        raise failure(0, f"returned a {type(returned).__name__}, not a list of rewards,") from error
    if len(values) != count:
        missing = min(len(values), max(count - 1, 0))
        raise failure(missing, f"returned {len(values)} rewards for {count} completions; first wrong")
    rewards = [None if value is None else _number(value) for value in values]
    for index, reward in enumerate(rewards):
        if reward is not None and not math.isfinite(reward):
            raise failure(index, f"returned {values[index]!r:.40}, not a finite number or None,")
    return rewards


def _number(value: Any) -> float:
    """Return a reward as a float, or NaN if it is not a number, which the caller reports."""
    try:
        # `float` would accept the string "1".
        return math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.nan


def _first_failing(
    function: Callable[..., Any], prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Any]
) -> int:
    """Return the index of the first sample that fails by itself, or 0 if only the batch as a whole fails."""
    count = len(completions)
    for i in range(count):
        # Columns of N values belong to the samples; every other value goes to each call as it is.
        single = {name: [v[i]] if isinstance(v, list | tuple) and len(v) == count else v for name, v in columns.items()}
        # What was logged for the whole batch is enough.
        single |= {name: _ignore for name in ("log_extra", "log_metric") if name in single}
        single |= {"prompts": [prompts[i]], "completions": [completions[i]]}
        try:
            function(**accepted(function, single))
        except Exception:  # of any kind: the caller reports the error of the whole batch
            return i
    return 0


def _ignore(*_: Any, **__: Any) -> None:
    pass


def _excerpt(value: Any) -> str:
    text = repr(value)
    half = _EXCERPT_CHARACTERS // 2
    return text if len(text) <= _EXCERPT_CHARACTERS else f"{text[:half]}...{text[-half:]}"
