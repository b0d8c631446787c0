r"""What counts as a correct answer, over every row of the real data sets and over the ways of writing one."""

from __future__ import annotations

import json
import re
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import SHARED

from latent_grpo.data.rows import load_rows
from latent_grpo.rewards import math_verify_process
from latent_grpo.rewards.functions import accuracy_reward, exact_match_reward, soft_overlong_reward
from latent_grpo.rewards.scoring import RewardError, resolve_reward, score

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
    """The answer with its first number moved by ``step``; None where it holds no number."""
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


def test_conversational_completions() -> None:
    chat: list[Any] = [[{"role": "assistant", "content": r"\boxed{4}"}], [{"role": "assistant", "content": None}], []]
    assert accuracy_reward(chat, ["4"] * 3) == [1.0, 0.0, 0.0]


def test_exact_match() -> None:
    completions: list[Any] = [
        " 42\n",
        "<think>x</think> 42",
        "42.0",
        r"\boxed{42}",
        [{"role": "assistant", "content": "42"}],
    ]
    assert exact_match_reward(completions, ["42"] * 5, prompts=["p"] * 5) == [1.0, 1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("function", [accuracy_reward, exact_match_reward])
def test_references_are_checked(function: Any) -> None:
    for empty in (None, " "):
        with pytest.raises(ValueError, match="reference answer is empty"):
            function(completions=["1"], answer=[empty])
    with pytest.raises(ValueError, match=r"shorter|longer"):
        function(completions=["1", "2"], answer=["1"])


def test_plain_numbers_are_fast() -> None:
    accuracy("42", "42")
    start = time.perf_counter()
    assert sum(accuracy_reward(["42"] * 512, ["42"] * 512)) == 512
    assert time.perf_counter() - start < 0.25


def test_a_thread_compares_like_the_main_thread() -> None:
    rewards: list[float] = []
    thread = threading.Thread(target=lambda: rewards.append(accuracy(r"\boxed{(x+1)(x+2)}", "x^2+3x+2")))
    thread.start()
    thread.join()
    assert rewards == [1.0]


@pytest.mark.parametrize("where", ["main", "thread"])
def test_an_endless_comparison_is_cut_off(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracy(r"\boxed{x+2}", "2+x")  # starts math-verify, which is not part of the limit
    monkeypatch.setattr(math_verify_process, "COMPARISON_SECONDS", 0.5)
    rewards: list[float] = []
    completion = rf"\boxed{{((x+y+z)^{{99}}+{len(where)})^{{99}}}}"
    thread = threading.Thread(target=lambda: rewards.append(accuracy(completion, "x^2+18")))
    start = time.perf_counter()
    if where == "main":
        thread.run()
    else:
        thread.start()
        thread.join()
    assert rewards == [0.0]
    assert time.perf_counter() - start < 5
    monkeypatch.undo()
    assert accuracy(rf"\boxed{{x+{3 + len(where)}}}", f"{3 + len(where)}+x") == 1.0  # a new process has taken over


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


def test_resolve_reward(tmp_path: Path) -> None:
    assert resolve_reward("accuracy") is accuracy_reward
    assert resolve_reward(exact_match_reward) is exact_match_reward
    assert resolve_reward("latent_grpo.rewards.functions:exact_match_reward") is exact_match_reward
    path = tmp_path / "mine.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n"
        "@dataclass\nclass Scale:\n    by: float = 3.0\n\n"
        "def tripled(completions, **kwargs):\n    return [Scale().by * len(each) for each in completions]\n",
        encoding="utf-8",
    )
    assert resolve_reward(f"{path}:tripled")(completions=["ab"]) == [6.0]


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("acuracy", "accuracy, exact_match"),
        ("", "accuracy, exact_match"),
        (":f", "accuracy, exact_match"),
        (3, "accuracy, exact_match"),
        ("no_such_module:f", "cannot load 'no_such_module'"),
        ("none.py:f", "no such file"),
        ("math:no_such_function", "has no function 'no_such_function'"),
        ("math:pi", "has no function 'pi'"),
    ],
)
def test_unknown_reward_is_named(spec: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        resolve_reward(spec)
    assert repr(spec) in str(caught.value)


def test_broken_reward_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("raise KeyError('inside')", encoding="utf-8")
    with pytest.raises(ValueError, match="KeyError: 'inside'"):
        resolve_reward(f"{path}:f")


def test_score_weighs_the_functions() -> None:
    def length(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        assert columns["completion_ids"] == [[1], [2, 3]]
        return [None, 2]

    def as_tensor(completions: list[str], **columns: Any) -> Any:
        return torch.tensor([True, False])

    columns = {"answer": ["4", "5"], "completion_ids": [[1], [2, 3]]}
    scores = score([accuracy_reward, length, as_tensor], [1.0, 0.25, -1.0], ["a", "b"], ["4", "5"], columns)
    assert scores.per_function == [[1.0, 1.0], [0.0, 2.0], [1.0, 0.0]]
    assert scores.total == [0.0, 1.5]
    assert score([length], None, ["a", "b"], ["4", "5"], columns).total == [0.0, 2.0]
    assert score([], None, [], [], {}).total == []


def raises_on_bad(completions: list[str], tag: list[int], **columns: Any) -> list[float]:
    if "bad" in completions:
        raise KeyError("inner")
    return [float(len(str(each))) for each in tag]


FAILING: dict[str, tuple[Any, int, list[str]]] = {
    "raises": (raises_on_bad, 2, ["'raises_on_bad'", "KeyError", "inner"]),
    "partial raises": (partial(raises_on_bad), 2, ["'partial'", "KeyError"]),
    "nan": (lambda **columns: [0.0, float("nan"), 0.0], 1, ["nan", "not a finite number"]),
    "infinite": (lambda **columns: [0.0, 0.0, float("inf")], 2, ["inf", "not a finite number"]),
    "not a number": (lambda **columns: [0.0, "1", 0.0], 1, ["'1'", "not a finite number"]),
    "too few": (lambda **columns: [0.0, 0.0], 2, ["2 rewards for 3 completions"]),
    "too many": (lambda **columns: [0.0] * 4, 2, ["4 rewards for 3 completions"]),
    "no list": (lambda **columns: None, 0, ["NoneType"]),
    "missing column": (accuracy_reward, 0, ["'accuracy_reward'", "answer"]),
}


@pytest.mark.parametrize(("function", "index", "parts"), FAILING.values(), ids=FAILING)
def test_failing_reward_is_named(function: Any, index: int, parts: list[str]) -> None:
    prompts = ["first prompt", "second prompt", "third " + "prompt " * 50]
    completions = ["good", "fine", "bad"]
    with pytest.raises(RewardError) as caught:
        score([function], None, prompts, completions, {"tag": [1, 2, 3]})
    message = str(caught.value)
    for part in [f"sample {index}", prompts[index][:12], repr(completions[index]), *parts]:
        assert part in message
    assert len(message) < 400


def test_failure_of_the_whole_batch_names_its_first_sample() -> None:
    def batch_only(completions: list[str], **columns: Any) -> list[float]:
        if len(completions) > 1:
            raise MemoryError("too many")
        return [0.0]

    with pytest.raises(RewardError, match="'batch_only' raised MemoryError: too many on sample 0"):
        score([batch_only], None, ["p", "q"], ["c", "d"], {})


def test_score_checks_its_lengths() -> None:
    with pytest.raises(ValueError, match="2 reward weights for 1 reward functions"):
        score([accuracy_reward], [1.0, 2.0], ["p"], ["c"], {"answer": ["1"]})
    with pytest.raises(ValueError, match="1 prompts for 2 completions"):
        score([accuracy_reward], None, ["p"], ["c", "d"], {"answer": ["1"]})


def test_soft_overlong_follows_the_formula_of_dapo() -> None:
    limit, cache = 20, 8
    lengths = [0, 1, 12, 13, 16, 19, 20, 25]
    # Eq. 13: 0 up to limit - cache, then (limit - cache - length) / cache, and -1 beyond the limit.
    expected = [0.0, 0.0, 0.0, -1 / 8, -4 / 8, -7 / 8, -1.0, -1.0]
    ids = [[7] * length for length in lengths]
    assert soft_overlong_reward(ids, limit, cache, prompts=None) == expected
    assert soft_overlong_reward(ids, limit) == soft_overlong_reward(ids, limit, 4)
    assert soft_overlong_reward([[1, 2]], 2) == [-1.0]
