"""Latent steps and their mixtures in plain PyTorch (Eq. 1, 12-14).

Nothing here is fast, and much of it sorts or holds [N, V]. Computation is in float32, or in float64 for float64 inputs.
Equation numbers are those of arXiv 2604.27998.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latent_kernels._noise import exponential_draws, gumbel_noise, uniform_draws
from latent_kernels._types import LatentStep, LatentStepOptions

UNUSED_ID = -100  # marks the unused components of a text step
NEVER = 2**63 - 1  # no step is above it
SOFT_GRPO_FLOOR = 1e-6  # added to a probability before its logarithm, as SofT-GRPO does


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float64 if any tensor is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def per_row(value: float | Tensor, like: Tensor) -> Tensor:
    """Return a float as a 0-d and a [B] tensor as a [B, 1] tensor, in the dtype and on the device of `like`."""
    value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return value.unsqueeze(-1) if value.ndim == 1 else value


def nucleus_mask(sorted_log_probs: Tensor, top_p: float | Tensor, top_k: int) -> Tensor:
    """Return which tokens are candidates, [B, M] bool, given falling log-probs [B, M] of a prefix of the sorted order.

    A token is a candidate if the probability mass strictly before it is less than top_p, or if it is among the first
    top_k. `top_p = 1` keeps all. Mass is summed in float64, so that it does not depend on the order of summation.
    """
    probs = sorted_log_probs.double().exp()
    before = probs.cumsum(-1) - probs
    limit = per_row(top_p, before)
    rank = torch.arange(sorted_log_probs.shape[-1], device=probs.device)
    return (before < limit) | (limit >= 1.0) | (rank < top_k)


def best_first(scores: Tensor, ids: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the top_k highest scores and their ids, ties to the lower id, given both [B, M] in any order."""
    ids, order = ids.sort(dim=-1)
    scores, order = scores.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return scores[:, :top_k], ids.gather(-1, order)[:, :top_k]


def tempered(scores: Tensor, tau: Tensor) -> Tensor:
    """Return scores / tau, the logits of weights. A score of -inf stays -inf, which it is in the limit of tau = inf."""
    return torch.where(torch.isneginf(scores), scores, scores / tau)


class Mixture(NamedTuple):
    """The components of B rows, and their weights."""

    ids: Tensor  # [B, K] int64
    scores: Tensor  # [B, K]
    weights: Tensor  # [B, K]


def weighed(ids: Tensor, scores: Tensor, options: LatentStepOptions) -> Mixture:
    """Return components with the weights softmax(scores / tau), or softmax(scores) without noise."""
    tau = per_row(1.0 if options.noise == "none" else options.tau, scores)
    return Mixture(ids, scores, tempered(scores, tau).softmax(-1))


def stream_rows(rows: int, options: LatentStepOptions, device: torch.device) -> Tensor:
    """Return the noise stream of each row [B]."""
    return torch.arange(rows, device=device) if options.row_ids is None else options.row_ids


def noise_of_ids(ids: Tensor, options: LatentStepOptions, like: Tensor) -> Tensor:
    """Return the scaled noise of ids [B, M] in the dtype of `like`."""
    if options.exponential is not None:
        draws = options.exponential.gather(-1, ids)
    else:
        assert options.seed is not None
        draws = exponential_draws(ids, stream_rows(len(ids), options, ids.device), options.seed, options.step)
    noise = gumbel_noise(draws, options.noise, options.noise_delta)
    return noise.to(like.dtype) * per_row(options.noise_scale, like)


def nucleus_mixture(log_probs: Tensor, order: Tensor, options: LatentStepOptions) -> Mixture:
    """Return the K best noisy scores of the nucleus (Eq. 12-14), given log-probs [B, V] and their falling order."""
    if options.noise == "none":
        ids = order[:, : options.top_k]
        return weighed(ids, log_probs.gather(-1, ids), options)
    rows, vocab = log_probs.shape
    ids = torch.arange(vocab, device=log_probs.device).expand(rows, vocab)
    in_nucleus = torch.zeros_like(order, dtype=torch.bool)
    in_nucleus.scatter_(-1, order, nucleus_mask(log_probs.gather(-1, order), options.top_p, options.top_k))
    # A candidate of probability zero has the score -inf, like all tokens outside the nucleus. Its lower id keeps it
    # ahead of them.
    outside_last = torch.where(in_nucleus, ids, ids + vocab)
    scores = torch.where(in_nucleus, log_probs + noise_of_ids(ids, options, log_probs), -torch.inf)
    scores, ids = best_first(scores, outside_last, options.top_k)
    return weighed(ids % vocab, scores, options)


