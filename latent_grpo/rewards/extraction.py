r"""How an answer is read out of a completion. The rules are in `rewards/answers.py`."""

from __future__ import annotations

import re

from latent_grpo.rewards.notation import bare, normalised
from latent_grpo.rewards.quantities import NUMBER, read_quantity

ANSWER_CHARACTERS = 500  # the longest answer that is compared
_FORMULA_CHARACTERS = 200  # the longest formula that is read out of a text without a mark

# A minus sign belongs to the number only where it cannot be a subtraction: "10-5" ends in 5, not in -5.
_NUMBER_IN_TEXT = re.compile(rf"(?:(?<![\w)\]}}\-])-)?(?:\\?\$|[€£])?(?<!\d)(?<!\d[.:]){NUMBER}(?!:\d)(?:\s?\\?%)?")
_STATED = re.compile(r"answer(?:\s+is|\s*[:=])[:*\s]*(.+)", re.IGNORECASE)
_TIME = re.compile(r"(?<![\d:])\d{1,3}:\d{1,3}(?::\d\d)?(?![\d:])(?:\s*[ap]\.?\s?m\b\.?)?", re.IGNORECASE)

# Mathematics in a text. Pandoc's rule tells a formula in dollars from two prices: no space inside, no digit behind.
_FORMULA = re.compile(
    r"\$\$(?P<display>[^$]{1,500})\$\$|\$(?P<inline>(?![\s$])[^$\n]*?(?<![\s\\]))\$(?!\d)"
    r"|\\\((?P<round>.{1,500}?)\\\)|\\\[(?P<square>.{1,500}?)\\\]",
    re.DOTALL,
)
# A run of LaTeX, digits, operators and single letters. Words of two letters or more end it.
_RUN = re.compile(
    r"(?:\\[A-Za-z]+(?:\s*\{[^{}]*\})?|\\.|(?<![A-Za-z])[A-Za-z](?![A-Za-z])|[\d{}()\[\]^_+\-*/=|!<>.,' ])+"
)
_GOES_ON = re.compile(r"[ ,]*\.{3,}")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_MACRO = re.compile(r"\\(?:text|mathrm|mbox|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+|\\[^A-Za-z]")
_OPERATOR_BEFORE = re.compile(r"\d\)?%? ?[-+*/] ?$")
_ALTERNATIVE_BEFORE = re.compile(r"\d%?,? or $")
_PART_OF_A_FORMULA_BEFORE = re.compile(r"(?:[\^_{(]|\\[A-Za-z]+\s*|[A-Za-z]\(?)$")
_PART_OF_A_FORMULA_BEHIND = re.compile(
    r"\s*(?:\\(?!\\|[,;:!. )\]$%]|text|quad|mathrm)|[\^_]|[+*/-]\s*[A-Za-z\\](?![A-Za-z]))|(?!\w{3})[a-z](?![A-Za-z])"
)

_CHOICE_ANSWER = re.compile(r"[\s(*\[{]*([A-J])(?:\s*[]}).:*].*)?", re.IGNORECASE | re.DOTALL)
_LETTER = r"[:=*($\s\[{\"']*(?:\\(?:text|mathrm|textbf|mathbf|boxed)\s*\{)?\(?([A-J])(?![A-Za-z'])"
_SEVERAL = re.compile(r"[\s)*$\]}.]*(?:,|/|&|\bor\b|\band\b)\s*(?:option\s+|choice\s+)?[\s(*$\[{]*[A-J](?![A-Za-z'])")
_ONE_OF_SEVERAL = re.compile(r"(?<![A-Za-z])[A-J][\s)*$.]*(?:,|/|&|\bn?or\b|\band\b)[\s(*$]*(?:and|or)?[\s(*$]*$")
_NEGATED = re.compile(r"(?:\bnot|\bcannot|n't|\bneither|\bnever)(?:\s+be)?\s*[\s(*$\[{]*$", re.IGNORECASE)
# Tried in this order. The last match of the first pattern that matches is the choice.
_CHOICE_IN_TEXT = (
    re.compile(rf"(?i:answer(?:\s+choice)?(?:\s+is)?){_LETTER}"),
    re.compile(rf"(?i:(?:choice|option)(?:\s+is)?){_LETTER}"),
    re.compile(r"(?:^|[\s(*$\[{])([A-J])[]}).*$]*\s*$", re.MULTILINE),
)


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


