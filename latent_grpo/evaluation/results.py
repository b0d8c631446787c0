"""The evaluation of a model on problems with known answers.

The problems are split across the ranks of torch.distributed if it is initialised. Each sample of each problem has its
own noise stream, so the responses depend neither on the ranks nor on the batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from latent_grpo.config import LatentSampling
from latent_grpo.evaluation.judge import RUN_SEEDS, Judge
from latent_grpo.evaluation.statistics import bootstrap_interval, mean, pass_at_k
from latent_grpo.model import check_vocabulary
from latent_grpo.parallel.process_group import all_gather, rank, world_size
from latent_grpo.prompts import PromptFormat
from latent_grpo.rewards.columns import check_columns, reward_columns
from latent_grpo.rewards.functions import accuracy_reward
from latent_grpo.watching.metrics import progress_bar

WAITING = 16  # responses of runs per place in the batch: so many that finished ones are replaced, few enough to hold
LENGTHS = ("reasoning_steps", "response_length")
# Results that are means over responses, and the entry of a response that each is the mean of.
MEANS = {
    "reasoning_steps": "reasoning_steps",
    "response_length": "response_length",
    "end_marker_rate": "ended",
    "truncation_rate": "truncated",
}


def evaluate(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Any],
    sampling: LatentSampling,
    *,
    pass_at: Sequence[int] = (1,),
    num_samples: int | None = None,
    run_seeds: Sequence[int] = (),
    length_of: Literal["all", "finished"] = "all",
    batch_size: int = 64,
    prompt_format: PromptFormat | None = None,
    reward: Callable[..., Any] = accuracy_reward,
    label: str = "Evaluation",
    show_progress: bool = False,
) -> dict[str, Any]:
    """Score the responses of a model to N problems. Collective: every rank must call it, and gets the same result.

    Every problem gets one noise-free, greedy response, and `num_samples` responses under noise. With `run_seeds` it
    gets one response per run instead, sampled as `sampling` says: so the released scripts evaluate.

    Args:
        model, tokenizer: a causal LM and its tokenizer, as `generate_latent` and `encode_prompts` take them.
        rows: N problems with the keys `prompt` (a string or chat messages) and `answer` (if the reward needs one).
        sampling: noise and temperature of the samples, and the seed of their streams (runs have seeds of their own).
        pass_at: the k of pass@k.
        num_samples: samples per problem. The default is max(pass_at), or none if that is 1. Not with `run_seeds`.
        run_seeds: the seed of each run, in [0, 2^31). The responses of a run do not depend on the other runs.
        length_of: whose lengths are averaged: those of "all" responses, or of the "finished" ones, which are shorter
            than the limit `sampling.max_new_tokens` (the released evaluation of the low-difficulty benchmarks).
        batch_size: responses that are decoded at a time.
        prompt_format: how prompts are put to the model, with the end marker. Default: `PromptFormat()`.
        reward: a reward function as in training. Its `completions` are the visible texts. It gets every column of
            `rows` that it names, with None where a row lacks it. A response with a reward above 0.5 is correct.
        label, show_progress: the name of the progress bar, and whether rank 0 draws it.

    Returns:
        pass_at_1: the share of problems that the noise-free response solves. Not with `run_seeds`.
        pass@k: for every k, if there are samples, the unbiased estimate from them. pass@1 is their mean accuracy.
        reasoning_steps: steps before the end marker, the mean of the noise-free responses (of runs: over their means).
        response_length: likewise all steps, latent and text (what the paper's tables call reasoning tokens).
        end_marker_rate, truncation_rate: shares of the same responses.
        num_samples, problems: samples per problem, and N.
        intervals: for every mean above, its 95% bootstrap interval [low, high] over problems.
        runs: with `run_seeds`, the seed, the accuracy and the means of each run. A mean over no response is NaN.
        samples: N records in the order of `rows`, with prompt, answer, `solved` (the number of correct samples), and of
            the noise-free response: response, reward, correct, reasoning_steps, response_length, ended, truncated. With
            `run_seeds`, `responses` is a list of such entries, one per run.

    Raises:
        ValueError: a k of `pass_at` exceeds the samples, `num_samples` is given beside `run_seeds`, a seed is out of
            range, or latent sampling has no `end_token_id`.
        RewardError: the reward raised, or did not return one number per response.
    """
    tries, prompt_format = _count_samples(pass_at, num_samples, run_seeds), prompt_format or PromptFormat()
    check_vocabulary(model, tokenizer, prompt_format, sampling.latent, rows)
    check_columns([reward], rows, names := reward_columns(rows))
    judge = Judge(model, tokenizer, sampling, prompt_format, reward, tries, run_seeds, batch_size, names)
    records = _records(judge, rows, label, show_progress)
    return summarise(records, pass_at, tries, run_seeds, sampling.max_new_tokens if length_of == "finished" else None)


def _records(judge: Judge, rows: Sequence[Any], label: str, show_progress: bool) -> list[dict[str, Any]]:
    """Return the records of all problems, in their order. Collective: each rank judges its share."""
    local, size = range(rank(), len(rows), world_size()), judge.max_rows
    if judge.run_seeds:  # few problems with many responses each, or many with few
        size = max(1, WAITING * size // len(judge.run_seeds))
    batches = [local[i : i + size] for i in range(0, len(local), size)]
    records: list[dict[str, Any]] = []
    with progress_bar(label, len(batches), shown=show_progress) as bar:
        for numbers in batches:
            records += judge.records([rows[i] for i in numbers], numbers)
            bar.advance(f"Pass@1 {mean(_column(records, 'correct')):.3f}")
    return sorted(all_gather(records), key=lambda record: int(record["number"]))


def _count_samples(pass_at: Sequence[int], num_samples: int | None, run_seeds: Sequence[int]) -> int:
    """Return the number of samples per problem. Raise ValueError if the arguments do not go together."""
    if run_seeds and num_samples is not None:
        raise ValueError(f"num_samples is {num_samples}; leave it out, because run_seeds gives one sample per run")
    if wrong := [seed for seed in run_seeds if not 0 <= seed < RUN_SEEDS]:
        raise ValueError(f"run_seeds holds {wrong[0]}; give seeds from 0 to {RUN_SEEDS - 1}")
    tries = len(run_seeds) if run_seeds else num_samples
    if tries is None:
        tries = max(pass_at) if max(pass_at) > 1 else 0
    if tries and max(pass_at) > tries:
        raise ValueError(f"pass@{max(pass_at)} needs at least {max(pass_at)} samples, got {tries}")
    return tries


def summarise(
    records: list[dict[str, Any]], pass_at: Sequence[int], tries: int, run_seeds: Sequence[int], limit: int | None
) -> dict[str, Any]:
    """Return the results of `evaluate` from the records of `Judge`, in the order of the problems.

    tries: samples per problem. limit: a length from which on a response is left out of the means of lengths, if any.
    """
    columns = {name: _column(records, key) for name, key in MEANS.items()}
    if limit is not None:
        at_limit = columns["response_length"] >= limit
        columns |= {name: np.where(at_limit, np.nan, columns[name]) for name in LENGTHS}
    correct = _column(records, "correct")
    values = dict(columns) if run_seeds else {"pass_at_1": correct, **columns}
    for k in pass_at if tries else ():
        values[f"pass@{k}"] = np.array([pass_at_k(tries, record["solved"], k) for record in records])
    result = {
        **{name: mean(column) for name, column in values.items()},
        "num_samples": tries,
        "problems": len(records),
        "intervals": {name: bootstrap_interval(column) for name, column in values.items()},
        "samples": [_public(record, whole=bool(run_seeds)) for record in records],
    }
    if run_seeds:
        by_run = {"accuracy": correct, **columns}
        result["runs"] = [
            {"seed": seed, **{name: mean(column[:, [i]]) for name, column in by_run.items()}}
            for i, seed in enumerate(run_seeds)
        ]
    return result


def _column(records: list[dict[str, Any]], key: str) -> Any:
    """Return an entry of the responses as an array [N, R] float64: N problems, R runs (1 without runs)."""
    return np.array([[float(response[key]) for response in record["responses"]] for record in records])


def _public(record: dict[str, Any], *, whole: bool) -> dict[str, Any]:
    """Return a problem's record without its number. Unless `whole`, the entries of its one response are its own."""
    kept = {key: value for key, value in record.items() if key not in ("number", "responses")}
    if whole:
        return {**kept, "responses": record["responses"]}
    solved = {"solved": kept.pop("solved")} if "solved" in kept else {}
    return {**kept, **record["responses"][0], **solved}