def soft_grpo_mixture(logits: Tensor, ids: Tensor, options: LatentStepOptions) -> Mixture:
    """Return the mixture of SofT-GRPO (arXiv 2511.06411), given logits [B, V] and the ids [B, K] of the highest.

    p = softmax of the K logits; q = p where the mass of the more probable ids is below top_p, else 0, normalised; score
    = log(q + 1e-6) + noise. Ids outside the nucleus stay in the mixture. The released code searches for thresholds of
    top-k and top-p. So equal logits are inside the nucleus together, and its mass counts all that tie with the K-th.
    """
    best = logits.gather(-1, ids)
    probs = best.softmax(-1)
    worst = best[:, -1:]
    tied = (logits == worst).sum(-1, keepdim=True) - (best == worst).sum(-1, keepdim=True)  # beyond the K
    # before[b, k] = the sum of probs[b, j] over the j whose logits are higher
    before = (probs.unsqueeze(1) * (best.unsqueeze(1) > best.unsqueeze(2))).sum(-1)
    before = before / (1.0 + tied * probs[:, -1:])
    limit = per_row(options.top_p, before)
    inside = (before < limit) | (limit >= 1.0) | (before == 0.0)
    probs = torch.where(inside, probs, 0.0)
    scores = (probs / probs.sum(-1, keepdim=True) + SOFT_GRPO_FLOOR).log()
    if options.noise != "none":
        scores = scores + noise_of_ids(ids, options, logits)
    scores, ids = best_first(scores, ids, options.top_k)
    return weighed(ids, scores, options)


def multiplex_draws(rows: int, options: LatentStepOptions, device: torch.device) -> Tensor:
    """Return the uniform draws [B, K] float64 that pick the ids of Multiplex Thinking."""
    if options.exponential is not None:
        return torch.exp(-options.exponential[:, : options.top_k].double())
    assert options.seed is not None
    return uniform_draws(options.top_k, stream_rows(rows, options, device), options.seed, options.step)


def multiplex_mixture(log_probs: Tensor, options: LatentStepOptions) -> Mixture:
    """Return the mixture of Multiplex Thinking (arXiv 2601.08808): K independent draws from log-probs [B, V].

    A draw u picks the first id whose cumulative mass, in the order of the vocabulary, is above u times the whole mass.
    The score of an id is its log-prob. The order of the draws is kept.
    """
    mass = log_probs.double().exp().cumsum(-1)
    total = mass[:, -1:]
    targets = multiplex_draws(len(log_probs), options, log_probs.device) * total
    last = (mass < total).sum(-1, keepdim=True)  # a draw of 1 picks the last id of positive mass
    ids = torch.minimum(torch.searchsorted(mass, targets, right=True), last)
    return weighed(ids, log_probs.gather(-1, ids), options)


def ends_run(first: Tensor, options: LatentStepOptions) -> Tensor:
    """Return which rows [B] the end marker ends, given their first ids [B]: none below min_latent_steps."""
    assert options.end_token_id is not None
    ends = first.eq(options.end_token_id)
    return ends & (options.step >= options.min_latent_steps) if options.min_latent_steps else ends


def in_latent_run(top_token: Tensor, options: LatentStepOptions) -> Tensor:
    """Return which rows [B] take a latent step, given the tokens of their highest logits [B]."""
    mask = options.latent_mask
    latent = torch.ones_like(top_token, dtype=torch.bool) if mask is None else mask.clone()
    if options.end_token_id is not None:
        latent &= ~ends_run(top_token, options)
    if options.max_latent_steps is not None:
        latent &= options.step < options.max_latent_steps
    return latent


def clean_options(options: LatentStepOptions) -> LatentStepOptions:
    """Return the options of the noise-free step from which SofT-GRPO and Multiplex Thinking start."""
    # By their noisy end rule only the first id of the mixture ends a run, so the highest logit must not.
    least = NEVER if options.end_rule == "noisy" else options.min_latent_steps
    return replace(options, noise="none", end_rule="raw", min_latent_steps=least)


def with_ended_rows(step: LatentStep, options: LatentStepOptions) -> LatentStep:
    """Return the step after the noisy end rule, with the end marker as the token of the rows that end."""
    if options.end_rule == "raw" and options.max_latent_steps is None:
        return step  # where a run has ended, the highest logit is the end marker
    is_latent = step.is_latent
    if options.end_rule == "noisy":
        is_latent = is_latent & ~ends_run(step.ids[:, 0], options)
    ended = ~is_latent if options.latent_mask is None else options.latent_mask & ~is_latent
    assert options.end_token_id is not None
    return step._replace(top_token=step.top_token.masked_fill(ended, options.end_token_id), is_latent=is_latent)


