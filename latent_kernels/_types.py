"""The options of the sampled operators, and the named results of all operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

METHODS = ("latent_grpo", "soft_grpo", "multiplex")  # rules of a latent step and its log-prob


class NoiseSpec(NamedTuple):
    """The noise of B rows: a stream given by (seed, step, row_ids), or injected Exp(1) draws [B, V]."""

    kind: str  # "one_sided", "two_sided" or "none"
    scale: float | Tensor  # a float or [B]
    seed: int | Tensor | None  # an int or 0-d int64
    step: int | Tensor  # an int or 0-d int64; in a latent step also [B]
    row_ids: Tensor | None  # [B] int64; None stands for 0, 1, ...
    exponential: Tensor | None
    delta: float = 0.0  # the least one-sided noise, before the scale

    @property
    def needs_seed(self) -> bool:
        """Tell whether noise is wanted, but neither a seed nor draws are given."""
        return self.kind != "none" and self.seed is None and self.exponential is None


class HeadOptions(NamedTuple):
    """What the logits of a model are besides the product with its LM head. The default is the product alone.

    The logits are z = logit_scale * (hidden @ lm_head.T + bias), and softcap * tanh(z / softcap) with a soft cap.
    """

    bias: Tensor | None = None  # [V]
    logit_scale: float = 1.0  # positive
    softcap: float | None = None  # positive; None is no cap

    @property
    def plain(self) -> bool:
        """Tell whether the logits are the product itself."""
        return self.bias is None and self.logit_scale == 1.0 and self.softcap is None


PLAIN_HEAD = HeadOptions()


@dataclass(frozen=True, eq=False)  # no `==`: a tensor among the options has no single truth value
class LatentStepOptions:
    """The options of a latent step of B rows over V tokens.

    Args:
        top_k: K, the number of mixture components, 1 to V.
        top_p: nucleus mass, a float or [B]; the first top_k tokens are always candidates, 1 keeps every token.
        tau: Gumbel-softmax temperature of the weights, a float or [B]; inf weighs all components alike.
        noise: "one_sided" ([0, 4.5], the paper), "two_sided" ([-1.5, 3]) or "none" (deterministic; tau is not applied).
        noise_scale: factor on the noise, a float or [B].
        seed, step: an int or a 0-d int64 tensor; step may also be [B]. If seed is None, torch's generator draws one.
        row_ids: [B] int64, the noise stream of each row (default 0, 1, ...). The noise of a token is a function of
            only (seed, step, row_ids[b], token id): batch, order, dtype and implementation do not change it.
        exponential: [B, V] Exp(1) draws e in place of a seed. Uniform draw k of "multiplex" is exp(-e[:, k]).
        latent_mask: [B] bool, True for rows still in their latent run (default: all rows).
        end_token_id: the end marker. A row that ends is hard: its is_latent is False and its top_token the end marker.
        noise_delta: the least one-sided noise: one-sided noise is in [noise_delta, 4.5 + noise_delta].
        end_rule: "raw": a row ends, without noise, where its highest raw logit is the end marker. "noisy" (the released
            samplers): also where the first id of its mixture is, and only there with another `method` than
            "latent_grpo". A row that its mixture ends keeps this mixture.
        min_latent_steps: while `step` is below it, the end marker ends no run.
        max_latent_steps: a run ends where `step` has reached it, whatever the logits are. None is no limit.
        method: "latent_grpo" adds noise to the nucleus and keeps the K best. "soft_grpo" takes the K most probable
            tokens and adds noise to the logarithms of their renormalised probabilities. "multiplex" draws K tokens from
            softmax(logits), with replacement; noise_scale is not used, and top_p must be 1.
    """

    top_k: int = 10
    top_p: float | Tensor = 0.95
    tau: float | Tensor = 1.0
    noise: str = "one_sided"
    noise_scale: float | Tensor = 1.0
    seed: int | Tensor | None = None
    step: int | Tensor = 0
    row_ids: Tensor | None = None
    exponential: Tensor | None = None
    latent_mask: Tensor | None = None
    end_token_id: int | None = None
    noise_delta: float = 0.0
    end_rule: str = "raw"
    min_latent_steps: int = 0
    max_latent_steps: int | None = None
    method: str = "latent_grpo"

    @property
    def noise_spec(self) -> NoiseSpec:
        """Return the options that describe the noise."""
        return NoiseSpec(
            self.noise, self.noise_scale, self.seed, self.step, self.row_ids, self.exponential, self.noise_delta
        )


class LatentStep(NamedTuple):
    """The result of one latent step of B rows, with K mixture components and embedding width D'."""

    ids: Tensor  # [B, K] int64, best score first, ties to the lower id; "multiplex": in the order of the draws
    scores: Tensor  # [B, K] float32: log-prob plus noise; only the log-prob on a row without noise or of "multiplex"
    weights: Tensor  # [B, K] float32, non-negative, each row sums to one
    embedding: Tensor  # [B, D'] in the embedding table's dtype
    top_token: Tensor  # [B] int64, the end marker where a run ends, else the highest raw logit's (ties: the lower id)
    is_latent: Tensor  # [B] bool, False where the row has ended or was not latent


class TextOptions(NamedTuple):
    """How a text row of a decoding step draws its token: temperature, then top-k, then top-p."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # candidates; 0 keeps all
    top_p: float = 1.0  # nucleus mass of the candidates
    uniform: Tensor | None = None  # [B] float64 draws in (0, 1) in place of those of the noise stream

    def kind(self, vocab: int) -> str:
        """Return which part of the distribution counts: its "greedy" token, the "whole", or what a "cut" leaves."""
        if self.temperature == 0:
            return "greedy"
        return "cut" if 0 < self.top_k < vocab or self.top_p < 1 else "whole"


class DecodingStep(NamedTuple):
    """The elements that B rows emit: a mixture of K components with embedding width D', or a text token.

    The ids of a token are (token, -100, ...), and its scores are 0.
    """

    ids: Tensor  # [B, K] int64, of a mixture best score first
    scores: Tensor  # [B, K] float32: log-prob plus noise
    embedding: Tensor  # [B, D'] in the embedding table's dtype
    token: Tensor  # [B] int64, the text token, or of a mixture the token of the highest raw logit
    is_latent: Tensor  # [B] bool, False on text rows and where a latent run has ended
    logprob: Tensor  # [B] float32, as `latent_logprob` with the temperature of text gives it


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
