"""Probes of the latent gradient: has an update the advantage's sign, and does it point where the reward rises?

Noise is clamp(g, -1.5, 3) with a Gumbel variable g; one-sided noise adds 1.5 to it. The constant changes neither which
ids are kept nor their weights. So both kinds sample the same mixtures, and differ only in the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from latent_grpo.model import body, embed, head_logits, head_of, positions
from latent_grpo.rollout.trajectory import Rollout
from latent_grpo.update.replay import recorded_inputs, replay
from latent_kernels import GUMBEL_HIGH, GUMBEL_LOW

MARGIN_GRADIENTS = ("aligned", "released", "none")
STEPS_AT_ONCE = 512  # whose logits over the vocabulary are held at a time
NUDGE = 0.25  # by which a logit is moved to see what becomes of the reward, in nats
LEAST_PROBABILITY = 0.01  # of tokens whose logits are moved
MOST_TOKENS = 8
GROUP = 8  # responses of a group


@torch.no_grad()
def margins(model: Any, rollout: Rollout) -> Tensor:
    """Return score - log-prob of the components of all latent steps under `model` [steps, K] float32 (Eq. 15)."""
    latent = rollout.is_latent
    columns = (replay(model, rollout)[latent], rollout.ids[latent], rollout.scores[latent])
    parts = []
    for hidden, ids, scores in zip(*(column.split(STEPS_AT_ONCE) for column in columns), strict=True):
        logprob = head_logits(hidden, head_of(model)).log_softmax(-1)
        parts.append(scores - logprob.gather(-1, ids))
    return torch.cat(parts)


def coefficients(margin: Tensor, advantage: Tensor, margin_gradient: str) -> Tensor:
    """Return the factor of the advantage in the gradient of each component's log-prob [steps, K] (Eq. 16-17).

    margin [steps, K], advantage [steps]. The update has the advantage's sign where the factor is positive.
    """
    crossed = (margin < 0) & (advantage <= 0).unsqueeze(-1)
    plain = 1 - torch.exp(-margin)
    if margin_gradient == "aligned":
        return torch.where(crossed, 1 - torch.exp(-margin.abs()), plain)
    return torch.where(crossed, torch.exp(margin) - 1, plain) if margin_gradient == "released" else plain


def sign_shares(trainer: Any, updates: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield, after each number of updates on one rollout, the share of components whose update has the right sign.

    trainer: a LatentGRPOTrainer whose update is a whole rollout. Steps with the advantage 0 are not counted.
    """
    batch, _ = trainer.collect()
    latent = batch.rollout.is_latent
    advantage = batch.advantages[latent]
    counted = advantage != 0
    done = 0
    for number in updates:
        for _ in range(number - done):
            trainer.update(batch)
        done = number
        margin = margins(trainer.full_model, batch.rollout)[counted]
        shares = {
            name: float((coefficients(margin, advantage[counted], name) > 0).float().mean())
            for name in MARGIN_GRADIENTS
        }
        yield {"updates": number, **shares}


