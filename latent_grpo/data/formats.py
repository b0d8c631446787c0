"""The formats of question-answer data: the fields that identify each, and how a row of it is read.

A format is recognised by its field names. `FORMATS` lists those that are.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from latent_grpo.errors import DataError
from latent_grpo.rewards.extraction import marked_answer

_CALCULATOR_MARK = re.compile(r"<<(.*?)>>", re.DOTALL)  # <<48/2=24>> in GSM8K
_GROUPED_NUMBER = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_INTEGRAL_DECIMAL = re.compile(r"([-+]?\d+)\.0+")
_INTEGRAL_IN_EQUATION = re.compile(r"(?<![\d.])(\d+)\.0+(?!\d)")


@dataclass(frozen=True)
class Fields:
    """The values of one source row as the source has them, before they are checked.

    A format whose released scripts use the text as it stands is `exact`: prompt and chain are then not touched.
    """

    prompt: Any
    answer: Any
    chain: Any = None
    answer_text: str | None = None  # the visible answer of a training text, where the source has one
    exact: bool = False


@dataclass(frozen=True)
class Format:
    """One upstream format: the field names that identify it, and the function that reads a row of it."""

    name: str
    required: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Fields]
    optional: tuple[str, ...] = ()  # fields that it reads where a row has them, be they required of the source or not


def final_answer(answer: str | int | float | Decimal) -> str:
    """Return only the final answer as text, an integer without ``.0`` and commas."""
    if isinstance(answer, float | Decimal):
        # Without an exponent and with every digit of the shortest exact form: 2.0107e-06 becomes 0.0000020107.
        answer = format(Decimal(repr(answer)) if isinstance(answer, float) else answer, "f")
    text = str(answer).rpartition("####")[2].strip()
    if _GROUPED_NUMBER.fullmatch(text):
        text = text.replace(",", "")
    integral = _INTEGRAL_DECIMAL.fullmatch(text)
    return integral[1] if integral else text


def chain_text(chain: Any) -> str:
    """Return the chain of thought as one string: the calculator marks if there are any, else the text to ``####``.

    Raises:
        DataError: the chain is no text, no list of texts, and no missing value (None, or NaN as tables write it).
    """
    if chain is None or (isinstance(chain, float) and math.isnan(chain)):
        return ""
    steps = list(chain) if isinstance(chain, list | tuple) else [chain]
    for step in steps:
        if not isinstance(step, str):
            raise DataError(f"the chain of thought holds {step!r:.40}, not a text; name its column with --chain_column")
    marks = [mark.strip() for step in steps for mark in _CALCULATOR_MARK.findall(step)]
    text = " ".join(marks) if marks else " ".join(step.strip() for step in steps)
    return text.partition("####")[0].strip()


def _plain(prompt: str, answer: str, chain: str | None = None) -> Callable[[Mapping[str, Any]], Fields]:
    """Return a reader of a format whose fields need no conversion. A row may lack the field ``chain``."""
    return lambda row: Fields(row[prompt], row[answer], row.get(chain) if chain else None)


def _question_answer(row: Mapping[str, Any]) -> Fields:
    """Read a row of GSM8K. Its answer field contains the rationale too, unless there is no ``####`` in it."""
    answer = row["answer"]
    return Fields(row["question"], answer, answer if isinstance(answer, str) and "####" in answer else None)


def _svamp(row: Mapping[str, Any]) -> Fields:
    """Read a row of SVAMP. Its prompt is the story, then the question about it."""
    prompt = f"{str(row['Body'] or '').strip()} {str(row['Question']).strip()}" if row["Question"] else None
    return Fields(prompt, row["Answer"], _equation_chain(row.get("Equation"), row["Answer"]))


def _multiarith(row: Mapping[str, Any]) -> Fields:
    answer = _first(row["lSolutions"])
    return Fields(row["sQuestion"], answer, _equation_chain(_first(row.get("lEquations")), answer))


def _equation_chain(equation: Any, answer: Any) -> str | None:
    """Return an annotated equation as a calculator mark writes it: ``X=((32.0+42.0)-35.0)`` -> ``(32+42)-35=39``."""
    if not isinstance(equation, str) or not isinstance(answer, str | int | float) or not equation.strip():
        return None
    text = _INTEGRAL_IN_EQUATION.sub(r"\1", "".join(equation.split())).removeprefix("X=")
    return f"{_without_outer_brackets(text)}={final_answer(answer)}"


