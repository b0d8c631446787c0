r"""Reward functions for verifiable answers, and the scoring of a batch by several of them.

Reward functions have TRL's signature, ``f(prompts, completions, **columns) -> list[float | None]``, all called by
keyword. A completion is a string, or in conversational form ``[{"role": "assistant", "content": str}]``.

How ``accuracy_reward`` reads an answer out of a completion (the part after the last ``</think>``, if there is one):

1. the contents of the last ``\boxed{...}``; a last box that is never closed is a cut-off answer and counts as none;
2. else what follows the last ``####`` on its line;
3. else, by the kind of the reference: a choice letter that is stated ("the answer is (B)") or ends a line; an
   expression or word that follows "answer is" or is the whole text; and in every other case the last number.

Two plain numbers (integers, decimals, fractions, mixed numbers, percentages; with currency signs, thousands commas or a
unit) are compared exactly, as rational numbers; only a reference that is no integer allows for rounding
(``_same_number``). Words, choice letters and numerals with a base (``52_8``) are compared as text. The rest is compared
as normalised LaTeX, then by math-verify with a time limit.
"""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

RewardFunc = Callable[..., Sequence[float | None]]
Completion = str | Sequence[Mapping[str, Any]]

# The answer is at the end of a completion and is short; the limits bound the work a degenerate one can cause.
_TAIL_CHARACTERS = 20_000
_ANSWER_CHARACTERS = 500
_COMPARISON_SECONDS = 3.0
_START_SECONDS = 120.0
_EXCERPT_CHARACTERS = 80

# Rounding allowed where the reference is no integer: relative, and never more than PAL's tolerance for GSM-Hard.
_RELATIVE_TOLERANCE = Fraction(1, 10**6)
_ABSOLUTE_TOLERANCE = Fraction(1, 10**3)

_DECIMAL = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
_DECIMAL_EXPONENT = rf"{_DECIMAL}(?:[eE][-+]?\d{{1,3}})?"
_LATEX_FRACTION = rf"\\[dt]?frac\s*\{{\s*{_DECIMAL}\s*\}}\s*\{{\s*{_DECIMAL}\s*\}}"
_SLASH_FRACTION = rf"{_DECIMAL}/{_DECIMAL}"
# A minus sign counts as one only where it cannot be a subtraction ("10-5" ends in 5, not in -5).
_NUMBER_IN_TEXT = re.compile(
    rf"(?:(?<![\w)\]}}])[-\u2212])?(?:\\?\$|[€£])?(?<!\d)(?:{_LATEX_FRACTION}|{_SLASH_FRACTION}|{_DECIMAL_EXPONENT})(?:\s?\\?%)?"
)
_PLAIN_NUMBER = re.compile(rf"(?P<sign>[-+\u2212]?)(?P<size>{_DECIMAL_EXPONENT})")
_FRACTION = re.compile(
    rf"(?P<sign>[-+\u2212]?)(?:(?P<whole>\d+)?\\[dt]?frac(?:\{{(?P<top>{_DECIMAL})\}}|(?P<top_digit>\d))"
    rf"(?:\{{(?P<bottom>{_DECIMAL})\}}|(?P<bottom_digit>\d))|(?P<top_slash>{_DECIMAL})/(?P<bottom_slash>{_DECIMAL}))"
)
_NUMBER_WITH_UNIT = re.compile(r"(?P<number>.*\d\S*)(?:\s+[A-Za-z]{3,})+\.?")
_BASED_NUMERAL = re.compile(r"(?P<digits>[0-9A-Za-z]+)_(?:\{(?P<braced>\d+)\}|(?P<bare>\d+))")
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]{2,}")
_CHOICE = re.compile(r"\(?([A-J])\)?")
_CHOICE_ANSWER = re.compile(r"[\s(*]*([A-J])(?:\s*[).:*].*)?", re.IGNORECASE | re.DOTALL)
# In the order tried; the last match of the first pattern that matches counts.
_CHOICE_IN_TEXT = (
    re.compile(r"(?i:answer(?:\s+choice)?(?:\s+is)?)[:=*(\s]*([A-J])(?![A-Za-z'])"),
    re.compile(r"(?i:choice|option)[:=*(\s]*([A-J])(?![A-Za-z'])"),
    re.compile(r"(?:^|[\s(*])([A-J])[).*]*\s*$", re.MULTILINE),
)
_STATED = re.compile(r"answer(?:\s+is|\s*:)[:\s]*(.+)", re.IGNORECASE)
_TEXT_MACRO = re.compile(r"\\(?:text|mbox|mathrm|textbf|mathbf)\s*\{([^{}]*)\}")
# Spacing and degree signs mean nothing here, but a space between two digits separates two numbers.
_LATEX_NOISE = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\[!,;: ]\s*|\^\{?\\circ\}?|°|\\?\$|(?<!\d)\s+|\s+(?!\d)")


