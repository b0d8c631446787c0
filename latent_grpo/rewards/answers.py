r"""How an answer is read out of a completion, and when two answers are the same.

The answer is read from the visible text: the part after the last ``</think>``, or the whole completion without one.
The first rule that applies decides:

1. The answer is the contents of the last ``\boxed{...}``. A last box that is never closed is a cut-off answer: the
   completion then has no answer.
2. The answer is the rest of the line after the last ``####``.
3. Without a mark, the kind of the reference decides, and only the last ``<answer>...</answer>`` is read if there is
   one. For a choice letter, the answer is a letter that is stated ("the answer is (B)") or that ends a line. For an
   expression or a word, it is the text after "answer is", or the whole text where that is the reference, or the formula
   that ends the text, in dollars or not. For a number, it is the last number; where that is a part of a formula, it is
   the formula's right side: ``2\sqrt{3}`` is no 3.

Dashes, digits, spaces, wrappers and LaTeX commands of one meaning are first brought to one spelling (`notation.py`).
Two quantities are compared exactly, as rational numbers with units (`quantities.py`); rounding is allowed only where
the reference is not an integer. Words, choice letters, times, ranges, dates, sequences with dots and numerals with a
base (``52_8``) are compared as text. Everything else is compared as normalised LaTeX, then by math-verify with a time
limit. Where two readings are possible, an answer is wrong: a false reward is worse than a missed one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from latent_grpo.rewards.extraction import ANSWER_CHARACTERS, choice_letter, marked_answer, unmarked_answer
from latent_grpo.rewards.math_verify_process import same_expression
from latent_grpo.rewards.notation import bare, has_dots, normalised, tidy, unwrapped
from latent_grpo.rewards.quantities import DECIMAL, read_quantity, same_quantity, unit_powers

Completion = str | Sequence[Mapping[str, Any]]  # a text, or messages of which the last one is the assistant's

# The answer is short and at the end of a completion. The limits bound the work that a degenerate completion can cause.
_TAIL_CHARACTERS = 20_000

_CHOICE = re.compile(r"\(?([A-J])\)?")
_BASED_NUMERAL = re.compile(r"(?P<digits>[0-9A-Za-z]+)_(?:\{(?P<braced>\d+)\}|(?P<bare>\d+))")
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]{2,}|[Yy]es|[Nn]o|YES|NO|[A-Z]{2}")
_BETWEEN_ELEMENTS = re.compile(r",\s+|,(?!\d{3}(?!\d))")  # a comma inside 1,000 is none
_RANGE = re.compile(rf"{DECIMAL}\s?--?\s?{DECIMAL}")
_DATE = re.compile(r"\d+(?:[-/]\d+){2,}")
_PAIR = re.compile(r"0*(\d+):0*(\d+)(?::0*(\d+))?(?:\s*([ap])\.?\s?m\.?)?", re.IGNORECASE)
_SET_BUILDER = re.compile(r"\\\{([^|]+)\|(.+)\\\}")
# Words that are no names of functions.
_PROSE = re.compile(r"(?!(?:sin|cos|tan|cot|sec|csc|log|exp|sqrt|frac|arc\w+|pi|max|min|lcm|gcd)\b)\b[A-Za-z]{2,}")
_NAMED_BY_POINTS = re.compile(r"\\(?:angle|triangle|vec|overline|overleftrightarrow|widehat)\s*\{?\s*[A-Z]")
_UNIT_BEHIND = re.compile(
    r"(?:\\[,;:! ]|~|\s)*(?:\\(?:text|mathrm|mbox)\s*\{(?P<macro>[^{}]+)\}|\s(?P<word>[A-Za-z]{2,}(?:/[A-Za-z]+)?))"
    r"\s*(?P<power>\^(?:\{-?\d\}|\d))?$"
)
_RELATION = re.compile(r"[<>]|\\(?:le|ge|ne|lt|gt)(?![A-Za-z])")
_INTERVAL = re.compile(r"[(\[].+,.+[)\]]|\\mathbb|\\mid|\|")
_NAME_BEFORE = re.compile(r"[^=<>]*?(?<![<>!])(?:=|\\in(?![A-Za-z]))\s*")
_ASSIGNMENT = re.compile(r"(?:\\?[A-Za-z]\w*(?:_\{?\w+\}?)?\s*)?(?:=|\\approx)\s*(?=\S)")


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
    text, reference = tidy(text[-_TAIL_CHARACTERS:]), tidy(reference)
    answer = marked_answer(text)
    if answer is None:
        _, tag, tagged = text.rpartition("</answer>")[0].rpartition("<answer>")
        text = tagged.strip() if tag else text
    choice = _CHOICE.fullmatch(bare(reference))
    if choice:
        return choice_letter(text, answer) == choice[1]
    if answer is None:
        answer = unmarked_answer(text, reference)
    return answer is not None and 0 < len(answer) <= ANSWER_CHARACTERS and _same_answer(answer, reference)


def _same_answer(answer: str, reference: str) -> bool:
    """Return whether a tidy answer is a tidy reference."""
    plain, expected = bare(answer), bare(reference)
    quantity = read_quantity(expected)
    if quantity:
        found = read_quantity(_ASSIGNMENT.sub("", plain, count=1))
        if found:
            return same_quantity(found, quantity)
        # "20 or more", "5,5": math-verify leaves words out, and makes a set of a list.
        if _PROSE.search(re.sub(r"\\[A-Za-z]+", " ", plain)) or _bracket(plain):
            return False
    by_text = _same_by_text(plain, expected)
    return same_expression(_expression(answer), _expression(reference)) if by_text is None else by_text


def _expression(text: str) -> str:
    """Return a tidy answer as math-verify reads it: without a unit at its end, and with powers of ten spelled out."""
    text = unwrapped(text)
    unit = _UNIT_BEHIND.search(text)
    if unit and unit_powers(" ".join((unit["macro"] or unit["word"]).split()) + (unit["power"] or "")):
        text = text[: unit.start()]
    return re.sub(rf"^(-?{DECIMAL})[eE]([-+]?\d{{1,3}})$", r"\1\\cdot 10^{\2}", text)


def _same_by_text(answer: str, expected: str) -> bool | None:
    """Return whether two bare answers agree where their text decides; None where their value does."""
    if normalised(answer) == normalised(expected):
        return True
    # This comes before math-verify, which drops the base: it finds 52_8 and 52_9 equal.
    numeral = _BASED_NUMERAL.fullmatch(normalised(expected))
    if numeral and all(int(digit, 36) < _base(numeral) for digit in numeral["digits"]):
        return _same_numeral(normalised(answer), numeral)
    numeral = _BASED_NUMERAL.fullmatch(normalised(answer))
    if numeral and numeral["digits"].isdigit() and _base(numeral) != 10:
        return False  # 12_3 is no 12
    # math-verify leaves the dots out, and would compare some element.
    if has_dots(answer) or has_dots(expected):
        return _same_sequence(answer, expected)
    if _RANGE.fullmatch(expected) or _DATE.fullmatch(expected) or "--" in answer or "--" in expected:
        return answer.replace("--", "-").replace(" ", "") == expected.replace("--", "-").replace(" ", "")
    related = [_RELATION.search(text) is not None for text in (answer, expected)]
    if related[0] != related[1] and not _INTERVAL.search(expected if related[0] else answer):
        return False  # math-verify leaves the sign of "> 5" out
    kinds = {_bracket(text) for text in (answer, expected)} - {""}
    if len(kinds) == 2 and "(" in kinds:
        return False  # math-verify finds the pair (1,2), the set {1,2} and the list 1,2 equal
    if kinds == {","}:
        elements = [sorted(map(normalised, _BETWEEN_ELEMENTS.split(text))) for text in (answer, expected)]
        if any(len(set(each)) < len(each) for each in elements):
            return elements[0] == elements[1]  # math-verify finds 1,2,2 and 1,2 equal
    builders = [_SET_BUILDER.fullmatch(normalised(text)) for text in (answer, expected)]
    if any(builders):  # of which math-verify compares only the beginning
        found, wanted = builders
        return bool(found and wanted and found[1] == wanted[1] and _same_answer(found[2], wanted[2]))
    if _NAMED_BY_POINTS.search(expected):
        return False  # math-verify reads the points as factors, whose order does not matter
    # A time or a ratio is no quotient.
    pairs = _PAIR.fullmatch(answer), _PAIR.fullmatch(expected)
    if any(pairs):
        return all(pairs) and _same_pair(*(pair.groups() for pair in pairs if pair))
    # Words never reach math-verify, which reads them as products of letters: it finds "evne" equal to "even".
    return answer.casefold() == expected.casefold() if _WORDS.fullmatch(expected) else None


def _bracket(text: str) -> str:
    r"""Return the kind of a bare answer with a comma: "{" for a set, "(" for a tuple or an interval, "," for a list.

    Other answers have none: "". The name before an equals sign or ``\in`` does not count.
    """
    text = _NAME_BEFORE.sub("", text, count=1)
    if "," not in text or "\\begin" in text:
        return ""
    if text.startswith("\\{") and text.endswith("\\}"):
        return "{"
    depth = 0
    for position, character in enumerate(text):
        depth += (character in "([") - (character in ")]")
        if depth == 0:  # the first bracket closes here
            return "(" if position == len(text) - 1 and position > 0 else ","
    return ","


def _same_sequence(answer: str, expected: str) -> bool:
    """Return whether two sequences with dots have the same elements, one by one."""
    answers, expectations = (normalised(text).split(",") for text in (answer, expected))
    # A bracket that a comma divides cannot be compared by its value, and its text was.
    return len(answers) == len(expectations) > 1 and all(
        a == e or ("ldots" not in a + e and _same_answer(a, e)) for a, e in zip(answers, expectations, strict=True)
    )


def _same_pair(answer: tuple[str | None, ...], expected: tuple[str | None, ...]) -> bool:
    half_day = [(pair[-1] or "").lower() for pair in (answer, expected)]
    return answer[:-1] == expected[:-1] and (half_day[0] == half_day[1] or not all(half_day))


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
