r"""One spelling for everything that is written in several ways: characters, wrappers, LaTeX commands.

`tidy` gives a text one kind of dash, space and digit, and may be applied to whole completions. `bare` takes off what is
put around a short answer, such as dollars, bold and ``\text``. `normalised` is the form in which two answers are
compared as text.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

# Fullwidth forms (U+FF01 to U+FF5E) of ASCII, and characters that have an ASCII or a LaTeX spelling.
_CHARACTERS: dict[int, str] = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
_CHARACTERS |= dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2212\ufe63"), "-")
_CHARACTERS |= dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\u00ad"), "")
_CHARACTERS |= {ord(a): b for a, b in zip("\u2018\u2019\u201c\u201d\u3002\u2044\u2215", "''\"\".//", strict=True)}
_CHARACTERS |= {
    ord(character): f"\\{name} "
    for character, name in {
        "\u00d7": "times",
        "÷": "div",
        "·": "cdot",
        "⋅": "cdot",
        "π": "pi",
        "∞": "infty",
        "≤": "le",
        "≥": "ge",
        "≠": "ne",
        "≈": "approx",
        "±": "pm",
        "∅": "emptyset",
        "Ø": "emptyset",
        "\u222a": "cup",
        "∩": "cap",
        "∈": "in",
        "→": "to",
        "θ": "theta",
        "\u03b1": "alpha",
        "β": "beta",
        "\u03bc": "mu",
        "\u00b5": "mu",
        "\u03a9": "Omega",
        "\u2126": "Omega",
        "…": "ldots",
        "⋯": "ldots",
    }.items()
}
_VULGAR_FRACTIONS = {
    character: unicodedata.normalize("NFKD", character).replace("\u2044", "/") for character in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒"
}
_VULGAR = re.compile(rf"(?<=\d)(?P<joined>[{''.join(_VULGAR_FRACTIONS)}])|[{''.join(_VULGAR_FRACTIONS)}]")
_RANGE_DASH = re.compile(r"(?<=\d)\s*[\u2013\u2014]\s*(?=\d)")
_LONG_DASH = re.compile("[\u2013\u2014\u2015]")
_SUPERSCRIPTS = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b", "0123456789-")
_POWER = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b]+")
_ROOT = re.compile(r"√\s*(?:(\d+)|\(([^()]*)\))")
# What stands between groups of three digits: LaTeX's thin spaces and braced comma, and spaces that do not break a line.
_GROUP_MARK = re.compile(r"(?<=\d)(?:\\[,!]|\{,\}|,\\!\s*|[~\u00a0\u2009\u202f])(?=\d{3}(?!\d))")
_SPACED_GROUPS = re.compile(r"(?<![\d.])\d{1,3}(?: \d{3})+(?![\d])")

_TEXT_MACRO = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|mbox|hbox|math(?:rm|bf|it|sf|tt)|boldsymbol|bm|operatorname)\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
)
_SPACING = re.compile(
    r"\\(?:left|right|middle|[bB]igg?[lr]?)(?![a-zA-Z])|\\(?:displaystyle|limits|quad|qquad)(?![a-zA-Z])|\\!\s*"
)
_SPACE_MACRO = re.compile(r"\\[,;:> ]|~")
_BOLD = re.compile(r"(?<![\w)\]}])\*\*(\S.*?)\*\*(?!\w)")
_WRAPPERS = (
    ("$$", "$$"),
    ("$", "$"),
    (r"\(", r"\)"),
    (r"\[", r"\]"),
    ("**", "**"),
    ("__", "__"),
    ("*", "*"),
    ("_", "_"),
    ("`", "`"),
    ('"', '"'),
    ("'", "'"),
)
_ANSWER_IS = re.compile(
    r"(?:(?:so |thus |hence |therefore )?,?\s*(?:the |my )?(?:final |correct )*answer(?:\s+is|\s*[:=])+)\s*", re.I
)

_SYNONYMS = {
    "dfrac": "frac",
    "tfrac": "frac",
    "cfrac": "frac",
    "varnothing": "emptyset",
    "leq": "le",
    "leqslant": "le",
    "geq": "ge",
    "geqslant": "ge",
    "neq": "ne",
    "rightarrow": "to",
    "longrightarrow": "to",
    "times": "cdot",
    "ast": "cdot",
    "wedge": "land",
    "vee": "lor",
    "dots": "ldots",
    "cdots": "ldots",
    "dotsc": "ldots",
    "dotsb": "ldots",
    "lbrace": "{",
    "rbrace": "}",
    "lbrack": "[",
    "rbrack": "]",
    "infin": "infty",
    "overrightarrow": "vec",
    "varepsilon": "epsilon",
    "varphi": "phi",
    "lnot": "neg",
    "backslash": "setminus",
    **{name: f"mathbb{{{name}}}" for name in "CNQRZ"},
}
# Functions without a backslash, or in a macro.
_FUNCTIONS = "arcsin|arccos|arctan|sin|cos|tan|cot|csc|ln|pi"
_FUNCTION_MACRO = re.compile(rf"\\(?:operatorname|mathrm|text)\s*\{{({_FUNCTIONS}|sec|log|exp)\}}")
_PLAIN_FUNCTION = re.compile(rf"(?<![\\A-Za-z{{])({_FUNCTIONS})(?![A-Za-z])")
_PLAIN_ROOT = re.compile(r"(?<![\\A-Za-z])sqrt\s*(?:\(([^()]*)\)|(\d+))")
_NEGATIVE = re.compile(r"(?:negative|minus)\s+(?=[\d.$\\])", re.IGNORECASE)
_BARS = re.compile(r"\\(?:[lr]?vert|mid)(?![A-Za-z])")
_INNER_MATHS = re.compile(r"\$\$([^$]+)\$\$|\$(?![\s$])([^$]*[^\s$\\])\$(?!\d)|\\\((.*?)\\\)|\\\[(.*?)\\\]", re.DOTALL)
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_UNIT_FRACTION = re.compile(r"(?<=\d)\s*\\frac\s*\{(\s*[A-Za-z][\w^ ]*)\}\s*\{\s*([A-Za-z][\w^ ]*)\}$")
_DOTS = re.compile(r"\\(?:[lc]?dots|dots[cbmio])(?![A-Za-z])|\.{3,}")
_DEGREE = re.compile(r"\^\s*(?:\{\s*\\(?:circ|degree)\s*\}|\\circ(?![A-Za-z]))|(?:\^\s*)?\\degree(?![A-Za-z])")
_NOT = re.compile(r"\\not\s*(=|\\in(?![A-Za-z]))")
_SHORT_FRACTION = re.compile(r"\\frac\s*(\d)\s*(\d)")
_SHORT_ROOT = re.compile(r"\\sqrt\s*(\d)")
_SINGLE_BRACES = re.compile(r"(?<=[\^_])\{(-?\w|\\[A-Za-z]+)\}")
_SPACES = re.compile(r"(?<!\d)\s+|\s+(?!\d)")


def tidy(text: str) -> str:
    r"""Return a text with one kind of dash, digit, space and thousands separator.

    A long dash between two numbers becomes ``--``, the range of LaTeX. Every other long dash is a minus.
    """
    text = _VULGAR.sub(lambda match: " " * bool(match["joined"]) + _VULGAR_FRACTIONS[match[0]], text)
    text = _RANGE_DASH.sub("--", text)
    text = _LONG_DASH.sub("-", text)
    text = _ROOT.sub(lambda match: f"\\sqrt{{{match[1] or match[2]}}}", text)
    text = _POWER.sub(lambda match: f"^{{{match[0].translate(_SUPERSCRIPTS)}}}", text)
    text = text.translate(_CHARACTERS)
    text = _GROUP_MARK.sub(",", text)
    return text.replace("\u00a0", " ").replace("\u2009", " ").replace("\u202f", " ")


def unwrapped(text: str) -> str:
    r"""Return a tidy answer without what is put around it (dollars, bold, "answer:"), in one kind of LaTeX."""
    text = _BOLD.sub(r"\1", text).strip("* \n\t")
    before = None
    while before != text:
        before = text
        text = _ANSWER_IS.sub("", _without_end_marks(text), count=1)
        text = _without_wrapper(text)
    text = _SPACING.sub("", _INNER_MATHS.sub(_contents, text))
    text = re.sub(r"(?<=[\w)\]}])\s*\*\*\s*(?=[\w({-])", "^", text)  # Python's power
    text = _PLAIN_ROOT.sub(lambda match: f"\\sqrt{{{match[1] or match[2]}}}", _FUNCTION_MACRO.sub(r"\\\1 ", text))
    text = _PLAIN_FUNCTION.sub(r"\\\1 ", text)
    if match := _NEGATIVE.match(text):
        text = "-" + text[match.end() :]
    text = _NOT.sub(lambda match: r"\ne " if match[1] == "=" else r"\notin", _DEGREE.sub(r"^{\\circ}", text))
    text = _COMMAND.sub(_synonym, text.replace("\\%", "%").replace("\\#", "#"))
    text = re.sub(r"\\mathbb\s*([A-Z])", r"\\mathbb{\1}", text)
    text = _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", text)
    return _SHORT_ROOT.sub(r"\\sqrt{\1}", text).strip()


@lru_cache(maxsize=8192)
def bare(text: str) -> str:
    r"""Return the unwrapped answer without text macros and LaTeX's spaces, with commas between groups of digits."""
    text = unwrapped(text).replace("\\$", "$")
    before = None
    while before != text:  # nested macros, from the inside
        before, text = text, _TEXT_MACRO.sub(r" \1", text)
    text = " ".join(_SPACE_MACRO.sub(" ", text).split())
    text = _UNIT_FRACTION.sub(r"\1/\2", text)
    text = _SPACED_GROUPS.sub(lambda match: match[0].replace(" ", ","), text)
    return _without_end_marks(text.replace(r"^{\circ}", "°"))


