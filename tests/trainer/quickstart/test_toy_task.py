"""The toy task: its problems, its worked examples, its tokenizer and its model."""

from __future__ import annotations

import pytest
import torch
from support.trainers import ROWS
from transformers import AutoModelForCausalLM, AutoTokenizer

from latent_grpo.quickstart.toy_task import FORGOTTEN, ToyTask, make_model, make_problems, worked_examples


def test_held_out_problems_are_disjoint_and_answers_are_the_last_total():
    rows = make_problems(300, seed=5)
    assert len({row["prompt"] for row in rows}) == 300
    other = make_problems(100, seed=6, exclude={row["prompt"] for row in rows})
    assert not {row["prompt"] for row in rows} & {row["prompt"] for row in other}
    for row in rows:
        assert row["chain"].split()[-1] == row["answer"]
        assert len(row["chain"].split()) % 2 == 0


def test_careless_examples_forget_only_the_last_change():
    problems = make_problems(2000, seed=0)
    examples = worked_examples(problems, seed=1)
    assert examples == worked_examples(problems, seed=1)
    forgotten = 0
    for true, worked in zip(problems, examples, strict=True):
        assert worked["prompt"] == true["prompt"]
        if worked != true:
            forgotten += 1
            *before, last = true["chain"].split()
            assert worked["chain"].split() == [*before, before[-1]]
            assert worked["answer"] == before[-1] != last
    assert abs(forgotten / 2000 - FORGOTTEN) < 0.05  # four standard deviations of the share


def test_a_toy_task_whose_totals_cannot_hold_its_numbers_is_refused():
    with pytest.raises(ValueError, match="max_total"):
        ToyTask(max_operand=9, max_total=10)


def test_tokenizer_and_model_are_the_same_after_saving_and_loading(tokenizer, tmp_path):
    model = make_model(tokenizer, seed=0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded_tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = ROWS[0]["prompt"] + " </think> 12"
    assert loaded_tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
