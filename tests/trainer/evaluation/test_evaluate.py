"""Evaluation: estimators and intervals against known values, and the same responses in every batch and on any rank."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import PYTHONPATH
from support.chat_tokenizers import word_tokenizer
from support.evaluations import ROWS, even, sampling
from support.trainers import rollout_of

from latent_grpo import LatentSampling, evaluate, pass_at_k
from latent_grpo.commands.main import main
from latent_grpo.errors import RewardError
from latent_grpo.evaluation.judge import Judge, tokens_before
from latent_grpo.evaluation.statistics import bootstrap_interval
from latent_grpo.model import end_marker_ids
from latent_grpo.prompts import PromptFormat
from latent_grpo.rollout.trajectory import Rollout
from latent_grpo.saving.atomic_files import write_json


def always(completions, **kwargs):
    return [1.0] * len(completions)


@given(st.integers(1, 9), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(samples, data):
    correct, k = data.draw(st.integers(0, samples)), data.draw(st.integers(1, samples))
    subsets = list(itertools.combinations([True] * correct + [False] * (samples - correct), k))
    assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), rel=1e-15, abs=0)


@given(st.integers(1, 9), st.integers(1, 4))
def test_pass_at_k_is_unbiased(numerator, k):
    """The mean of pass@k over all outcomes of six draws is the probability of a success in k draws."""
    p = numerator / 10
    mean = sum(
        p ** sum(outcome) * (1 - p) ** (6 - sum(outcome)) * pass_at_k(6, sum(outcome), k)
        for outcome in itertools.product((0, 1), repeat=6)
    )
    assert mean == pytest.approx(1 - (1 - p) ** k, rel=1e-12)


def test_pass_at_k_keeps_its_digits_for_many_samples():
    assert pass_at_k(10**6, 1, 1) == 1e-6  # in floats, 1 - C(n-1, 1) / n is wrong in the eleventh digit
    assert pass_at_k(4096, 4096, 1024) == 1.0
    assert pass_at_k(4096, 0, 1024) == 0.0


@pytest.mark.parametrize(("samples", "correct", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_refuses_impossible_counts(samples, correct, k):
    with pytest.raises(ValueError, match=r"pass@|cannot be right"):
        pass_at_k(samples, correct, k)


def test_bootstrap_intervals_cover_the_mean_as_often_as_they_say():
    generator = np.random.default_rng(0)
    covered, widths, trials, problems, p = 0, [], 300, 150, 0.7
    for trial in range(trials):
        low, high = bootstrap_interval((generator.random(problems) < p).astype(float), resamples=400, seed=trial)
        covered += low <= p <= high
        widths.append(high - low)
    # 95% of 300 is 285. Three standard deviations of this count are 11. Percentile intervals are a little too short.
    assert 270 <= covered <= 297
    normal = 2 * 1.96 * (p * (1 - p) / problems) ** 0.5
    assert np.mean(widths) == pytest.approx(normal, rel=0.05)


def test_bootstrap_intervals_repeat_and_know_their_confidence():
    values = [0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    narrow, wide = bootstrap_interval(values, confidence=0.5), bootstrap_interval(values, confidence=0.99)
    assert wide[0] < narrow[0] < np.mean(values) < narrow[1] < wide[1]
    assert bootstrap_interval([1.0] * 5) == [1.0, 1.0]


def text_rollout(tokens: list[list[int]], lengths: list[int]) -> Rollout:
    token = torch.tensor(tokens)
    mask = torch.arange(token.shape[1]) < torch.tensor(lengths).unsqueeze(-1)
    empty = torch.zeros(len(token), 1)
    return Rollout(
        prompt_ids=empty,
        prompt_mask=empty,
        prompt_index=empty,
        token=token,
        ids=empty,
        scores=empty,
        is_latent=torch.zeros_like(mask),
        mask=mask,
        logprob=empty,
        finished=mask.all(-1),
        tau=1.0,
    )


def test_reasoning_steps_of_a_text_stop_at_the_whole_marker():
    rollout = text_rollout(
        [[5, 8, 9, 7, 8, 9], [8, 5, 9, 6, 6, 0], [5, 5, 8, 9, 0, 0], [8, 9, 1, 1, 1, 1]], [6, 5, 3, 6]
    )
    assert tokens_before(rollout, [8, 9]).tolist() == [1, 5, 3, 0]  # a cut marker does not count
    assert tokens_before(rollout, [9]).tolist() == [2, 2, 3, 1]
    assert tokens_before(rollout, []).tolist() == [6, 5, 3, 6]
    assert tokens_before(rollout, [1] * 7).tolist() == [6, 5, 3, 6]


def test_evaluation_counts_every_problem_once(model, tokenizer):
    result = evaluate(model, tokenizer, ROWS, sampling(tokenizer), pass_at=(1, 2), batch_size=4, reward=always)
    assert result["problems"] == len(result["samples"]) == 10
    assert [record["prompt"] for record in result["samples"]] == [row["prompt"] for row in ROWS]
    assert result["pass_at_1"] == result["pass@1"] == result["pass@2"] == 1.0
    assert result["intervals"]["pass@2"] == [1.0, 1.0]
    assert {record["solved"] for record in result["samples"]} == {result["num_samples"]} == {2}
    for name, key in (("truncation_rate", "truncated"), ("end_marker_rate", "ended")):
        assert result[name] == sum(record[key] for record in result["samples"]) / 10
    assert 0 < result["response_length"] <= 6


def test_a_reward_gets_every_column_and_may_not_apply(model, tokenizer):
    rows = [{**ROWS[0], "level": 3}, ROWS[1]]

    def of_level(completions, level, answer):
        assert all(isinstance(text, str) for text in completions)
        assert set(answer) <= {row["answer"] for row in rows}
        return [None if value is None else 1.0 for value in level]

    result = evaluate(model, tokenizer, rows, sampling(tokenizer), reward=of_level)
    assert [(record["reward"], record["correct"]) for record in result["samples"]] == [(1.0, True), (None, False)]
    with pytest.raises(RewardError, match=r"of_one.*has no level"):
        evaluate(model, tokenizer, rows, sampling(tokenizer), reward=of_one)


def of_one(completions, **columns):
    raise ValueError("it has no level")


def test_results_are_the_means_of_the_records(model, tokenizer):
    result = evaluate(model, tokenizer, ROWS, sampling(tokenizer), pass_at=(1, 3), num_samples=5, reward=even)
    solved = [record["solved"] for record in result["samples"]]
    assert len(set(solved)) > 1
    assert result["pass@1"] == pytest.approx(sum(solved) / 50)
    assert result["pass@3"] == pytest.approx(sum(pass_at_k(5, c, 3) for c in solved) / 10)
    for name in ("pass_at_1", "pass@1", "pass@3", "reasoning_steps"):
        low, high = result["intervals"][name]
        assert low <= result[name] <= high


def test_samples_are_drawn_only_on_request(model, tokenizer):
    assert "pass@1" not in evaluate(model, tokenizer, ROWS[:2], sampling(tokenizer), reward=even)
    assert "pass@1" in evaluate(model, tokenizer, ROWS[:2], sampling(tokenizer), reward=even, num_samples=1)
    with pytest.raises(ValueError, match="pass@4 needs at least 4"):
        evaluate(model, tokenizer, ROWS[:2], sampling(tokenizer), reward=even, pass_at=(4,), num_samples=2)


def test_samples_depend_neither_on_the_batch_nor_on_their_number(model, tokenizer, monkeypatch):
    one = evaluate(model, tokenizer, ROWS, sampling(tokenizer), num_samples=3, batch_size=64, reward=even)
    other = evaluate(model, tokenizer, ROWS, sampling(tokenizer), num_samples=3, batch_size=3, reward=even)
    assert one == other
    reseeded = evaluate(model, tokenizer, ROWS, sampling(tokenizer, seed=1), num_samples=3, reward=even)
    assert [r["solved"] for r in reseeded["samples"]] != [r["solved"] for r in one["samples"]]
    texts: dict[int, list[list[str]]] = {}
    for tries in (2, 4):

        def keep(completions, tries=tries, **kwargs):
            if len(completions) > len(ROWS):  # not the noise-free responses
                texts[tries] = [completions[i : i + tries] for i in range(0, len(completions), tries)]
            return even(completions)

        evaluate(model, tokenizer, ROWS, sampling(tokenizer), num_samples=tries, reward=keep)
    assert [row[:2] for row in texts[4]] == texts[2]
    assert any(row[0] != row[1] for row in texts[2])


def test_text_mode_counts_the_tokens_before_the_marker(model, tokenizer):
    options = replace(sampling(tokenizer), latent=False, end_token_id=None)
    result = evaluate(model, tokenizer, ROWS, options, reward=even)
    assert 0 < result["reasoning_steps"] < result["response_length"]
    assert 0 < result["end_marker_rate"] <= 1
    for record in result["samples"]:
        assert record["ended"] == (record["reasoning_steps"] < record["response_length"])


@pytest.mark.parametrize(("text", "before"), [("ab</think>\nc", 2), ("</think>\n", 0), ("abc</thin", None)], ids=repr)
def test_text_mode_finds_a_marker_whose_last_token_holds_more(text, before):
    words = word_tokenizer("bytes", words=("</", "think", ">\n"))
    judge = Judge(None, words, LatentSampling(latent=False), PromptFormat(), even, 0, (), 1, ())
    ids = words(text, add_special_tokens=False)["input_ids"]
    assert end_marker_ids(words, "</think>") != ids[2:5]
    rollout = replace(rollout_of([len(ids)], [0]), token=torch.tensor([ids]))
    assert judge.reasoning_tokens(rollout).tolist() == [len(ids) if before is None else before]


TWO_PROCESSES = """
import json, sys
from pathlib import Path
from latent_grpo.commands.main import main
from latent_grpo.parallel.process_group import process_group, rank
from latent_grpo import evaluate
from latent_grpo.model import load_model
from latent_grpo.quickstart.toy_task import make_problems, make_tokenizer
from support.evaluations import ROWS, even, sampling