def latent_step_from_logits_ref(logits: Tensor, embedding: Tensor, **named: Any) -> LatentStep:
    """Compute the latent step by the plain rule: full sort, nucleus, noise on the whole vocabulary (Eq. 1, 12-14).

    logits is [B, V], embedding [V, D']. `LatentStepOptions` has the options; the default seed is 0.
    """
    options = LatentStepOptions(**{"seed": 0, **named})
    logits = logits.to(compute_dtype(logits))
    log_probs = logits - logits.logsumexp(-1, keepdim=True)
    top_token = logits.argmax(-1)
    is_latent = in_latent_run(top_token, options if options.method == "latent_grpo" else clean_options(options))
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    ids = order[:, : options.top_k]
    scores = log_probs.gather(-1, ids)
    weights = scores.softmax(-1)
    noisy = is_latent.unsqueeze(-1)
    if options.method == "soft_grpo":
        mixture = soft_grpo_mixture(logits, ids, options)
    elif options.method == "multiplex" and options.noise != "none":
        mixture = multiplex_mixture(log_probs, options)
    else:
        mixture = nucleus_mixture(log_probs, order, options)
    rows = ((ids, mixture.ids), (scores, mixture.scores), (weights, mixture.weights))
    ids, scores, weights = (torch.where(noisy, chosen, clean) for clean, chosen in rows)
    step = LatentStep(ids, scores.float(), weights.float(), mix(ids, weights, embedding), top_token, is_latent)
    return with_ended_rows(step, options)


def is_hard(ids: Tensor) -> Tensor:
    """Return which rows of ids [N, K] are text steps, [N] bool: -100 after the first component. For K = 1, none is."""
    return (ids[:, 1:] == UNUSED_ID).any(-1)


def has_valid_ids(ids: Tensor, vocab: int) -> Tensor:
    """Return which rows of ids [N, K] have all their tokens in a vocabulary, [N] bool.

    A text row has one token, the first; a latent row has K. The result of any other row is NaN, without a gradient:
    an error would have to wait for the device.
    """
    inside = (ids >= 0) & (ids < vocab)
    return torch.where(is_hard(ids), inside[:, 0], inside.all(-1))


def mixture_weights(ids: Tensor, scores: Tensor, tau: float | Tensor) -> Tensor:
    """Return `softmax(scores / tau)` [N, K], and (1, 0, ..., 0) on text rows, whatever their scores are."""
    first = torch.full_like(scores, -torch.inf)
    first[:, :1] = 0.0
    return torch.where(is_hard(ids).unsqueeze(-1), first, tempered(scores, per_row(tau, scores))).softmax(-1)


def mix(ids: Tensor, weights: Tensor, embedding: Tensor) -> Tensor:
    """Return `sum_k weights_k embedding[ids_k]` [N, D], summed one component at a time in the dtype of the weights.

    A row with an id outside the table is NaN.
    """
    vocab = len(embedding)
    out = torch.zeros(len(ids), embedding.shape[1], dtype=weights.dtype, device=weights.device)
    for k in range(ids.shape[1]):
        out = out + weights[:, k : k + 1] * embedding[ids[:, k].clamp(0, vocab - 1)].to(weights.dtype)
    return torch.where(has_valid_ids(ids, vocab).unsqueeze(-1), out, torch.nan).to(embedding.dtype)


def mix_embeddings_ref(ids: Tensor, scores: Tensor, embedding: Tensor, *, tau: float | Tensor = 1.0) -> Tensor:
    """Return the input embeddings [N, D] of recorded steps: mixtures with weights softmax(scores / tau) (Eq. 1).

    A text row is `embedding[ids[0]]`.
    """
    weights = mixture_weights(ids, scores.to(compute_dtype(embedding, scores)), tau)
    # In a wider copy of the table, the gradients of a token add up before they are rounded.
    table = embedding.to(weights.dtype) if embedding.requires_grad else embedding
    return mix(ids, weights, table).to(embedding.dtype)


def project_with_noise_ref(
    hidden: Tensor,  # [B, D]
    weight: Tensor,  # [D', D]
    bias: Tensor | None = None,
    *,
    noise: str = "one_sided",
    noise_scale: float | Tensor = 1.0,
    seed: int | Tensor = 0,
    step: int | Tensor = 0,
    row_ids: Tensor | None = None,
    exponential: Tensor | None = None,
    noise_delta: float = 0.0,
) -> Tensor:
    """Return `hidden @ weight.T + bias + noise_scale * g` [B, D'].

    g is the clamped Gumbel noise of Eq. 12-13, one draw per row and output unit.
    """
    dtype = compute_dtype(hidden, weight)
    out = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        out = out + bias.to(dtype)
    if noise != "none":
        if exponential is None:
            row_ids = torch.arange(len(hidden), device=hidden.device) if row_ids is None else row_ids
            exponential = exponential_draws(torch.arange(len(weight), device=hidden.device), row_ids, seed, step)
        out = out + gumbel_noise(exponential, noise, noise_delta).to(dtype) * per_row(noise_scale, out)
    return out.to(hidden.dtype)
