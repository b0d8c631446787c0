"""Probes of noisy latent inputs, of first-token selection and of the masking of cut-off responses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latent_grpo.config import LatentGRPOConfig, LatentSampling
from latent_grpo.evaluation import evaluate
from latent_grpo.model import body, head_logits, head_of, positions
from latent_grpo.prompts import encode_prompts
from latent_grpo.rollout.generate import generate_latent
from latent_grpo.rollout.trajectory import Rollout
from latent_grpo.sft import Example, collate
from latent_grpo.sft.inputs import input_mixtures
from latent_grpo.trainer import LatentGRPOTrainer
from latent_grpo.update.loss import Batch
from latent_grpo.update.replay import replay

LAST = 10  # rollouts at the end of a run whose metrics are averaged


@torch.no_grad()
def step_logprobs(model: Any, rollout: Rollout, step: int) -> Tensor:
    """Return the log-probs [R, V] float32 that the model gives to response step `step`, counted from 0."""
    return head_logits(replay(model, rollout)[:, step], head_of(model)).log_softmax(-1)


def entropy(logprob: Tensor) -> float:
    """Return the mean entropy in nats of distributions [R, V]."""
    return float(-(logprob.exp() * logprob).sum(-1).mean())


def off_manifold(
    trainer: LatentGRPOTrainer, problems: Sequence[Any], scales: Sequence[float], settings: dict[str, dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield, for each scale of the noise and each setting of the sampling, what noise on latent steps does.

    `accuracy` is the share of right greedy answers after noisy latent steps, and `divergence` the mean
    KL(after a noise-free first step || after a noisy one) of the second step's distribution, in nats.
    """
    ids, mask = encode_prompts(
        trainer.tokenizer, [row["prompt"] for row in problems], trainer.device, prompt_format=trainer.prompt_format
    )
    for name, changes in settings.items():
        quiet = LatentSampling(**{**vars(trainer.sampling), **changes, "noise": "none", "temperature": 0.0})
        clean = step_logprobs(trainer.model, generate_latent(trainer.model, ids, mask, quiet), 1)
        for scale in scales:
            noisy = replace(quiet, noise="one_sided" if scale else "none", noise_scale=scale or 1.0)
            after = step_logprobs(trainer.model, generate_latent(trainer.model, ids, mask, noisy), 1)
            divergence = float((clean.exp() * (clean - after)).sum(-1).mean())
            result = evaluate(trainer.model, trainer.tokenizer, problems, noisy, num_samples=1, batch_size=256)
            accuracy = result["pass@1"] if scale else result["pass_at_1"]
            yield {"setting": name, "scale": scale, "accuracy": accuracy, "divergence": divergence}


@torch.no_grad()
def answer_mass(model: Any, examples: Sequence[Example], answers: Tensor) -> float:
    """Return the mean probability of the answer at the last latent step, after the examples' other steps."""
    batch = collate(examples, model.device)
    hidden = body(model, input_mixtures(batch, model), batch.mask, positions(batch.mask))
    last = batch.latent.int().cumsum(-1).argmax(-1)  # its distribution is predicted by the element before it
    logits = head_logits(hidden[torch.arange(len(last)), last - 1], head_of(model))
    return float(logits.softmax(-1).gather(-1, answers.unsqueeze(-1)).mean())


class ZeroSum(LatentGRPOTrainer):
    """Selects the best of the group at the first step, and subtracts there what is left of the group's mean."""

    def prepare(self, rollout: Rollout, rewards: Tensor) -> tuple[Batch, dict[str, float]]:
        """Return the batch of the full method with first-step advantages that sum to zero in every group."""
        batch, gap = super().prepare(rollout, rewards)
        first = batch.advantages[:, 0].view(-1, self.args.num_generations)
        batch.advantages[:, 0] = (first - first.mean(-1, keepdim=True)).flatten()
        return batch, gap


def selection(
    start: str, args: LatentGRPOConfig, rows: list[Any], held_out: list[Any], names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield what each rule of first-token selection does in a run of its own; "zero_sum" is ours, for comparison.

    `sum` is the mean sum of a group's first-step advantages on the first rollout, `entropies` those of the policy's
    first step on held-out problems before and after, in nats, and `pass_at_1` the accuracy after.
    """
    for name in names:
        rule: Any = "best_of_group" if name == "zero_sum" else name
        own = replace(args, first_token=rule, output_dir=str(Path(args.output_dir) / name))
        kind = ZeroSum if name == "zero_sum" else LatentGRPOTrainer
        trainer = kind(start, None, own, rows, held_out)
        ids, mask = encode_prompts(
            trainer.tokenizer, [row["prompt"] for row in held_out], trainer.device, prompt_format=trainer.prompt_format
        )
        watched = generate_latent(trainer.model, ids, mask, trainer.sampling)
        before = entropy(step_logprobs(trainer.model, watched, 0))
        batch, _ = trainer.collect()
        sums = batch.advantages[:, 0].view(-1, args.num_generations).sum(-1)
        trainer = kind(start, None, replace(own, output_dir=f"{own.output_dir}/run"), rows, held_out)
        trainer.train()
        after = entropy(step_logprobs(trainer.model, watched, 0))
        yield {
            "rule": name,
            "sum": float(sums.mean()),
            "entropies": (before, after),
            "pass_at_1": trainer.evaluate()["eval_pass_at_1"],
        }


def invalid_samples(
    start: str, args: LatentGRPOConfig, rows: list[Any], held_out: list[Any], variants: dict[str, dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield length and share of cut-off responses at the end of a run of each variant, and the accuracy after it."""
    for name, changes in variants.items():
        own = replace(args, output_dir=str(Path(args.output_dir) / name.replace(" ", "-")), **changes)
        trainer = LatentGRPOTrainer(start, None, own, rows, held_out)
        trainer.train()
        last = [row for row in trainer.metrics.history if "reward" in row][-LAST:]
        keys = {"latent_steps": "latent/mean_length", "cut_off": "completions/clipped_ratio"}
        means = {key: sum(row[metric] for row in last) / len(last) for key, metric in keys.items()}
        yield {"variant": name, **means, "pass_at_1": trainer.evaluate()["eval_pass_at_1"]}