def normalised(text: str) -> str:
    """Return a bare answer without spaces, except between two digits, and without braces around one character."""
    text = _BARS.sub("|", _DOTS.sub(r"\\ldots", bare(text)).replace("$", ""))
    text = _SINGLE_BRACES.sub(r"\1", text)
    if text.startswith("\\{"):
        text = text.replace(":", "|", 1)  # both are "such that"
    text = re.sub(r"\\ldots\s*(?=\\})", r"\\ldots", text)
    text = _SPACES.sub("", text)
    return r"\emptyset" if text == r"\{\}" else text


def has_dots(text: str) -> bool:
    r"""Return whether a text goes on: with ``\ldots`` or ``...`` beside a comma or an operator, or after decimals."""
    return _DOTS.search(text) is not None and re.search(r"[,+*<]|cdot|le|\.\d", _DOTS.sub("", text)) is not None


def _contents(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group is not None)


def _without_end_marks(text: str) -> str:
    text = text.strip()
    return text if has_dots(text) else text.rstrip(" \n\t.,;")


def _without_wrapper(text: str) -> str:
    for start, end in _WRAPPERS:
        inside = text[len(start) : -len(end)]
        wrapped = len(text) > len(start) + len(end) and text.startswith(start) and text.endswith(end)
        if wrapped and start not in inside and end not in inside:
            return inside
    return text


def _synonym(match: re.Match[str]) -> str:
    name = _SYNONYMS.get(match[1])
    if name is None:
        return match[0]
    return name if name in "[]" else f"\\{name}"
