"""The named results of the operators."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LatentStep(NamedTuple):
    """One step of latent decoding for B rows with K mixture components and embedding width D'."""

    ids: Tensor  # [B, K] int64, best score first, ties to the lower id
    scores: Tensor  # [B, K] float32: log-prob plus noise; the log-prob alone on a row without noise
    weights: Tensor  # [B, K] float32, non-negative, sum to one
    embedding: Tensor  # [B, D'] in the embedding table's dtype
    top_token: Tensor  # [B] int64, the highest raw logit, ties to the lower id
    is_latent: Tensor  # [B] bool, False where the row has ended or was not latent


class GroupAdvantages(NamedTuple):
    """Group-relative advantages of R responses, in the order in which the rewards were given."""

    advantages: Tensor  # [R] float32, for every response step but the first
    first_step: Tensor  # [R] float32, for the first response step
    group_mean: Tensor  # [R] float32, mean reward of the row's group
    group_std: Tensor  # [R] float32, standard deviation of the row's group


class PolicyStats(NamedTuple):
    """Masked means over response steps; detached 0-d float32 tensors on the loss's device."""

    clip_fraction: Tensor  # steps where the clipped surrogate is the larger one; with "cispo", whose weight is clipped
    dual_clip_fraction: Tensor  # steps with a negative advantage held by the dual clip
    approx_kl: Tensor  # k1 estimate, old_logprob - logprob
    abs_log_ratio: Tensor  # |logprob - old_logprob|: before the first update, the rollout/train gap
    kl: Tensor  # estimate to the reference model under the loss's aggregation; 0 without one
    margin_crossed: Tensor  # share of latent components whose margin is negative; NaN where margins are not seen
    entropy: Tensor  # nats of the policy at a text step, mean; NaN where there is no entropy bonus
