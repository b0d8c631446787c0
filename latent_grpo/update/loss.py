"""The policy loss of a rollout that is replayed with gradients, and what the loss needs of rewards and masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latent_grpo.config import LatentGRPOConfig
from latent_grpo.model import head_of
from latent_grpo.rollout.samples import Samples
from latent_grpo.rollout.trajectory import Rollout
from latent_grpo.update.activation_checkpointing import recomputed
from latent_grpo.update.replay import replay
from latent_kernels import STD_EPSILON, PolicyStats, fused_policy_loss, group_advantages

# How `fused_policy_loss` averages over the steps of a micro-batch, by `loss_type`. See `share_of_update`.
AGGREGATIONS = {
    "dapo": "token-mean",
    "bnpo": "token-mean",
    "cispo": "token-mean",
    "vespo": "token-mean",
    "grpo": "seq-mean-token-mean",
    "gspo": "seq-mean-token-mean",
    "sapo": "seq-mean-token-mean",
    "luspo": "seq-mean-token-sum",
    "dr_grpo": "seq-mean-token-sum-norm",
}
TOKENS_OF_UPDATE = ("dapo", "cispo", "vespo")  # means over all tokens of an update


@dataclass
class Batch:
    """A rollout with everything that its update needs: R responses of up to T steps."""

    rollout: Rollout
    group: Tensor  # [R] int64, the group of each response
    rewards: Tensor  # [R] float32; NaN for a response that no reward function applies to
    old_logprob: Tensor  # [R, T] or, of components, [R, T, K] float32, under the policy before the update
    ref_logprob: Tensor | None  # the same under the reference model; None without a KL penalty
    advantages: Tensor  # [R, T] float32
    samples: Samples | None = None  # the texts, for the logs
    hidden: Tensor | None = None  # [R, T, D] with gradients, if the only update of the batch can use them


def loss_options(args: LatentGRPOConfig) -> dict[str, Any]:
    """Translate the options of the trainer into the options of `fused_policy_loss`."""
    objective = args.loss_type if args.loss_type in ("cispo", "sapo", "vespo") else "clip"
    cispo, dual_clip = objective == "cispo", args.delta
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    if objective == "clip" and dual_clip is not None:
        # As in TRL: delta bounds the ratio, and the clipped ratio is one of two. So below 1 + epsilon_high, delta clips
        # positive advantages, and 1 + epsilon_high bounds the negative ones.
        high, dual_clip = min(high, dual_clip - 1.0), max(dual_clip, 1.0 + high)
    return dict(
        temperature=args.temperature,
        margin_gradient=args.margin_gradient,
        method=args.method,
        dual_clip=dual_clip,
        aggregation=AGGREGATIONS[args.loss_type],
        objective=objective,
        # The weight of CISPO has no lower bound. Its upper bound is the weight itself, not its distance from 1.
        clip_low=1.0 if cispo else min(args.epsilon, 1.0),
        clip_high=high - 1.0 if cispo else high,
        ratio="sequence" if args.loss_type == "gspo" else args.importance_sampling_level,
        kl_coef=args.beta,
        kl_estimator=args.kl_estimator,
        kl_bias_correction=args.use_bias_correction_kl,
        sapo_temperatures=(args.sapo_temperature_pos, args.sapo_temperature_neg),
        vespo_k=(args.vespo_k_pos, args.vespo_k_neg),
        vespo_lambda=(args.vespo_lambda_pos, args.vespo_lambda_neg),
        entropy_coef=args.entropy_coef,
    )


def update_loss(
    model: Any,
    rollout: Rollout,
    old_logprob: Tensor,  # [R, T], or [R, T, K] with a ratio for each component
    advantages: Tensor,  # [R, T]
    mask: Tensor,  # [R, T] bool
    ref_logprob: Tensor | None,  # like old_logprob
    args: LatentGRPOConfig,
    entropy_coef: float | Tensor,
    hidden: Tensor | None = None,
) -> tuple[Tensor, PolicyStats]:
    """Replay a rollout with gradients. Return its policy loss (0-d; Eq. 22-23) and statistics of the masked steps.

    entropy_coef: the coefficient of `entropy_share`, in place of the one in `args`.
    hidden: the hidden states [R, T, D] of `replay_with_gradients`, if they are known. Default: replay the rollout.
    """
    hidden = replay_with_gradients(model, rollout, args) if hidden is None else hidden
    head = head_of(model)
    return fused_policy_loss(
        hidden,
        head.weight,
        rollout.ids,
        rollout.scores,
        old_logprob,
        advantages,
        mask,
        ref_logprob=ref_logprob,
        **head.options(),
        **{**loss_options(args), "entropy_coef": entropy_coef},
    )


def replay_with_gradients(model: Any, rollout: Rollout, args: LatentGRPOConfig) -> Tensor:
    """Return the hidden states of `replay`, with gradients, checkpointed as the options ask."""
    with torch.enable_grad(), recomputed(model, args.gradient_checkpointing):
        return replay(model, rollout)


def share_of_update(args: LatentGRPOConfig, mask: Tensor, total: Tensor, responses: float) -> Tensor | float:
    """Return the factor on the loss of a micro-batch that makes the factored losses add up to the loss of the update.

    mask [r, t] bool: the steps of the micro-batch that carry the loss. total: number of such steps in the whole update
    (0-d int64). responses: share of the update's responses that are in the micro-batch.
    """
    if args.loss_type in TOKENS_OF_UPDATE:
        return mask.sum() / total.clamp_min(1)
    # dr_grpo divides token sums by the length limit. The aggregation divided by the t steps of the micro-batch.
    return responses * mask.shape[1] / args.max_completion_length if args.loss_type == "dr_grpo" else responses


def entropy_share(args: LatentGRPOConfig, mask: Tensor, total: Tensor, responses: float) -> Tensor | float:
    """Return the entropy coefficient of a micro-batch, whose loss is then multiplied by its `share_of_update`.

    The bonus of an update is the mean over its micro-batches of their mean entropies, weighed by their responses. So
    `entropy_coef` means the same for every loss type.
    """
    if not args.entropy_coef or args.loss_type not in (*TOKENS_OF_UPDATE, "dr_grpo"):
        return args.entropy_coef
    if args.loss_type == "dr_grpo":
        return args.entropy_coef * args.max_completion_length / mask.shape[1]
    return args.entropy_coef * responses * (total / mask.sum().clamp_min(1))


def loss_mask(args: LatentGRPOConfig, rollout: Rollout) -> Tensor:
    """Return the steps that carry the policy loss [R, T] bool by the options of a run."""
    mask = response_mask(rollout, args.loss_on, args.max_latent_steps)
    return mask & rollout.finished.unsqueeze(-1) if args.mask_truncated_completions else mask


def batch_std(rewards: Tensor, counted: Tensor) -> Tensor:
    """Return the standard deviation plus 1e-6 of the counted rewards of a batch; 1 if fewer than two are counted.

    rewards [R] float32, counted [R] bool. The result is 0-d float32; the deviation has Bessel's correction.
    """
    count = counted.sum()
    mean = (rewards * counted).sum() / count.clamp_min(1)
    variance = ((rewards - mean).square() * counted).sum() / (count - 1).clamp_min(1)
    return torch.where(count > 1, variance.sqrt() + STD_EPSILON, 1.0)


def response_mask(rollout: Rollout, loss_on: str, max_latent_steps: int | None = None) -> Tensor:
    """Return the steps that carry the policy loss [R, T] bool: "all" steps, only "latent" or only "text" steps.

    The end marker behind a run of `max_latent_steps` was forced. The policy took no action there, so it has no loss.
    """
    if loss_on == "latent":
        return rollout.mask & rollout.is_latent
    chosen = rollout.mask
    if max_latent_steps is not None and max_latent_steps < chosen.shape[1]:
        chosen = chosen.clone()
        chosen[:, max_latent_steps] &= rollout.latent_steps != max_latent_steps
    return chosen & ~rollout.is_latent if loss_on == "text" else chosen


def step_logprob(logprob: Tensor) -> Tensor:
    """Return log-probs of steps [R, T] from those of steps, or from those of their components [R, T, K]."""
    return logprob.sum(-1) if logprob.ndim == 3 else logprob


def policy_advantages(
    args: LatentGRPOConfig, rollout: Rollout, rewards: Tensor, group: Tensor, old_logprob: Tensor
) -> Tensor:
    """Return the advantage of every response step [R, T] from rewards [R], groups [R], old log-probs [R, T].

    A response whose reward is NaN has none: it gets no advantage, and no part in those of its group.
    """
    rewards, group, compared = without_unscored(rewards, group)
    result = group_advantages(
        rewards,
        group,
        invalid_mask=~rollout.finished,
        invalid=args.invalid,
        normalize_std=args.scale_rewards == "group",
        mean_logprob=mean_logprob(old_logprob, response_mask(rollout, "all", args.max_latent_steps)),
        # Several correct responses would pull the mixture of one latent step apart. Text steps have no mixture.
        first_token=args.first_token if args.latent else "all",
        winner_from=args.winner_from,
    )
    advantages = step_advantages(result.advantages, result.first_step, old_logprob.shape[1])
    if args.scale_rewards == "batch":
        counted = compared & (rollout.finished | (args.invalid != "exclude"))
        advantages = advantages / batch_std(rewards, counted)
    if args.importance_sampling_cap is not None:
        # Truncated importance sampling: the sampler's log-probs are not exactly those of the trainer.
        weights = (old_logprob - rollout.logprob).exp().clamp_max(args.importance_sampling_cap)
        advantages = advantages * sampler_weights(args, rollout, weights)
    return advantages


def sampler_weights(args: LatentGRPOConfig, rollout: Rollout, weights: Tensor) -> Tensor:
    """Return what multiplies the advantages [R, T], from the capped weights of steps [R, T]; 1 behind a response.

    A loss whose ratio is one number per response has the mean weight of the response at each of its steps, so that its
    gradients are those of TRL.
    """
    weights = torch.where(rollout.mask, weights, 1.0)
    if loss_options(args)["ratio"] != "sequence" or args.loss_type == "cispo":  # whose log-probs are those of steps
        return weights
    counted = response_mask(rollout, args.loss_on, args.max_latent_steps)
    mean = (weights * counted).sum(-1, keepdim=True) / counted.sum(-1, keepdim=True).clamp_min(1)
    return mean.expand_as(weights)


def without_unscored(rewards: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rewards [R], groups [R] and which responses are compared [R] bool, for rewards that may be NaN.

    A response without a reward becomes a group of its own, of reward 0, which has no advantage. So does a response that
    is the only one of its group with a reward, because there is nothing to compare it with.
    """
    scored = ~rewards.isnan()
    same = group.unsqueeze(0) == group.unsqueeze(1)
    compared = scored & (((same & scored).sum(-1) > 1) | (same & ~scored).sum(-1).eq(0))
    own = len(rewards) + torch.arange(len(rewards), device=group.device)
    return torch.where(compared, rewards, 0.0), torch.where(compared, group, group.max() + 1 + own), compared


def step_advantages(advantages: Tensor, first_step: Tensor, steps: int) -> Tensor:
    """Return the advantage of every response step [R, T]: `first_step` [R] at the first, then `advantages` [R]."""
    return torch.cat([first_step.unsqueeze(-1), advantages.unsqueeze(-1).expand(-1, steps - 1)], 1)


def mean_logprob(logprob: Tensor, mask: Tensor) -> Tensor:
    """Return the mean log-prob [R] of the masked steps of [R, T], by which one correct response is selected."""
    return torch.where(mask, logprob, 0.0).sum(-1) / mask.sum(-1).clamp_min(1)