class RewardError(RuntimeError):
    """A reward function that failed: the message names the function and the sample it failed on."""


class Scores(NamedTuple):
    """Rewards of N samples by F functions: ``per_function`` [F][N] unweighted, ``total`` [N] the weighted sums."""

    per_function: list[list[float]]
    total: list[float]


def accuracy_reward(completions: Sequence[Completion], answer: Sequence[Any], **kwargs: Any) -> list[float]:
    """1.0 for each completion whose answer equals the reference, else 0.0; see the module's docstring for the rules.

    Args:
        completions: N completions, as strings or in conversational form.
        answer: N references, as strings or numbers.
        kwargs: the other columns, which are not used.

    Raises:
        ValueError: a reference is empty, or there are not as many references as completions.
    """
    pairs = zip(completions, answer, strict=True)
    return [float(_is_correct(_visible_text(completion), _reference(gold))) for completion, gold in pairs]


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


def _is_correct(text: str, reference: str) -> bool:
    choice = _CHOICE.fullmatch(_plain_text(reference))
    text = text[-_TAIL_CHARACTERS:]
    found = _marked_answer(text)
    if choice:
        return _choice_letter(text, found) == choice[1]
    if found is None:
        found = _unmarked_answer(text, reference)
    return found is not None and 0 < len(found) <= _ANSWER_CHARACTERS and _same_answer(found, reference)


def _marked_answer(text: str) -> str | None:
    """The last boxed answer, else what follows ``####``, else None; "" where the last box is cut off."""
    start = text.rfind("\\boxed")
    if start >= 0:
        return _boxed_contents(text[start + len("\\boxed") :].lstrip())
    _, mark, tail = text.rpartition("####")
    return tail.strip().partition("\n")[0].strip() if mark else None


def _boxed_contents(text: str) -> str:
    if not text.startswith("{"):
        return text.split(maxsplit=1)[0] if text else ""  # TeX's short form, \boxed 5
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):  # an escaped brace is a literal one
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0 and match[0] == "}":
            return text[1 : match.start()].strip()
    return ""


def _choice_letter(text: str, marked: str | None) -> str | None:
    if marked is None and _CHOICE.fullmatch(_plain_text(text)):
        marked = text
    if marked is not None:
        match = _CHOICE_ANSWER.fullmatch(_plain_text(marked))
        return match[1].upper() if match else None
    found = next((letters for letters in (each.findall(text) for each in _CHOICE_IN_TEXT) if letters), None)
    return str(found[-1]) if found else None


def _unmarked_answer(text: str, reference: str) -> str | None:
    if len(text) <= _ANSWER_CHARACTERS and (_numbers(text) or _normalised(text) == _normalised(reference)):
        return text
    if not _numbers(reference):
        stated = _STATED.findall(text)
        if stated:
            return str(stated[-1]).strip().rstrip(".")
    numbers = _NUMBER_IN_TEXT.findall(text)
    return numbers[-1] if numbers else None


def _same_answer(found: str, reference: str) -> bool:
    expected = _numbers(reference)
    values = _numbers(found)
    if expected and values:
        return any(_same_number(value, expected[0]) for value in values)
    numeral = _BASED_NUMERAL.fullmatch(_normalised(reference))
    if numeral:
        return _same_numeral(_normalised(found), numeral)
    if _normalised(found) == _normalised(reference):
        return True
    if _WORDS.fullmatch(_plain_text(reference)):
        return _plain_text(found).casefold() == _plain_text(reference).casefold()
    return _same_expression(found, reference)


def _same_number(value: Fraction, expected: Fraction) -> bool:
    if expected.denominator == 1:
        return value == expected
    return abs(value - expected) <= min(_ABSOLUTE_TOLERANCE, _RELATIVE_TOLERANCE * abs(expected))


def _same_numeral(found: str, reference: re.Match[str]) -> bool:
    """``52_8`` is met by ``52_8``, ``52_{8}`` and ``52`` (a question that asks for a base states it)."""
    numeral = _BASED_NUMERAL.fullmatch(found)
    if numeral is None:
        return found == reference["digits"]
    return numeral["digits"] == reference["digits"] and _base(numeral) == _base(reference)


def _base(numeral: re.Match[str]) -> int:
    return int(numeral["braced"] or numeral["bare"])