def choice_letter(text: str, marked: str | None) -> str | None:
    """Return the chosen letter in upper case, or None. A marked answer that is not a letter is not searched further."""
    if marked is None and len(text) <= ANSWER_CHARACTERS and re.fullmatch(r"\(?[A-J]\)?", bare(text)):
        marked = text
    if marked is not None:
        match = _CHOICE_ANSWER.fullmatch(bare(marked[:ANSWER_CHARACTERS]))
        return match[1].upper() if match else None
    for pattern in _CHOICE_IN_TEXT:
        matches = list(pattern.finditer(text))
        if matches:
            # "B or C" and "not B" choose none.
            before, end = text[: matches[-1].start(1)][-40:], matches[-1].end(1)
            unclear = _SEVERAL.match(text, end) or _NEGATED.search(before) or _ONE_OF_SEVERAL.search(before)
            return None if unclear else matches[-1][1]
    start = re.match(r"[\s(*]*([A-J])[).:]+\**\s", text)  # "B) because"
    return start[1] if start and "\n" not in text.strip() else None


def unmarked_answer(text: str, reference: str) -> str | None:
    """Return the answer of a text without a mark, or None. The kind of the reference decides where it is looked for."""
    number = read_quantity(bare(reference))
    # The whole text may be the answer, without a word around it.
    if len(text) <= ANSWER_CHARACTERS and (
        read_quantity(bare(text)) or normalised(text).casefold() == normalised(reference).casefold()
    ):
        return text
    if number is not None:
        return _last_number(text)
    if _TIME.fullmatch(bare(reference)):
        times = _TIME.findall(text)
        return times[-1] if times else None
    stated = _STATED.findall(text)
    if stated:
        return _first_formula(str(stated[-1]).strip())
    return _last_formula(text) or _last_number(text)


def _first_formula(statement: str) -> str:
    formula = _FORMULA.match(statement)
    return formula[0] if formula else statement.rstrip(".")


def _last_formula(text: str) -> str | None:
    """Return the formula at the end of a text, in dollars or not; None if the last line ends in words."""
    end = _without_end_marks(text)
    formulas = list(_FORMULA.finditer(text))
    if formulas and formulas[-1].end() >= len(end):
        return _right_side(_contents(formulas[-1]))
    line = end.rpartition("\n")[2]
    runs = [match for match in _RUN.finditer(line) if match.end() == len(line)]
    if not runs:
        return None
    return _right_side(_without_article(runs[-1][0])) if re.search(r"[\\\d^=+*/(]", runs[-1][0]) else None


def _last_number(text: str) -> str | None:
    """Return the last number of a text; where it is a part of a formula, the formula."""
    formulas = [match for match in _FORMULA.finditer(text) if not has_words(_contents(match))]
    numbers = [match for match in _NUMBER_IN_TEXT.finditer(text) if not _NEGATED.search(text[: match.start()][-20:])]
    if not numbers:
        return None
    number = numbers[-1]
    if len(numbers) > 1 and text[: number.start()].endswith(("^", "^{")):
        with_unit = text[numbers[-2].start() : number.end()].replace("^{", "^")
        if len(with_unit) <= ANSWER_CHARACTERS and read_quantity(bare(with_unit)):
            return with_unit  # the power of a unit: 36 cm^2
    for formula in formulas:
        if formula.start() <= number.start() and number.end() <= formula.end():
            return _right_side(_contents(formula))
    before, behind = text[: number.start()], text[number.end() :]
    parts_before = (_PART_OF_A_FORMULA_BEFORE, _OPERATOR_BEFORE)
    if any(part.search(before[-40:]) for part in parts_before) or _PART_OF_A_FORMULA_BEHIND.match(behind[:40]):
        for run in _RUN.finditer(text, max(0, number.start() - ANSWER_CHARACTERS)):
            if run.start() <= number.start() and number.end() <= run.end():
                if len(run[0]) > _FORMULA_CHARACTERS:
                    return None
                return _right_side(_without_article(run[0]))
    return None if _ALTERNATIVE_BEFORE.search(before[-40:]) else number[0]  # "12 or 13" chooses none


def _contents(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group is not None)


def has_words(text: str) -> bool:
    r"""Return whether there is a word of two letters or more outside of macros such as ``\text``."""
    return _WORD.search(_MACRO.sub(" ", text)) is not None


def _without_article(run: str) -> str:
    run = re.sub(r"^\s*(?:a|A|I|is)\s+(?=\S)", "", run).lstrip(" ,")
    return _without_end_marks(re.sub(r"^\.[ ,.]+", "", run))  # ".5x" keeps its point


def _without_end_marks(text: str) -> str:
    """Return a text without the punctuation and stars at its end, except for the dots of a sequence that goes on."""
    end = text.rstrip(" \n\t.,;*")
    dots = _GOES_ON.match(text, len(end))
    return end + dots[0] if dots else end


def _right_side(formula: str) -> str:
    """Return what follows the last equals sign, or the whole formula without one."""
    return re.split(r"(?<![<>!\\:])=|\\approx", formula)[-1].strip()
