r"""How an answer is read out of a completion, and when two answers are the same.

The answer is read from the visible text: the part after the last ``</think>``, or the whole completion without one.
The first rule that applies decides:

1. The answer is the contents of the last ``\boxed{...}``. A last box that is never closed is a cut-off answer: the
   completion then has no answer.
2. The answer is the rest of the line after the last ``####``.
3. Without a mark, the kind of the reference decides. For a choice letter, the answer is a letter that is stated ("the
   answer is (B)") or that ends a line. For an expression or a word, it is the text after "answer is", or the whole text
   where that is the reference. In every other case it is the last number.

Two plain numbers are compared exactly, as rational numbers; rounding is allowed only where the reference is not an
integer (``_same_number``). Plain numbers are integers, decimals, fractions, mixed numbers and percentages, also with
currency signs, thousands commas or a unit. Words, choice letters and numerals with a base (``52_8``) are compared as
text. Everything else is compared as normalised LaTeX, then by math-verify with a time limit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

from latent_grpo.rewards.math_verify_process import same_expression

Completion = str | Sequence[Mapping[str, Any]]  # a text, or messages of which the last one is the assistant's

# The answer is short and at the end of a completion. The limits bound the work that a degenerate completion can cause.
_TAIL_CHARACTERS = 20_000
_ANSWER_CHARACTERS = 500

# Allowed rounding where the reference is not an integer: relative, and never more than PAL's tolerance for GSM-Hard.
_RELATIVE_TOLERANCE = Fraction(1, 10**6)
_ABSOLUTE_TOLERANCE = Fraction(1, 10**3)

# Parts of the patterns below. `_DECIMAL` accepts a comma only between groups of three digits.
_DECIMAL = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
_DECIMAL_EXPONENT = rf"{_DECIMAL}(?:[eE][-+]?\d{{1,3}})?"
_LATEX_FRACTION = rf"\\[dt]?frac\s*\{{\s*{_DECIMAL}\s*\}}\s*\{{\s*{_DECIMAL}\s*\}}"
_SLASH_FRACTION = rf"{_DECIMAL}/{_DECIMAL}"

# A minus sign belongs to the number only where it cannot be a subtraction: "10-5" ends in 5, not in -5.
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
_TEXT_MACRO = re.compile(r"\\(?:text|mbox|mathrm|textbf|mathbf)\s*\{([^{}]*)\}")
# Spaces and degree signs mean nothing in an answer, except that a space between two digits separates two numbers.
_LATEX_NOISE = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\[!,;: ]\s*|\^\{?\\circ\}?|°|\\?\$|(?<!\d)\s+|\s+(?!\d)")

_STATED = re.compile(r"answer(?:\s+is|\s*:)[:\s]*(.+)", re.IGNORECASE)
_CHOICE = re.compile(r"\(?([A-J])\)?")
_CHOICE_ANSWER = re.compile(r"[\s(*]*([A-J])(?:\s*[).:*].*)?", re.IGNORECASE | re.DOTALL)
# Tried in this order. The last match of the first pattern that matches is the choice.
_CHOICE_IN_TEXT = (
    re.compile(r"(?i:answer(?:\s+choice)?(?:\s+is)?)[:=*(\s]*([A-J])(?![A-Za-z'])"),
    re.compile(r"(?i:choice|option)[:=*(\s]*([A-J])(?![A-Za-z'])"),
    re.compile(r"(?:^|[\s(*])([A-J])[).*]*\s*$", re.MULTILINE),
)


def completion_text(completion: Completion) -> str:
    """Return the visible text of a completion, stripped: what follows its last ``</think>``, or all of it."""
    if not isinstance(completion, str):
        completion = str(completion[-1].get("content") or "") if completion else ""
    return completion.rpartition("</think>")[2].strip()


def reference_text(reference: Any) -> str:
    """Return a reference answer as stripped text; raise ValueError if it is None or blank."""
    text = "" if reference is None else str(reference).strip()
    if not text:
        raise ValueError("a reference answer is empty; every row needs one")
    return text


def is_correct(text: str, reference: str) -> bool:
    """Return whether the answer in the visible text of a completion is the reference, by the rules of this module."""
    text = text[-_TAIL_CHARACTERS:]
    answer = marked_answer(text)
    choice = _CHOICE.fullmatch(_plain_text(reference))
    if choice:
        return _choice_letter(text, answer) == choice[1]
    if answer is None:
        answer = _unmarked_answer(text, reference)
    return answer is not None and 0 < len(answer) <= _ANSWER_CHARACTERS and _same_answer(answer, reference)


def marked_answer(text: str) -> str | None:
    """Return the last boxed answer, else what follows ``####``, else None. A cut-off box gives ""."""
    start = text.rfind("\\boxed")
    if start >= 0:
        return _boxed_contents(text[start + len("\\boxed") :].lstrip())
    _, mark, tail = text.rpartition("####")
    return tail.strip().partition("\n")[0].strip() if mark else None


