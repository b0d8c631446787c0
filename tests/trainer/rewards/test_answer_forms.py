"""The forms of answers: each line of answer_forms.jsonl has a reference, right completions and wrong ones alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import SHARED

from latent_grpo.rewards.functions import accuracy_reward

FORMS = [json.loads(line) for line in Path(__file__).with_name("answer_forms.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("form", FORMS, ids=[form["reference"] for form in FORMS])
def test_right_and_wrong_completions(form: dict) -> None:
    texts = form["right"] + form["wrong"]
    rewards = accuracy_reward(texts, [form["reference"]] * len(texts))
    expected = [1.0] * len(form["right"]) + [0.0] * len(form["wrong"])
    assert [text for text, reward, true in zip(texts, rewards, expected, strict=True) if reward != true] == []


def test_the_forms_that_were_reported() -> None:
    path = SHARED / "cases" / "reward_forms.jsonl"
    if not path.exists():
        pytest.skip("the reported forms are not beside the repository")
    for line in path.read_text("utf-8").splitlines():
        case = json.loads(line)
        assert accuracy_reward([case["completion"]], [case["reference"]]) == [case["reward"]], case


@pytest.mark.parametrize(
    "text",
    [r"\(" * 8000, "$ " * 8000, "**" * 8000, "1 " * 8000, r"\frac{" * 3000, "1\u20132 " * 4000, "answer is **" * 1500],
    ids=["formulas", "dollars", "bold", "ones", "fractions", "ranges", "statements"],
)
def test_degenerate_text_is_no_answer(text: str) -> None:
    references = ["18", r"12\pi", "B", "3:30", r"1, 2, \ldots, n"]
    assert accuracy_reward([text] * len(references), references) == [0.0] * len(references)


@pytest.mark.parametrize("digits", [400, 3000, 6000])
def test_long_numbers_are_no_error(digits: int) -> None:
    number = "7" * digits
    short = float(digits < 500)
    assert accuracy_reward([rf"\boxed{{{number}}}", rf"\boxed{{{number}8}}"], [number] * 2) == [short, 0.0]
