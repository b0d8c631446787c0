"""The options of the sampled operators, and the named results of all operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class NoiseSpec(NamedTuple):
    """The noise of B rows: a stream given by (seed, step, row_ids), or injected Exp(1) draws [B, V]."""

    kind: str  # "one_sided", "two_sided" or "none"
    scale: float | Tensor  # a float or [B]
    seed: int | Tensor | None  # an int or 0-d int64
    step: int | Tensor  # an int or 0-d int64; in a latent step also [B]
    row_ids: Tensor | None  # [B] int64; None stands for 0, 1, ...
    exponential: Tensor | None

    @property
    def needs_seed(self) -> bool:
        """Tell whether noise is wanted, but neither a seed nor draws are given."""
        return self.kind != "none" and self.seed is None and self.exponential is None


@dataclass(frozen=True, eq=False)  # no `==`: a tensor among the options has no single truth value
class LatentStepOptions:
    """The options of a latent step of B rows over V tokens. `latent_step_from_logits` documents each of them."""

    top_k: int = 10
    top_p: float | Tensor = 0.95  # a float or [B]
    tau: float | Tensor = 1.0  # a float or [B]
    noise: str = "one_sided"
    noise_scale: float | Tensor = 1.0  # a float or [B]
    seed: int | Tensor | None = None  # an int or 0-d int64
    step: int | Tensor = 0  # an int, 0-d int64 or [B] int64
    row_ids: Tensor | None = None  # [B] int64
    exponential: Tensor | None = None  # [B, V]
    latent_mask: Tensor | None = None  # [B] bool
    end_token_id: int | None = None

    @property
    def noise_spec(self) -> NoiseSpec:
        """Return the options that describe the noise."""
        return NoiseSpec(self.noise, self.noise_scale, self.seed, self.step, self.row_ids, self.exponential)


class LatentStep(NamedTuple):
    """The result of one latent step of B rows, with K mixture components and embedding width D'."""

    ids: Tensor  # [B, K] int64, best score first, ties to the lower id
    scores: Tensor  # [B, K] float32: log-prob plus noise; only the log-prob on a row without noise
    weights: Tensor  # [B, K] float32, non-negative, each row sums to one
    embedding: Tensor  # [B, D'] in the embedding table's dtype
    top_token: Tensor  # [B] int64, the token of the highest raw logit, ties to the lower id
    is_latent: Tensor  # [B] bool, False where the row has ended or was not latent


class GroupAdvantages(NamedTuple):
    """The group-relative advantages of R responses, in the order of the rewards."""

    advantages: Tensor  # [R] float32, for every response step except the first
    first_step: Tensor  # [R] float32, for the first response step
    group_mean: Tensor  # [R] float32, mean reward of the row's group
    group_std: Tensor  # [R] float32, standard deviation of the row's group


class PolicyStats(NamedTuple):
    """Masked means over response steps: detached 0-d float32 tensors on the loss's device."""

    clip_fraction: Tensor  # steps whose clipped surrogate is larger; with "cispo", steps whose weight is clipped
    dual_clip_fraction: Tensor  # steps with a negative advantage where the dual clip sets the loss
    approx_kl: Tensor  # k1 estimate, old_logprob - logprob
    abs_log_ratio: Tensor  # |logprob - old_logprob|: before the first update, the gap between rollout and training
    kl: Tensor  # estimate of the KL to the reference model, aggregated like the loss; 0 without a reference
    margin_crossed: Tensor  # share of latent components whose margin is negative; NaN if the loss sees no margins
    entropy: Tensor  # nats of the policy, mean over text steps; NaN without an entropy bonus