def _boxed_contents(text: str) -> str:
    if not text.startswith("{"):
        return text.split(maxsplit=1)[0] if text else ""  # TeX's short form, \boxed 5
    depth = 0
    # The first alternative also takes the escaped braces \{ and \}, which open and close no group.
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0 and match[0] == "}":
            return text[1 : match.start()].strip()
    return ""


def _choice_letter(text: str, marked: str | None) -> str | None:
    """Return the chosen letter in upper case, or None. A marked answer that is not a letter is not searched further."""
    if marked is None and _CHOICE.fullmatch(_plain_text(text)):
        marked = text
    if marked is not None:
        match = _CHOICE_ANSWER.fullmatch(_plain_text(marked))
        return match[1].upper() if match else None
    for pattern in _CHOICE_IN_TEXT:
        if letters := pattern.findall(text):
            return str(letters[-1])
    return None


def _unmarked_answer(text: str, reference: str) -> str | None:
    # The whole text may be the answer, without a word around it.
    if len(text) <= _ANSWER_CHARACTERS and (_numbers(text) or _normalised(text) == _normalised(reference)):
        return text
    # Where the reference is a number, only the last number counts, stated or not.
    if not _numbers(reference):
        stated = _STATED.findall(text)
        if stated:
            return str(stated[-1]).strip().rstrip(".")
    numbers = _NUMBER_IN_TEXT.findall(text)
    return numbers[-1] if numbers else None


def _same_answer(answer: str, reference: str) -> bool:
    expected = _numbers(reference)
    values = _numbers(answer)
    if expected and values:
        # The answer "20%" may stand for 20 or 1/5. The reference stands for its first reading only.
        return any(_same_number(value, expected[0]) for value in values)
    # This comes before math-verify, which drops the base: it finds 52_8 and 52_9 equal.
    numeral = _BASED_NUMERAL.fullmatch(_normalised(reference))
    if numeral:
        return _same_numeral(_normalised(answer), numeral)
    if _normalised(answer) == _normalised(reference):
        return True
    # Words never reach math-verify, which reads them as products of letters: it finds "evne" equal to "even".
    if _WORDS.fullmatch(_plain_text(reference)):
        return _plain_text(answer).casefold() == _plain_text(reference).casefold()
    return same_expression(answer, reference)


def _same_number(value: Fraction, expected: Fraction) -> bool:
    if expected.denominator == 1:
        return value == expected
    return abs(value - expected) <= min(_ABSOLUTE_TOLERANCE, _RELATIVE_TOLERANCE * abs(expected))


def _same_numeral(answer: str, reference: re.Match[str]) -> bool:
    """Return whether a numeral is the reference: ``52_8`` accepts ``52_8``, ``52_{8}``, and ``52`` without a base.

    The question states the base that it asks for, so an answer may leave it out.
    """
    numeral = _BASED_NUMERAL.fullmatch(answer)
    if numeral is None:
        return answer == reference["digits"]
    return numeral["digits"] == reference["digits"] and _base(numeral) == _base(reference)


def _base(numeral: re.Match[str]) -> int:
    return int(numeral["braced"] or numeral["bare"])


@lru_cache(maxsize=8192)
def _numbers(text: str) -> tuple[Fraction, ...]:
    """Return the values that a plain number may stand for: 20 and 1/5 for ``20%``, nothing if it is not a number."""
    unit = _NUMBER_WITH_UNIT.fullmatch(text)
    text = _without_noise(unit["number"] if unit else text)
    text = re.sub("[€£]", "", text).replace("\\%", "%").rstrip(".")
    value = _value(text.removesuffix("%"))
    if value is None:
        return ()
    return (value, value / 100) if text.endswith("%") else (value,)


def _value(text: str) -> Fraction | None:
    """Return the value of a decimal, a fraction or a mixed number without spaces, or None if the text is another."""
    match = _PLAIN_NUMBER.fullmatch(text)
    if match:
        size = _decimal(match["size"])
    else:
        match = _FRACTION.fullmatch(text)
        if match is None:
            return None
        denominator = _decimal(match["bottom"] or match["bottom_digit"] or match["bottom_slash"])
        if not denominator:
            return None
        size = _decimal(match["top"] or match["top_digit"] or match["top_slash"]) / denominator
        size += _decimal(match["whole"] or "0")
    return -size if match["sign"] in ("-", "\u2212") else size


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def _plain_text(text: str) -> str:
    """Return the text without text macros, dollar signs and a final full stop."""
    return _TEXT_MACRO.sub(r"\1", text).replace("$", "").strip().rstrip(".").strip()


def _normalised(text: str) -> str:
    """Return LaTeX in one form: one kind of fraction, and nothing that only changes how it looks."""
    return _without_noise(re.sub(r"\\[dt]frac", r"\\frac", _plain_text(text)))


def _without_noise(text: str) -> str:
    return _LATEX_NOISE.sub("", " ".join(text.split()))
