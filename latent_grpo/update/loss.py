"""Replay of trajectories with gradients: log-probs and the policy loss of a rollout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latent_grpo.config import LatentGRPOConfig
from latent_grpo.model import lm_head
from latent_grpo.rollout.trajectory import Rollout
from latent_grpo.update.activation_checkpointing import recomputed
from latent_grpo.update.replay import replay
from latent_kernels import PolicyStats, fused_policy_loss

AGGREGATIONS = {
    "dapo": "token-mean", "bnpo": "token-mean", "cispo": "token-mean", "grpo": "seq-mean-token-mean",
    "gspo": "seq-mean-token-mean", "dr_grpo": "seq-mean-token-sum-norm",
}  # fmt: skip
CISPO_WEIGHT = 5.0  # the largest importance weight where none is given (ScaleRL, arXiv 2510.13786)
STD_EPSILON = 1e-6


def loss_options(args: LatentGRPOConfig) -> dict[str, Any]:
    """Options of `fused_policy_loss` by the names of the configuration."""
    cispo, high = args.loss_type == "cispo", args.epsilon_high
    if high is None:
        high = CISPO_WEIGHT if cispo else args.epsilon
    return dict(
        temperature=args.temperature, margin_gradient=args.margin_gradient, dual_clip=args.delta,
        aggregation=AGGREGATIONS[args.loss_type], objective="cispo" if cispo else "clip",
        # CISPO's weight has no bound below.
        clip_low=1.0 if cispo else args.epsilon, clip_high=high - 1.0 if cispo else high,
        ratio="sequence" if args.loss_type == "gspo" else args.importance_sampling_level,
        kl_coef=args.beta, kl_estimator=args.kl_estimator, entropy_coef=args.entropy_coef,
    )  # fmt: skip


def update_loss(
    model: Any, rollout: Rollout, old_logprob: Tensor, advantages: Tensor, mask: Tensor, ref_logprob: Tensor | None,
    args: LatentGRPOConfig,
) -> tuple[Tensor, PolicyStats]:  # fmt: skip
    """The policy loss of a rollout replayed with gradients; all but the rollout is [R, T]."""
    with recomputed(model, args.gradient_checkpointing):
        hidden = replay(model, rollout)
    return fused_policy_loss(
        hidden, lm_head(model), rollout.ids, rollout.scores, old_logprob, advantages, mask, ref_logprob=ref_logprob,
        **loss_options(args),
    )  # fmt: skip


def share_of_update(args: LatentGRPOConfig, mask: Tensor, total: Tensor, responses: float) -> Tensor | float:
    """Factor on a micro-batch's loss, a mean over its mask [r, t], that makes their sum the loss of the update.

    `total` steps of the update carry the loss, and `responses` is the micro-batch's share of its responses.
    """
    if args.loss_type in ("dapo", "cispo"):
        return mask.sum() / total.clamp_min(1)
    return responses * mask.shape[1] / args.max_completion_length if args.loss_type == "dr_grpo" else responses


def batch_std(rewards: Tensor, counted: Tensor) -> Tensor:
    """Standard deviation plus 1e-6 of the counted rewards [R] of a batch, 0-d; 1 where fewer than two count."""
    count = counted.sum()
    mean = (rewards * counted).sum() / count.clamp_min(1)
    variance = ((rewards - mean).square() * counted).sum() / (count - 1).clamp_min(1)
    return torch.where(count > 1, variance.sqrt() + STD_EPSILON, 1.0)


def response_mask(rollout: Rollout, loss_on: str) -> Tensor:
    """Steps that carry the policy loss [R, T]: "all", "latent" or "text"."""
    if loss_on == "latent":
        return rollout.mask & rollout.is_latent
    return rollout.mask & ~rollout.is_latent if loss_on == "text" else rollout.mask


def step_advantages(advantages: Tensor, first_step: Tensor, steps: int) -> Tensor:
    """Advantages of every response step [R, T] from those of the response and of its first step, both [R]."""
    return torch.cat([first_step.unsqueeze(-1), advantages.unsqueeze(-1).expand(-1, steps - 1)], 1)


def mean_logprob(logprob: Tensor, mask: Tensor) -> Tensor:
    """Mean over a response's steps [R]; the selection criterion of the first step."""
    return (mask * logprob).sum(-1) / mask.sum(-1).clamp_min(1)