class LastStep:
    """The last latent step of a response, with noise-free steps before it, and the reward that follows from it.

    The reward is the probability of the right answer behind the end marker, so nothing but the noise of this step is
    random.
    """

    def __init__(self, model: Any, rollout: Rollout, row: int, end: int, answer: int, temperature: float) -> None:
        self.model, self.end, self.answer, self.temperature = model, end, answer, temperature
        one = rollout.select(torch.tensor([row]))
        steps = int(one.latent_steps[0])
        latent = recorded_inputs(model, one.ids[0, : steps - 1], one.scores[0, : steps - 1], 1.0).unsqueeze(0)
        embeds = torch.cat([embed(model, one.prompt_ids), latent.to(model.dtype)], 1)
        self.before = torch.cat([one.prompt_mask, torch.ones(1, steps - 1, dtype=one.prompt_mask.dtype)], 1)
        self.embeds = embeds
        hidden = body(model, embeds, self.before, positions(self.before))[:, -1]
        self.logits = head_logits(hidden, head_of(model))[0].double()

    def noise(self, samples: int, generator: torch.Generator) -> Tensor:
        """Return clamped Gumbel noise [samples, V] float64."""
        uniform = torch.rand(samples, len(self.logits), generator=generator, dtype=torch.float64)
        return (-torch.log(-torch.log(uniform))).clamp(GUMBEL_LOW, GUMBEL_HIGH)

    def sampled(self, logits: Tensor, noise: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
        """Return ids and scores [samples, K] of the step with these logits [V] (Eq. 12-14)."""
        logprob = logits.log_softmax(-1)
        ordered, order = logprob.sort(descending=True, stable=True)
        inside = (ordered.exp().cumsum(-1) - ordered.exp() < top_p) | (torch.arange(len(order)) < top_k)
        candidate = torch.zeros_like(inside).scatter(0, order, inside)
        scores, ids = torch.where(candidate, logprob + noise, -torch.inf).topk(top_k, dim=-1)
        return ids, scores

    def rewards(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Return the probability of the answer [samples] after mixtures of ids and scores [samples, K]."""
        model, samples = self.model, len(ids)
        cache = DynamicCache(config=model.config)
        body(model, self.embeds, self.before, positions(self.before), cache)
        cache.batch_repeat_interleave(samples)
        mixed = recorded_inputs(model, ids, scores.float(), 1.0).unsqueeze(1).to(model.dtype)
        end = embed(model, torch.full((samples, 1), self.end))
        mask = torch.cat([self.before.expand(samples, -1), torch.ones(samples, 2, dtype=self.before.dtype)], 1)
        hidden = body(model, torch.cat([mixed, end], 1), mask, positions(mask)[:, -2:], cache)[:, -1]
        logits = head_logits(hidden, head_of(model)) / self.temperature
        return logits.softmax(-1)[:, self.answer].double()


@torch.no_grad()
def direction(step: LastStep, samples: int, top_k: int, top_p: float, generator: torch.Generator) -> dict[str, float]:
    """Return the cosines of surrogate gradients to the true gradient of the expected reward, in a step's logits.

    The true gradient is a central difference with common noise. `one_sided` and `two_sided` are the surrogates (Eq. 15)
    on other noise: on all samples, and the mean cosine of groups of GROUP samples, each with its own mean reward.
    `likelihood` is the two-sided one with what it leaves out: that the other ids had lower scores. `size NAME` is the
    norm of a gradient.
    """
    probability = step.logits.softmax(-1)
    tokens = (probability > LEAST_PROBABILITY).nonzero().squeeze(-1)
    tokens = tokens[probability[tokens].argsort(descending=True)][:MOST_TOKENS]
    noise = step.noise(samples, generator)
    true = torch.stack([_slope(step, int(token), noise, top_k, top_p) for token in tokens])
    noise = step.noise(samples, generator)
    ids, scores = step.sampled(step.logits, noise, top_k, top_p)
    reward = step.rewards(ids, scores)
    group = reward.view(-1, GROUP)
    advantages = {"": reward - reward.mean(), f" of {GROUP}": (group - group.mean(-1, keepdim=True)).flatten()}
    logprob = step.logits.log_softmax(-1)
    margin = scores - logprob[ids]
    kept = torch.zeros(samples, len(logprob), dtype=torch.bool).scatter(-1, ids, True)
    others = torch.where(kept, 0.0, -torch.exp(logprob - scores[:, -1:]))
    factors = {
        "one_sided": torch.zeros_like(others).scatter(-1, ids, 1 - torch.exp(GUMBEL_LOW - margin)),
        "two_sided": torch.zeros_like(others).scatter(-1, ids, 1 - torch.exp(-margin)),
    }
    factors["likelihood"] = factors["two_sided"] + others
    cosines = {}
    for name, factor in factors.items():
        for of, advantage in advantages.items():
            toward = (advantage.unsqueeze(-1) * factor).view(-1, GROUP if of else samples, factor.shape[-1]).mean(1)
            gradient = toward - toward.sum(-1, keepdim=True) * probability  # of log-probs, carried to logits
            similar = torch.nn.functional.cosine_similarity(gradient[:, tokens], true.unsqueeze(0), dim=-1)
            cosines[name + of] = float(similar[gradient.norm(dim=-1) > 0].mean())
            cosines[f"size {name}{of}"] = float(gradient.norm(dim=-1).mean())
    return cosines


def _slope(step: LastStep, token: int, noise: Tensor, top_k: int, top_p: float) -> Tensor:
    """Return how the mean reward grows with one logit."""
    moved = torch.zeros_like(step.logits)
    moved[token] = NUDGE
    up, down = (step.rewards(*step.sampled(step.logits + sign * moved, noise, top_k, top_p)).mean() for sign in (1, -1))
    return (up - down) / (2 * NUDGE)