@lru_cache(maxsize=8192)
def _numbers(text: str) -> tuple[Fraction, ...]:
    """The values a plain number may stand for: none if it is not one, both 20 and 1/5 for ``20%``."""
    unit = _NUMBER_WITH_UNIT.fullmatch(text)
    text = _without_noise(unit["number"] if unit else text)
    text = re.sub("[€£]", "", text).replace("\\%", "%").rstrip(".")
    value = _value(text.removesuffix("%"))
    if value is None:
        return ()
    return (value, value / 100) if text.endswith("%") else (value,)


def _value(text: str) -> Fraction | None:
    match = _PLAIN_NUMBER.fullmatch(text)
    if match:
        size = _decimal(match["size"])
    else:
        match = _FRACTION.fullmatch(text)
        if match is None:
            return None
        bottom = _decimal(match["bottom"] or match["bottom_digit"] or match["bottom_slash"])
        if not bottom:
            return None
        size = _decimal(match["top"] or match["top_digit"] or match["top_slash"]) / bottom
        size += _decimal(match["whole"] or "0")
    return -size if match["sign"] in ("-", "\u2212") else size


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def _plain_text(text: str) -> str:
    return _TEXT_MACRO.sub(r"\1", text).replace("$", "").strip().rstrip(".").strip()


def _normalised(text: str) -> str:
    return _without_noise(re.sub(r"\\[dt]frac", r"\\frac", _plain_text(text)))


def _without_noise(text: str) -> str:
    return _LATEX_NOISE.sub("", " ".join(text.split()))


class _Verifier:
    """math-verify in a process of its own, which is killed when a comparison takes too long.

    math-verify's own limit is a signal: it works in the main thread only, and not inside one large-integer operation.
    The process reads and writes one JSON line a comparison. It runs this file alone, so it starts without torch, and
    ends when its input closes.
    """

    def __init__(self) -> None:
        # runpy leaves sys.path as it is; running the file itself would put the modules beside it on the path.
        start = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
        self.process = subprocess.Popen(
            [sys.executable, "-c", start, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.owner = os.getpid()
        if self._answer(_START_SECONDS) is None:
            raise RuntimeError("math-verify could not be started; install it with: pip install math-verify")

    def usable(self) -> bool:
        return self.owner == os.getpid() and self.process.poll() is None  # a fork must not share the pipes

    def same(self, found: str, reference: str) -> bool:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps([found, reference]) + "\n")
            self.process.stdin.flush()
        except OSError:  # it has just died; the next comparison starts another
            return False
        return self._answer(_COMPARISON_SECONDS) is True

    def close(self) -> None:
        if self.owner == os.getpid():
            self.process.kill()
            self.process.communicate()

    def _answer(self, seconds: float) -> bool | None:
        """The next reply, or None where the process dies or is killed before it gives one."""
        assert self.process.stdout is not None
        timer = threading.Timer(seconds, self.process.kill)
        timer.start()
        line = ""
        try:
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
            if not line.endswith("\n"):  # also on Ctrl-C: a late reply would pass for that to the next comparison
                self.process.kill()
                self.process.wait()  # until it is reaped it passes for alive
        return bool(json.loads(line)) if line.endswith("\n") else None


_verifier: _Verifier | None = None
_verifier_lock = threading.Lock()


@lru_cache(maxsize=8192)
def _same_expression(found: str, reference: str) -> bool:
    """Whether math-verify finds the two LaTeX expressions equal; False where it cannot read one of them in time."""
    global _verifier
    with _verifier_lock:
        if _verifier is None or not _verifier.usable():
            _close_verifier()
            _verifier = _Verifier()
            atexit.unregister(_close_verifier)
            atexit.register(_close_verifier)
        return _verifier.same(found, reference)


def _close_verifier() -> None:
    if _verifier is not None:
        _verifier.close()


def _serve_comparisons() -> None:
    """The other side of ``_Verifier``: a true line when ready, then one line a comparison, until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training process, which closes this one
    replies, sys.stdout = sys.stdout, sys.stderr  # what a library prints must not pass for a reply
    import math_verify

    def same(found: str, reference: str) -> bool:
        try:
            gold, target = (
                math_verify.parse(f"\\boxed{{{text}}}", fallback_mode="no_fallback", parsing_timeout=None)
                for text in (reference, found)
            )
            return bool(math_verify.verify(gold, target, timeout_seconds=None))
        except Exception:  # sympy raises of every kind on malformed input: such an answer is not the reference
            return False

    logging.disable()  # its warning that it runs without a time limit: the parent process keeps the time
    print(
        json.dumps(same("x+1", "1+x")), file=replies, flush=True
    )  # which also builds the parser's tables, half a second's work
    for line in sys.stdin:
        print(json.dumps(same(*json.loads(line))), file=replies, flush=True)


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


if __name__ == "__main__":
    _serve_comparisons()
