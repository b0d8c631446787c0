r"""How an answer is read out of a completion, and when two answers are the same.

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

import re
from fractions import Fraction
from functools import lru_cache

from latent_grpo.rewards.math_verify_process import same_expression

# The answer is at the end of a completion and is short; the limits bound the work a degenerate one can cause.
_TAIL_CHARACTERS = 20_000


_ANSWER_CHARACTERS = 500


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


def is_correct(text: str, reference: str) -> bool:
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
    return same_expression(found, reference)


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
