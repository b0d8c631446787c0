"""The protocol of the released scripts: runs, seeds, accuracies and lengths, against figures of their own functions."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from support.evaluations import ROWS, even, sampling

from latent_grpo import evaluate, pass_at_k
from latent_grpo.commands.main import main
from latent_grpo.data.benchmarks import BENCHMARKS, released_runs
from latent_grpo.evaluation.results import summarise

# Nine runs on five problems: which are correct, how long the responses are, and what the released functions make of
# it. The seeds are those of `make_run_seed` for the third benchmark of a list.
CORRECT = ["01011", "01011", "01101", "00011", "01011", "00011", "00011", "00111", "01011"]
RESPONSE_LENGTHS = [
    [12, 7, 11, 10, 8],
    [10, 7, 12, 4, 4],
    [11, 9, 5, 8, 5],
    [10, 9, 3, 4, 11],
    [12, 8, 8, 8, 12],
    [10, 12, 10, 4, 4],
    [7, 10, 4, 3, 7],
    [12, 10, 7, 9, 8],
    [3, 10, 8, 5, 12],
]
RELEASED_PASS_AT = {1: 0.533333, 4: 0.742857, 8: 0.8}
RELEASED_LENGTH, RELEASED_LENGTH_OF_FINISHED = 8.066666666666666, 7.383333333333334  # the limit is 12
RELEASED_SEEDS = [212346, 212347, 212348, 212349, 212350, 212351, 212352, 212353, 212354]


def records() -> list[dict]:
    """Return the records of the nine runs."""
    return [
        {
            "number": i,
            "prompt": "",
            "answer": "",
            "solved": sum(int(run[i]) for run in CORRECT),
            "responses": [
                {
                    "correct": run[i] == "1",
                    "response_length": lengths[i],
                    "reasoning_steps": lengths[i] - 2,
                    "ended": True,
                    "truncated": lengths[i] == 12,
                }
                for run, lengths in zip(CORRECT, RESPONSE_LENGTHS, strict=True)
            ],
        }
        for i in range(5)
    ]


def test_figures_are_those_of_the_released_functions():
    result = summarise(records(), list(RELEASED_PASS_AT), 9, RELEASED_SEEDS, None)
    for k, expected in RELEASED_PASS_AT.items():
        assert result[f"pass@{k}"] == pytest.approx(expected, abs=5e-7)
    assert result["response_length"] == pytest.approx(RELEASED_LENGTH, rel=1e-12)
    assert [run["seed"] for run in result["runs"]] == RELEASED_SEEDS
    assert sum(run["accuracy"] for run in result["runs"]) / 9 == pytest.approx(result["pass@1"])
    assert [run["response_length"] for run in result["runs"]] == [sum(lengths) / 5 for lengths in RESPONSE_LENGTHS]
    finished = summarise(records(), [1], 9, RELEASED_SEEDS, 12)
    assert finished["response_length"] == pytest.approx(RELEASED_LENGTH_OF_FINISHED, rel=1e-12)
    assert finished["reasoning_steps"] == pytest.approx(RELEASED_LENGTH_OF_FINISHED - 2, rel=1e-12)
    assert finished["truncation_rate"] == result["truncation_rate"] == pytest.approx(7 / 45)
    for name in ("pass@4", "response_length"):
        low, high = result["intervals"][name]
        assert low < result[name] < high


RUNS = {
    "gsm8k-aug": (5, 12346, 128, "finished"),
    "gsm-hard": (5, 112346, 128, "finished"),
    "svamp": (5, 212346, 128, "finished"),
    "multiarith": (5, 312346, 128, "finished"),
    "math-500": (4, 12346, 4096, "all"),
    "aime24": (64, 112346, 4096, "all"),
    "aime25": (64, 212346, 4096, "all"),
    "gpqa-diamond": (8, 312346, 4096, "all"),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_runs_and_seeds_of_the_released_scripts(name):
    runs, first, limit, length_of = RUNS[name]
    released = released_runs(name)
    assert released is not None
    assert released.seeds(12345) == list(range(first, first + runs))
    assert (released.limit, released.length_of) == (limit, length_of)
    assert released_runs("mine.jsonl") is None


def test_a_run_is_the_same_beside_other_runs(model, tokenizer):
    options = sampling(tokenizer, noise="none")

    def responses(*seeds, **more):
        result = evaluate(model, tokenizer, ROWS, options, run_seeds=seeds, reward=even, **more)
        assert result["num_samples"] == len(seeds)
        return [record["responses"] for record in result["samples"]]

    together = responses(7, 8, 2**31 - 1)
    assert [[of_one[1]] for of_one in together] == responses(8, batch_size=3)
    assert any(of_one[0]["response"] != of_one[1]["response"] for of_one in together)
    for of_one in together:  # without noise, only the text differs
        assert len({response["reasoning_steps"] for response in of_one}) == 1


def test_results_of_runs_are_means_of_their_responses(model, tokenizer):
    options = replace(sampling(tokenizer), max_new_tokens=5)  # which some responses reach
    result = evaluate(
        model, tokenizer, ROWS, options, run_seeds=range(6), pass_at=(1, 4), reward=even, length_of="finished"
    )
    assert "pass_at_1" not in result
    responses = [record["responses"] for record in result["samples"]]
    solved = [sum(response["correct"] for response in of_one) for of_one in responses]
    assert solved == [record["solved"] for record in result["samples"]]
    assert result["pass@1"] == pytest.approx(sum(solved) / 60)
    assert result["pass@4"] == pytest.approx(sum(pass_at_k(6, count, 4) for count in solved) / 10)
    by_run = [[of_one[run]["response_length"] for of_one in responses] for run in range(6)]
    finished = [[length for length in lengths if length < 5] for lengths in by_run]
    assert any(0 < len(lengths) < 10 for lengths in finished)
    means = [sum(lengths) / len(lengths) for lengths in finished if lengths]
    assert result["response_length"] == pytest.approx(sum(means) / len(means))


def test_greedy_lengths_of_finished_responses(model, tokenizer):
    options = replace(sampling(tokenizer), max_new_tokens=5)
    every = evaluate(model, tokenizer, ROWS, options, reward=even)
    finished = evaluate(model, tokenizer, ROWS, options, reward=even, length_of="finished")
    lengths = [record["response_length"] for record in every["samples"]]
    kept = [length for length in lengths if length < 5]
    assert 0 < len(kept) < 10
    assert every["response_length"] == pytest.approx(sum(lengths) / 10)
    assert finished["response_length"] == pytest.approx(sum(kept) / len(kept))
    assert finished["samples"] == every["samples"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(run_seeds=[1, 2], num_samples=2), "num_samples is 2; leave it out"),
        (dict(run_seeds=[1, 2**31]), f"run_seeds holds {2**31}"),
        (dict(run_seeds=[1, 2], pass_at=(4,)), "pass@4 needs at least 4"),
    ],
)
def test_runs_that_cannot_be(options, match, model, tokenizer):
    with pytest.raises(ValueError, match=match):
        evaluate(model, tokenizer, ROWS, sampling(tokenizer), **options)


def arguments(folder, *more: str) -> list[str]:
    data = str(folder / "data.jsonl")
    given = ["eval", "--model", str(folder / "model"), "--limit", "4", "--latent_top_k", "2"]
    return [*given, "--data", f"svamp={data}", f"aime24={data}", "--protocol", "released", *more]


def test_the_released_protocol_on_the_command_line(folder, tmp_path, capsys):
    out = tmp_path / "released"
    assert main(arguments(folder, "--runs", "4", "--max_completion_length", "6", "--out", str(out))) == 0
    assert "Protocol of the released scripts" in " ".join(capsys.readouterr().out.split())
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["protocol"] == "released"
    expected = dict(noise="none", end_rule="noisy", temperature=0.6, top_p=0.95, top_k=0, seed=12345)
    assert {name: record["sampling"][name] for name in expected} == expected
    settings = record["settings"]
    assert settings["svamp"]["run_seeds"] == [212346, 212347, 212348, 212349]
    assert settings["aime24"]["run_seeds"] == [112346, 112347, 112348, 112349]
    assert (settings["svamp"]["length_of"], settings["aime24"]["length_of"]) == ("finished", "all")
    # The model was saved with the format of its training. Only the suffix of GPQA would be added to it.
    assert settings["svamp"]["prompt_format"]["instruction"] == ""
    for result in record["results"].values():
        assert set(result["intervals"]) >= {"pass@1", "pass@4"}
        assert "pass@8" not in result
        assert len(result["runs"]) == len(result["samples"][0]["responses"]) == 4
    page = out.with_suffix(".md").read_text()
    assert "| svamp | 6 | finished | 4 | 212346 to 212349 |" in page
    assert "![pass@k over k](released.svg)" in page


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--runs", "0"], "runs is 0: give 1 or more"),
        (["--num_samples", "4"], "num_samples is 4: give --runs"),
        (["--pass-at", "1,8"], "pass-at is 8: svamp has 5 runs"),
        (["--noise_scale", "0.5", "1"], "several need latent steps and --noise"),
        (["--noise_scale", "-1"], "noise_scale is -1.0: give 0 or more"),
        (["--data", "{data}"], "is no benchmark of the released scripts; give a number"),
        (["--protocol", "greedy", "--runs", "2"], "runs is 2: it needs --protocol released"),
        (["--protocol", "greedy", "--noise_scale", "0.5", "1"], "several need samples"),
        (["--protocol", "greedy", "--noise_scale", "0.5", "1", "--mode", "text"], "several need latent steps"),
    ],
)
def test_mistakes_are_one_line(more, match, folder, capsys):
    given = [word.format(data=folder / "data.jsonl") for word in more]
    assert main(arguments(folder, *given)) == 2
    error = capsys.readouterr().err
    assert match in error
    assert len([line for line in error.splitlines() if line.startswith("latent-grpo")]) == 1
