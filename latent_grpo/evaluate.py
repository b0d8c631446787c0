"""Evaluation: Pass@1 without noise, pass@k with it, reasoning tokens, end-marker and truncation rates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import comb
from typing import Any

import torch

from latent_grpo.config import LatentSampling
from latent_grpo.metrics import progress_bar
from latent_grpo.model import encode_prompts
from latent_grpo.reward import accuracy_reward
from latent_grpo.rollout import Rollout, generate_latent, visible_text

CORRECT = 0.5  # a reward above this counts as solved


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate 1 - C(n - c, k) / C(n, k) of solving a problem in k tries, from n samples of which c are
    right."""
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs at least {k} samples, got {samples}")
    return 1.0 - comb(samples - correct, k) / comb(samples, k)


def reasoning_tokens(rollout: Rollout, end_marker_id: int | None) -> torch.Tensor:
    """Steps before the end marker [R]: latent steps, or text tokens where the response reasons in text."""
    if rollout.is_latent.any() or end_marker_id is None:
        return rollout.latent_steps
    before = ((rollout.token == end_marker_id) & rollout.mask).long().cumsum(-1) == 0
    return (before & rollout.mask).sum(-1)


def evaluate(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Any],
    sampling: LatentSampling,
    *,
    pass_at: Sequence[int] = (1,),
    batch_size: int = 64,
    end_marker: str = "</think>",
    reward: Callable[..., list[float]] = accuracy_reward,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Score `rows` (each with prompt and answer).

    Returns pass_at_1 (one noise-free, greedy response a problem), pass@k for every k > 1 in `pass_at` (max(pass_at)
    sampled responses a problem), reasoning_tokens (mean, of the noise-free responses), response_length,
    end_marker_rate, truncation_rate, problems, and samples: the noise-free answers with their rewards.
    """
    clean = replace(sampling, noise="none", temperature=0.0)
    tries = max(pass_at)
    totals = dict.fromkeys(
        ("pass_at_1", "reasoning_tokens", "response_length", "end_marker_rate", "truncation_rate"), 0.0
    )
    solved: list[int] = []
    samples = []
    batches = [list(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    with progress_bar("Evaluation", len(batches), shown=show_progress) as bar:
        for number, batch in enumerate(batches):
            ids, mask = encode_prompts(tokenizer, [row["prompt"] for row in batch], model.device)
            rollout, texts, rewards = _respond(model, tokenizer, batch, ids, mask, clean, 1, end_marker, reward)
            ended = (~rollout.is_latent & rollout.mask).any(-1) if sampling.latent else rollout.finished
            totals["pass_at_1"] += sum(r > CORRECT for r in rewards)
            totals["reasoning_tokens"] += float(reasoning_tokens(rollout, sampling.end_token_id).sum())
            totals["response_length"] += float(rollout.lengths.sum())
            totals["end_marker_rate"] += float(ended.sum())
            totals["truncation_rate"] += float((~rollout.finished).sum())
            samples += [
                {"prompt": row["prompt"], "answer": row["answer"], "response": text, "reward": value}
                for row, text, value in zip(batch, texts, rewards, strict=True)
            ]
            if tries > 1:
                noisy = replace(sampling, seed=sampling.seed + 1 + number)
                *_, rewards = _respond(model, tokenizer, batch, ids, mask, noisy, tries, end_marker, reward)
                solved += [sum(r > CORRECT for r in rewards[i : i + tries]) for i in range(0, len(rewards), tries)]
            bar.advance(f"Pass@1 {totals['pass_at_1'] / len(samples):.3f}")
    result: dict[str, Any] = {name: value / max(1, len(rows)) for name, value in totals.items()}
    for k in pass_at:
        if k > 1:
            result[f"pass@{k}"] = sum(pass_at_k(tries, c, k) for c in solved) / max(1, len(solved))
    return {**result, "problems": len(rows), "samples": samples}


def _respond(
    model: Any, tokenizer: Any, rows: list[Any], ids: Any, mask: Any, sampling: LatentSampling, tries: int,
    end_marker: str, reward: Callable[..., list[float]],
) -> tuple[Rollout, list[str], list[float]]:  # fmt: skip
    rollout = generate_latent(model, ids, mask, sampling, num_generations=tries)
    texts = visible_text(tokenizer, rollout, end_marker)
    repeated = [row for row in rows for _ in range(tries)]
    rewards = reward(prompts=[r["prompt"] for r in repeated], completions=texts, answer=[r["answer"] for r in repeated])
    return rollout, texts, rewards