folder = Path({folder!r})
with process_group():
    code = main([*json.loads(sys.argv[1]), "--batch_size", "3", "--out", str(folder / "two.json")])
    tokenizer, model = make_tokenizer(), load_model(str(folder / "model"))
    rows = make_problems(10, seed=1)
    result = evaluate(model, tokenizer, rows, sampling(tokenizer), pass_at=(1, 3), reward=even)
    (folder / f"rank-{{rank()}}.json").write_text(json.dumps(result))
sys.exit(code)
"""


def test_two_processes_give_the_results_of_one(folder, model, tokenizer, capfd):
    arguments = ["eval", "--model", str(folder / "model"), "--data", f"gsm8k={folder / 'data.jsonl'}", "--limit", "7"]
    arguments += ["--latent_top_k", "2", "--max_completion_length", "6", "--pass-at", "1,2"]
    assert main([*arguments, "--out", str(folder / "one.json")]) == 0
    capfd.readouterr()
    script = folder / "two.py"
    script.write_text(TWO_PROCESSES.format(folder=str(folder)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(script), json.dumps(arguments)]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Evaluation") == 1  # only rank 0 reports
    one, two = (json.loads((folder / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["results"] == two["results"]
    assert len(one["results"]["gsm8k-aug"]["samples"]) == 7
    whole = json.loads(json.dumps(evaluate(model, tokenizer, ROWS, sampling(tokenizer), pass_at=(1, 3), reward=even)))
    assert json.loads((folder / "rank-0.json").read_text()) == whole
    assert json.loads((folder / "rank-1.json").read_text()) == whole
    assert len({record["solved"] for record in whole["samples"]}) > 1


def test_files_are_written_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "new" / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "new" / "a.json", {"x": object()})
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"x": 1}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]
