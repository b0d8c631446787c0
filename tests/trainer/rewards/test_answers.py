"""Correct and wrong answers: every row of the real data sets, and the ways of writing an answer."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import SHARED

from latent_grpo.data.rows import load_rows
from latent_grpo.rewards.functions import accuracy_reward

SHARED_DATA = SHARED / "data"
DATA_FILES = [
    "gsm8k_train.jsonl",
    "gsm8k_test.jsonl",
    "gsm_hard.jsonl",
    "svamp.json",
    "multiarith.json",
    "math500_test.jsonl",
    "aime24_test.jsonl",
]
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


def shared(name: str) -> Path:
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"the data set {name} is not beside the repository")
    return path


def accuracy(completion: str, reference: Any) -> float:
    return accuracy_reward([completion], [reference])[0]


def failures(completions: list[str], answers: list[str], expected: float) -> list[tuple[str, str]]:
    rewards = accuracy_reward(completions, answers)
    return [
        pair for pair, value in zip(zip(completions, answers, strict=True), rewards, strict=True) if value != expected
    ]


def perturbed(answer: str, step: int) -> str | None:
    """Return the answer with its first number moved by ``step``, or None if there is no number in it."""
    match = NUMBER.search(answer)
    if match is None:
        return None
    digits = match[0].replace(",", "")
    moved = float(digits) + step if "." in digits else int(digits) + step
    return f"{answer[: match.start()]}{moved}{answer[match.end() :]}"


@pytest.mark.parametrize("name", DATA_FILES)
def test_every_gold_answer_is_correct(name: str) -> None:
    answers = [row["answer"] for row in load_rows(str(shared(name)))]
    for form in (r"So the answer is \boxed{%s}.", "so\n#### %s"):
        assert failures([form % answer for answer in answers], answers, 1.0) == []


@pytest.mark.parametrize("name", DATA_FILES)
def test_every_wrong_number_is_wrong(name: str) -> None:
    answers = [row["answer"] for row in load_rows(str(shared(name)))]
    wrong = [
        (moved, answer) for answer in answers for step in (1, 10) if (moved := perturbed(answer, step)) is not None
    ]
    assert len(wrong) > len(answers)
    assert failures([rf"\boxed{{{moved}}}" for moved, _ in wrong], [answer for _, answer in wrong], 0.0) == []
    assert failures(["I do not know."] * len(answers), answers, 0.0) == []


@pytest.mark.parametrize("name", ["gsm8k_train.jsonl", "gsm8k_test.jsonl"])
def test_every_original_gsm8k_answer_is_correct(name: str) -> None:
    path = shared(name)
    texts = [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert failures(texts, [row["answer"] for row in load_rows(str(path))], 1.0) == []


def test_every_math500_solution_is_correct() -> None:
    rows = load_rows(str(shared("math500_test.jsonl")))
    assert failures([row["chain"] for row in rows], [row["answer"] for row in rows], 1.0) == []


CORRECT = [
    (r"\boxed{1} then \boxed{2}", "2"),
    (r"\boxed{5} #### 6", "5"),
    (r"\boxed 5", "5"),
    (r"\fbox{1} \boxed{\{1\}}", r"\{1\}"),
    ("#### 1,080\nThat took 3 steps.", "1080"),
    ("He pays $18.", "18"),
    ("x = 10-5", "5"),
    ("so x=-5", "-5"),
    ("the points (3,18)", "18"),
    ("<think>\\boxed{3}</think>6", "6"),
    ("the answer is 14/3", r"\frac{14}{3}"),
    (r"\frac43", r"\frac{4}{3}"),
    (r"\boxed{-\dfrac{1}{2}}", "-0.5"),
    ("\u22125", "-5"),
    (r"\boxed{\frac95}", r"1\frac{4}{5}"),
    (r"\boxed{137.5}", r"137 \frac{1}{2}"),
    (r"\boxed{20\%}", "0.2"),
    ("20%", "20"),
    (r"\boxed{18 dollars}", "18"),
    (r"\boxed{18\text{ dollars}}", "18"),
    (r"\boxed{90}", r"90^\circ"),
    (r"\boxed{11111111100}", r"11,\! 111,\! 111,\! 100"),
    (r"\boxed{2.0107e-6}", "0.0000020107"),
    (r"\boxed{14053029.667}", "14053029.666666666"),
    (r"\boxed{42159089/3}", "14053029.666666666"),
    (r"\boxed{25}", "025"),
    (r"\boxed{25}", 25),
    (r"\boxed{52_{8}}", "52_8"),
    (r"\boxed{x = 5}", "5"),
    (r"\boxed{3 + 2}", "5"),
    (r"\boxed{-2, 1}", "1,-2"),
    (r"\boxed{y + 2x}", "2x+y"),
    ("The answer is $x^2+1$.", "1+x^2"),
    ("p-q", "p - q"),
    (r"\boxed{Even}", r"\text{even}"),
    ("The answer is east.", r"\text{east}"),
    ("The answer is B, since option A is too small", "B"),
    ("Option C is right", "C"),
    ("so I choose\n**D**", "D"),
    ("(C)", "C"),
    ("C", r"\text{(C)}"),
    (r"\boxed{\text{(C)}}", "C"),
    (r"\boxed{c}", "C"),
    (r"\boxed{C. 42 m}", "C"),
]
WRONG = [
    ("", "5"),
    ("no number here", "5"),
    (r"\boxed{}", "5"),
    (r"\boxed{3}, or rather \boxed{4", "3"),
    (r"\boxed{3}, or rather \boxed{4", "4"),
    ("####", "3"),
    ("the answer is 14/3", "3"),
    (r"\boxed{17, 18}", "18"),
    (r"\boxed{1 8}", "18"),
    (r"\boxed{1/0}", "1"),
    (r"\boxed{2k}", "2"),
    (r"\boxed{2 pi}", "2"),
    (r"\boxed{2.8}", r"1\frac{4}{5}"),
    (r"\boxed{18.001}", "18"),
    (r"\boxed{14053029.67}", "14053029.666666666"),
    (r"\boxed{2.0108e-6}", "0.0000020107"),
    (r"\boxed{\frac{1}{120000}}", "0.0000083099"),
    (r"\boxed{52_9}", "52_8"),
    (r"\boxed{evne}", r"\text{even}"),
    (r"\boxed{west}", r"\text{east}"),
    (r"\boxed{(1,-2)}", "(-2,1)"),
    (r"\boxed{x^2}", "x^3"),
    (r"\boxed{\frac{{}", "x"),
    ("The answer is a cat", "A"),
    (r"\boxed{B, C}", "B"),
    (r"\boxed{Carbon}", "C"),
    ("12", "C"),
    (r"\boxed{" + "1" * 600 + "}", "1" * 600),
]


@pytest.mark.parametrize(("completion", "reference"), CORRECT)
def test_correct(completion: str, reference: Any) -> None:
    assert accuracy(completion, reference) == 1.0


@pytest.mark.parametrize(("completion", "reference"), WRONG)
def test_wrong(completion: str, reference: Any) -> None:
    assert accuracy(completion, reference) == 0.0


def number_forms(value: int) -> list[str]:
    sign, size = ("-" if value < 0 else ""), abs(value)
    forms = [
        f"{value}",
        f"{value}.0",
        f"{value:,}",
        f"{value:,}.00",
        f"{sign}${size}",
        rf"{sign}\${size:,}",
        f"{value} dollars",
    ]
    return [*forms, rf"{sign}\frac{{{2 * size}}}{{2}}", f"{3 * value}/3", f" {value} ", f"{value}."]


@given(st.integers(-(10**15), 10**15))
def test_every_form_of_a_number_is_the_number(value: int) -> None:
    forms = number_forms(value)
    assert accuracy_reward([rf"\boxed{{{form}}}" for form in forms], [str(value)] * len(forms)) == [1.0] * len(forms)
    assert accuracy_reward([str(value)] * 4, forms[:4]) == [1.0] * 4


@given(st.integers(-(10**12), 10**12), st.integers(-(10**12), 10**12).filter(bool))
def test_no_form_of_another_number_is_the_number(value: int, step: int) -> None:
    forms = number_forms(value + step)
    assert accuracy_reward([rf"\boxed{{{form}}}" for form in forms], [str(value)] * len(forms)) == [0.0] * len(forms)


@given(
    st.text(alphabet=st.sampled_from("\\boxed{}#$%^_/.,-+ 0123456789xAB\n")), st.sampled_from(["7", "B", "1/2", "7.25"])
)
@settings(deadline=None)  # a text may take math-verify up to its limit
def test_any_text_scores_zero_or_one(text: str, reference: str) -> None:
    assert accuracy(text, reference) in (0.0, 1.0)


def test_plain_numbers_are_fast() -> None:
    accuracy("42", "42")
    start = time.perf_counter()
    assert sum(accuracy_reward(["42"] * 512, ["42"] * 512)) == 512
    assert time.perf_counter() - start < 0.25


@pytest.mark.parametrize(
    "text",
    [
        "1" * 50_000,
        "1," + "111," * 5000 + "1111",
        r"\boxed{" * 3000,
        "answer is " * 3000,
        "A" + " " * 30_000 + "x",
        r"\frac{1" * 5000,
    ],
    ids=["digits", "groups", "boxes", "statements", "spaces", "fractions"],
)
def test_degenerate_text_is_read_quickly(text: str) -> None:
    start = time.perf_counter()
    for reference in ("18", r"\text{even}", "C"):
        assert accuracy(text, reference) == 0.0
    assert time.perf_counter() - start < 2