def _without_outer_brackets(text: str) -> str:
    if not (text.startswith("(") and text.endswith(")")):
        return text
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        # The first bracket is an outer one only if it closes at the end, unlike in (1+2)*(3+4).
        if depth == 0:
            return text[1:-1] if position == len(text) - 1 else text
    return text


def _first(values: Any) -> Any:
    return values[0] if isinstance(values, list) and values else None


def _gpqa(row: Mapping[str, Any]) -> Fields:
    """Read a row of GPQA into a prompt with four lettered choices.

    Their order is that of a hash of the question and the choice. So it is balanced over the rows, and is the same in
    every run, on every Python, and for every selection and order of the rows.
    """
    question, *choices = (str(row[name] or "").strip() for name in ("Question", *GPQA_CHOICES))
    if not question or not all(choices):
        raise DataError("the question or one of its four choices is empty; remove the row")
    order = sorted(range(4), key=lambda i: hashlib.sha256(f"{question}\0{choices[i]}".encode()).digest())
    lines = [f"{letter}. {choices[i]}" for letter, i in zip("ABCD", order, strict=True)]
    prompt = "\n".join([question, "", *lines, "", "Answer with the letter of the correct choice."])
    return Fields(prompt, "ABCD"[order.index(0)], row.get("Explanation"))


def _latent_sft(row: Mapping[str, Any]) -> Fields:
    """Read a row of the released training files of Latent-SFT. Its answer is what the visible answer marks.

    As in the released scripts, the tags around a chain are cut off, and nothing else of it.
    """
    chain, text = row["cot"], row["cot_answer"]
    for name, value in (("cot", chain), ("cot_answer", text)):
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{name} is {value!r:.40}, not a text; remove the row")
    answer = row.get("answer") or marked_answer(text) or text
    return Fields(row["problem"], answer, chain.removeprefix("<think>").removesuffix("</think>"), text, exact=True)


def _verl(row: Mapping[str, Any]) -> Fields:
    """Read a row of the released Latent-GRPO parquet files, whose schema is verl's."""
    reward_model, extra = row["reward_model"], row.get("extra_info")
    answer = reward_model.get("ground_truth") if isinstance(reward_model, Mapping) else None
    original = extra.get("answer") if isinstance(extra, Mapping) else None
    has_rationale = isinstance(original, str) and "####" in original
    return Fields(row["prompt"], answer, original if has_rationale else None)


GPQA_CHOICES = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")

# The first format whose fields are all present is taken, so a format comes before others that need fewer of its fields.
FORMATS = (
    Format("Latent-GRPO/verl", ("prompt", "reward_model"), _verl, ("extra_info",)),
    Format("GPQA", ("Question", *GPQA_CHOICES), _gpqa, ("Explanation",)),
    Format("Latent-SFT", ("problem", "cot", "cot_answer"), _latent_sft, ("answer",)),
    Format("GSM8K-Aug", ("question", "steps", "answer"), _plain("question", "answer", "steps"), ("steps",)),
    Format("GSM8K-Aug with cot", ("question", "cot", "answer"), _plain("question", "answer", "cot"), ("cot",)),
    Format("GSM8K", ("question", "answer"), _question_answer),
    Format("GSM-Hard", ("input", "code", "target"), _plain("input", "target"), ("code",)),
    Format("SVAMP", ("Body", "Question", "Equation", "Answer"), _svamp, ("Equation",)),
    Format("MultiArith", ("sQuestion", "lEquations", "lSolutions"), _multiarith, ("lEquations",)),
    Format("MultiArith on the Hub", ("question", "final_ans"), _plain("question", "final_ans")),
    Format("MATH-500 or AIME", ("problem", "answer"), _plain("problem", "answer", "solution"), ("solution",)),
    Format("AIME on the Hub", ("Problem", "Answer"), _plain("Problem", "Answer", "Solution"), ("Solution",)),
    Format("prompt and answer", ("prompt", "answer"), _plain("prompt", "answer", "chain"), ("chain",)),
)
