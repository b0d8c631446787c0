"""A probe of latent steps: how an update has moved the policy away from the mixtures that it was sampled with.

The metrics need the log-probs of all components, which the fused loss never forms. So a small sample of the steps of a
rollout is replayed, once before and once after the update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from latent_grpo.config import LatentGRPOConfig
from latent_grpo.model import head_logits, head_of
from latent_grpo.rollout.trajectory import Rollout
from latent_grpo.update.micro_batches import micro_batches
from latent_grpo.update.replay import replay
from latent_kernels import GUMBEL_HIGH, GUMBEL_LOW

RESPONSES = 16  # that the sampled steps are from
SIBLINGS = 4  # of them to one prompt: they share its replay, which costs more than theirs where latent runs are short
STEPS_AT_ONCE = 64  # whose log-probs over the whole vocabulary are held at a time
SOFT_EPSILON = 1e-6  # SofT-GRPO adds it to a probability before the logarithm
# Log-probs of a step that is sampled and replayed differ by about this much, in nats.
ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3}
ROUNDING_16_BITS = 0.1


@torch.no_grad()
def start_probe(model: Any, rollout: Rollout, args: LatentGRPOConfig, step: int) -> Callable[[], dict[str, float]]:
    """Look at up to `probe_steps` latent steps of a rollout. Return a function that measures the policy when called.

    Call it after the update. Its metrics are shares of the components of these steps:

    - `latent/margins_not_positive`: the margin score - log-prob is at most 0 under the policy now. There the gradient
      of a latent step no longer has the sign of the advantage (Eq. 15). The margins of "soft_grpo" are to its own
      target, log(q + 1e-6) with q the softmax over the K components alone.
    - `latent/upper_atom`: the noise was at the upper end of its clamp (Eq. 12). Only of the method "latent_grpo".
    - `latent/nucleus_overlap`: the id would still be a candidate: the probability mass of the ids before it is below
      `latent_top_p` under the policy now, or it is among the first K.

    The sample depends only on the rollout and the step, so every rank measures the same and none waits for another.

    Args:
        model: the full model that samples, before the update. It must be the same object after the update.
        rollout: R responses that `model` has sampled.
        args: the options of the run.
        step: the number of the step. Without metrics at it, the function returns {}; so it does for text, for
            "multiplex", which has no margins, and for responses without latent steps.
    """
    wanted = step % args.logging_steps == 0 and args.probe_steps > 0
    if not (wanted and args.latent and args.method != "multiplex" and rollout.is_latent.any()):
        return dict
    sample, chosen = sample_steps(rollout, args.probe_steps, step)
    before = torch.cat([own.gather(-1, ids) for own, ids, _ in _logprobs(model, sample, chosen, args)])

    @torch.no_grad()
    def measure() -> dict[str, float]:
        parts = []
        for logprob, ids, scores in _logprobs(model, sample, chosen, args):
            kept = in_nucleus(logprob, ids, args.latent_top_p, args.latent_top_k)
            parts.append((logprob.gather(-1, ids), scores, kept))
        now, scores, kept = map(torch.cat, zip(*parts, strict=True))
        target = (now.softmax(-1) + SOFT_EPSILON).log() if args.method == "soft_grpo" else now
        shares = {"latent/margins_not_positive": scores <= target, "latent/nucleus_overlap": kept}
        if args.method == "latent_grpo":
            most = GUMBEL_HIGH if args.noise == "two_sided" else GUMBEL_HIGH - GUMBEL_LOW + args.noise_delta
            rounding = ROUNDING.get(model.dtype, ROUNDING_16_BITS)
            shares["latent/upper_atom"] = scores - before >= args.noise_scale * most - rounding
        return {name: float(hits.double().mean()) for name, hits in shares.items()}

    return measure


def sample_steps(rollout: Rollout, count: int, step: int) -> tuple[Rollout, Tensor]:
    """Return up to RESPONSES responses, and which latent steps of theirs are chosen [r, T] bool, `count` at most."""
    generator = torch.Generator().manual_seed(step)  # on the CPU, so that every rank and every device draws the same
    latent = rollout.is_latent.cpu()
    rows = latent.any(-1).nonzero().squeeze(-1)
    rows = rows[torch.randperm(len(rows), generator=generator)]
    prompts = torch.randperm(len(rollout.prompt_ids), generator=generator)[rollout.prompt_index.cpu()[rows]]
    prompts, order = prompts.sort(stable=True)
    place = torch.arange(len(rows)) - torch.searchsorted(prompts, prompts)  # among the responses to its prompt
    rows = rows[order[place < SIBLINGS][:RESPONSES]].sort().values
    places = latent[rows].nonzero()
    places = places[torch.randperm(len(places), generator=generator)[:count]]
    # A latent run comes first in its response, so what follows the last chosen step need not be replayed.
    steps = min(latent.shape[1], max(2, int(places[:, 1].max()) + 1))
    chosen = torch.zeros(len(rows), steps, dtype=torch.bool)
    chosen[places[:, 0], places[:, 1]] = True
    names = ("token", "ids", "scores", "is_latent", "mask", "logprob")
    cut = {name: getattr(rollout, name)[:, :steps] for name in names}
    device = rollout.token.device
    return replace(rollout, **cut).select(rows.to(device)), chosen.to(device)


def _logprobs(
    model: Any, sample: Rollout, chosen: Tensor, args: LatentGRPOConfig
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield log-probs [n, V], ids [n, K] and scores [n, K] of n <= STEPS_AT_ONCE chosen steps, in a fixed order."""
    rows = torch.arange(len(chosen), device=chosen.device)
    for part in micro_batches(sample, rows, args.per_device_train_batch_size, args.micro_batch_tokens):
        selected = sample.select(part)
        steps = chosen[part][:, : selected.mask.shape[1]]
        columns = (replay(model, selected)[steps], selected.ids[steps], selected.scores[steps])
        for hidden, ids, scores in zip(*(column.split(STEPS_AT_ONCE) for column in columns), strict=True):
            yield head_logits(hidden, head_of(model)).log_softmax(-1), ids, scores


def in_nucleus(logprob: Tensor, ids: Tensor, top_p: float, top_k: int) -> Tensor:
    """Return which of `ids` [n, K] are candidates of a latent step [n, K] bool, from log-probs [n, V].

    A candidate has less than `top_p` of the mass strictly before it, or is among the first `top_k`. Ties go to the
    lower id.
    """
    mass, vocab = logprob.exp(), torch.arange(logprob.shape[-1], device=logprob.device)
    kept = []
    for token in ids.split(1, dim=-1):  # K passes over the vocabulary, which cost less than to sort it
        own = logprob.gather(-1, token)
        before = (logprob > own) | ((logprob == own) & (vocab < token))
        kept.append(((mass * before).sum(-1) < top_p) | (before.sum(-1) < top_k))
    return torch.stack(kept, -1)
