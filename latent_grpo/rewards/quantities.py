r"""Plain numbers with what is written around them: ``-1{,}250.5``, ``1\frac{1}{2}``, ``$18``, ``50\%``, ``20 km/h``.

A quantity is a rational number, exact however small or large it is, with a unit or a percent sign. The values of the
parser are bounded: an exponent has at most three digits.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

# Allowed rounding where the reference is not an integer: relative, and never more than PAL's tolerance for GSM-Hard.
_RELATIVE_TOLERANCE = Fraction(1, 10**6)
_ABSOLUTE_TOLERANCE = Fraction(1, 10**3)

_CHARACTERS = 500  # of the longest quantity that is read; Python refuses integers of some thousand digits

# `DECIMAL` accepts a comma only between groups of three digits.
DECIMAL = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
_POWER_OF_TEN = r"10\^(?:\{\s*(?:[-+]?\d{1,3})\s*\}|[-+]?\d{1,3})"
_TIMES = r"\s*(?:\\times|\\cdot|[*x])\s*"
SCIENTIFIC = rf"(?:{DECIMAL}{_TIMES})?{_POWER_OF_TEN}"
LATEX_FRACTION = rf"\\frac\s*(?:\{{\s*{DECIMAL}\s*\}}|\d)\s*(?:\{{\s*{DECIMAL}\s*\}}|\d)"
SLASH_FRACTION = rf"{DECIMAL}/{DECIMAL}"
MIXED = rf"\d+(?:\s*{LATEX_FRACTION}|\s+\d+/\d+)"
DECIMAL_EXPONENT = rf"{DECIMAL}(?:[eE][-+]?\d{{1,3}})?"
REPEATING = r"\d*\.\d*\\overline\{\d+\}"
# Longer forms first, because an alternation takes the first that matches.
NUMBER = rf"(?:{REPEATING}|{MIXED}|{LATEX_FRACTION}|{SLASH_FRACTION}|{SCIENTIFIC}|{DECIMAL_EXPONENT})"

_CURRENCY = {"$": "dollar", "US$": "dollar", "USD": "dollar", "€": "euro", "EUR": "euro", "£": "gbp", "GBP": "gbp"}
_CURRENCY |= {"¥": "yen", "₹": "rupee", "Rs.": "rupee", "Rs": "rupee", "INR": "rupee"}
_CURRENCY_SIGN = "|".join(re.escape(sign) for sign in sorted(_CURRENCY, key=len, reverse=True))
_QUANTITY = re.compile(
    rf"(?P<sign>[-+]?)\s*(?P<currency>{_CURRENCY_SIGN})?\s*(?P<sign_after>[-+]?)\s*(?P<number>{NUMBER})(?P<rest>.*)",
    re.DOTALL,
)
_SCIENTIFIC_PARTS = re.compile(rf"(?:(?P<factor>{DECIMAL}){_TIMES})?10\^\{{?\s*(?P<exponent>[-+]?\d+)\s*\}}?")
_REPEATING_PARTS = re.compile(r"(?P<whole>\d*)\.(?P<digits>\d*)\\overline\{(?P<period>\d+)\}")
_MIXED_PARTS = re.compile(r"(?P<whole>\d+)(?:\s*(?P<latex>\\frac.*)|\s+(?P<slash>\d+/\d+))")
_LATEX_PARTS = re.compile(r"\\frac\s*(?:\{([^}]*)\}|(\d))\s*(?:\{([^}]*)\}|(\d))")

_PERCENT = re.compile(r"\s*(?:\\?%|percent|per cent|pct)", re.IGNORECASE)
_MULTIPLES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_MICRO = ("m", "s", "g", "l", "L", "A", "C", "F", "H", "V", "mol")  # units that are written with a Greek letter
# Units whose spellings are compared. Every other word after a number is a name for what is counted.
_UNIT_SPELLINGS = {
    "mm": "millimeter millimetre",
    "cm": "centimeter centimetre",
    "dm": "decimeter decimetre",
    "m": "meter metre",
    "km": "kilometer kilometre",
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard",
    "mi": "mile",
    "mg": "milligram",
    "g": "gram gm",
    "kg": "kilogram kilo",
    "lb": "lbs",
    "oz": "ounce",
    "ms": "millisecond",
    "s": "second sec secs",
    "min": "minute mins",
    "h": "hour hr hrs",
    "day": "",
    "week": "",
    "month": "",
    "year": "yr yrs",
    "ml": "mL milliliter millilitre",
    "l": "L liter litre",
    "gal": "gallon",
    "degree": "deg °",
    "°C": "Celsius celsius",
    "°F": "Fahrenheit fahrenheit",
    "rad": "radian",
    "N": "newton",
    "J": "joule",
    "W": "watt",
    "kW": "kilowatt",
    "Pa": "pascal",
    "Hz": "hertz",
    "mol": "mole",
    "dollar": "$ USD buck",
    "cent": "¢",
    "euro": "€ EUR",
    "gbp": "£ GBP",
    "yen": "¥",
    "rupee": "₹ INR Rs",
    "unit": "",
    "ohm": "\\Omega",
    "kohm": "k\\Omega",
    "Mohm": "M\\Omega",
    **{f"u{unit}": f"\\mu{unit}" for unit in _MICRO},
    **dict.fromkeys(("nm", "ns", "eV", "kJ", "MJ", "kN", "MW", "mV", "kV", "mA", "KB", "MB", "GB", "TB"), ""),
}
_UNITS = {
    name: unit
    for unit, spellings in _UNIT_SPELLINGS.items()
    for word in (unit, *spellings.split())
    for name in ((word, word + "s", word.capitalize(), word.capitalize() + "s") if len(word) > 2 else (word,))
}
_COMPOUND = {"mph": "mi/h", "kph": "km/h", "kmh": "km/h", "kmph": "km/h", "mps": "m/s", "cc": "cm^3", "fps": "ft/s"}
_SPOKEN_POWERS = {"square": 2, "squared": 2, "sq": 2, "cubic": 3, "cubed": 3, "cu": 3}
# Words that change a number, or add to it. A text with one of them is no plain number.
_NO_UNITS = frozenset(
    re.findall(
        r"\w+",
        "or and more less over under above below not about than plus minus times divided pi sqrt root infinity infty "
        "factorial halves half thirds third quarters fourths fifths sixths tenths hundredths mod log exp sin cos tan "
        "cot csc negative base remainder choose alpha beta gamma delta epsilon theta lambda sigma omega phi rho tau",
    )
)
_UNIT_TOKEN = re.compile(
    rf"(?P<word>°[CF]?|[$€£¥₹¢]|[kM]?\\Omega|\\mu ?(?:{'|'.join(_MICRO)})(?![A-Za-z])|[A-Za-z]+(?:-[A-Za-z]{{3,}})*)\.?"
    r"(?:\^?\{?(?P<power>(?<=[\^{])-?[1-4])\}?)?\s*"
)
_UNIT_JOIN = re.compile(r"(?P<per>/|per\b|an?\b(?=\s))|\*|\\cdot|\\times|", re.IGNORECASE)


class Quantity(NamedTuple):
    """A number with its unit."""

    value: Fraction
    percent: bool = False  # then `value` is the number before the percent sign
    unit: tuple[tuple[str, int], ...] | None = None  # sorted (unit, power); None: none, or a word for what is counted


def same_quantity(answer: Quantity, reference: Quantity) -> bool:
    """Return whether an answer is the reference.

    Two units that are both known must agree. ``p%`` is ``p/100``, and also the bare number ``p`` where that is over 1:
    a question that asks for a percentage is answered by ``20`` as well as by ``20%``. A bare number of at most 1 is a
    share, so ``0.5%`` and ``0.5`` differ.
    """
    if answer.percent == reference.percent:
        units_agree = answer.unit is None or reference.unit is None or answer.unit == reference.unit
        return units_agree and _close(answer.value, reference.value)
    if (answer.unit or reference.unit) is not None:
        return False
    if answer.percent:
        return _close(answer.value / 100, reference.value) or (
            abs(reference.value) > 1 and _close(answer.value, reference.value)
        )
    return _close(answer.value, reference.value / 100) or (
        abs(reference.value) > 1 and _close(answer.value, reference.value)
    )


def _close(value: Fraction, expected: Fraction) -> bool:
    if expected.denominator == 1:
        return value == expected
    return abs(value - expected) <= min(_ABSOLUTE_TOLERANCE, _RELATIVE_TOLERANCE * abs(expected))


@lru_cache(maxsize=8192)
def read_quantity(text: str) -> Quantity | None:
    """Return the quantity that a text is, or None if it is none. The text is as `notation.tidy` and `bare` leave it."""
    match = _QUANTITY.fullmatch(text) if len(text) <= _CHARACTERS else None
    if match is None or (match["sign"] and match["sign_after"]):
        return None
    value = number_value(match["number"])
    if value is None:
        return None
    if "-" in (match["sign"], match["sign_after"]):
        value = -value
    rest = match["rest"]
    words = rest.split(maxsplit=1)
    if words and words[0].lower() in _MULTIPLES:
        value, rest = value * _MULTIPLES[words[0].lower()], " ".join(words[1:])
    currency = _CURRENCY.get(match["currency"] or "")
    return _with_rest(value, rest, currency)


def _with_rest(value: Fraction, rest: str, currency: str | None) -> Quantity | None:
    percent = _PERCENT.match(rest)
    if percent:
        return None if rest[percent.end() :].strip(" .") or currency else Quantity(value, percent=True)
    if not rest.strip(" ."):
        return Quantity(value, unit=((currency, 1),) if currency else None)
    powers = unit_powers(rest.strip())
    if powers is None:
        return None
    known = all(unit in _UNIT_SPELLINGS for unit in powers)
    unit = tuple(sorted((unit, power) for unit, power in powers.items() if power)) if known and not currency else None
    return Quantity(value, unit=unit)


def number_value(text: str) -> Fraction | None:
    """Return the value of an unsigned number in one of the forms of ``NUMBER``, or None if its value is undefined."""
    if match := _SCIENTIFIC_PARTS.fullmatch(text):
        return _decimal(match["factor"] or "1") * Fraction(10) ** int(match["exponent"])
    if match := _REPEATING_PARTS.fullmatch(text):
        digits, period = match["digits"], match["period"]
        repeating = Fraction(int(digits + period) - int(digits or "0"), 10 ** len(digits) * (10 ** len(period) - 1))
        return int(match["whole"] or "0") + repeating
    if match := _MIXED_PARTS.fullmatch(text):
        part = number_value(match["latex"] or match["slash"])
        # With 1 or more, the fraction is no part of a mixed number: it might be a factor.
        return None if part is None or part >= 1 else int(match["whole"]) + part
    if match := _LATEX_PARTS.fullmatch(text):
        top, bottom = match[1] or match[2], match[3] or match[4]
    elif "/" in text:
        top, _, bottom = text.partition("/")
    else:
        return _decimal(text)
    denominator = _decimal(bottom.strip())
    return _decimal(top.strip()) / denominator if denominator else None


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def unit_powers(text: str) -> dict[str, int] | None:
    """Return the units of a text such as ``km/h`` or ``square meters``, with their powers; None if it is no unit.

    A unit is one of the table, or a word of three letters or more: a name for what is counted.
    """
    powers: dict[str, int] = {}
    position, sign, spoken = 0, 1, 1
    while position < len(text):
        join = _UNIT_JOIN.match(text, position)
        assert join is not None  # the last alternative is empty
        if join["per"]:
            sign = -1
        start = join.end() + len(text[join.end() :]) - len(text[join.end() :].lstrip())
        token = _UNIT_TOKEN.match(text, start)
        if token is None:
            return None
        position, word = token.end(), token["word"].replace(" ", "")
        if word.lower() in _SPOKEN_POWERS:
            if word.lower() in ("squared", "cubed"):
                if not powers:
                    return None  # "5 squared" is 25
                powers[next(reversed(powers))] *= _SPOKEN_POWERS[word.lower()]
            else:
                spoken = _SPOKEN_POWERS[word.lower()]
            continue
        found = _powers_of_word(word, int(token["power"] or 1) * spoken)
        if not found:
            return None
        for unit, power in found.items():
            powers[unit] = powers.get(unit, 0) + sign * power
        spoken = 1
    return powers if powers and spoken == 1 else None


def _powers_of_word(word: str, power: int) -> dict[str, int]:
    """Return the units of one word with their powers, {} if it is no unit."""
    compound = _COMPOUND.get(word.lower())
    if compound:
        return {unit: each * power for unit, each in (unit_powers(compound) or {}).items()}
    if len(word) == 1 and word not in "ms" and power > 1:
        return {}  # "3l^2" is no power of a litre
    if word in _UNITS:
        return {_UNITS[word]: power}
    if len(word) < 3 or word.lower() in _NO_UNITS:
        return {}
    return {word.lower(): power}
