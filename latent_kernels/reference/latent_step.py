"""Latent steps and their mixtures in plain PyTorch (Eq. 1, 12-14).

Nothing here is fast, and much of it sorts or holds [N, V]. Computation is in float32, or in float64 for float64 inputs.
Equation numbers are those of arXiv 2604.27998.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latent_kernels._noise import exponential_draws, gumbel_noise
from latent_kernels._types import LatentStep

UNUSED_ID = -100  # marks the unused components of a text step  # marks the unused components of a text step


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


def latent_step_from_logits_ref(
    logits: Tensor,  # [B, V]
    embedding: Tensor,  # [V, D']
    *,
    top_k: int = 10,
    top_p: float | Tensor = 0.95,
    tau: float | Tensor = 1.0,
    noise: str = "one_sided",
    noise_scale: float | Tensor = 1.0,
    seed: int | Tensor = 0,
    step: int | Tensor = 0,
    row_ids: Tensor | None = None,
    exponential: Tensor | None = None,
    latent_mask: Tensor | None = None,
    end_token_id: int | None = None,
) -> LatentStep:
    """Compute the latent step by the plain rule: full sort, nucleus, noise on the whole vocabulary (Eq. 1, 12-14)."""
    logits = logits.to(compute_dtype(logits))
    rows, vocab = logits.shape
    log_probs = logits - logits.logsumexp(-1, keepdim=True)
    ids = torch.arange(vocab, device=logits.device).expand(rows, vocab)
    top_token = logits.argmax(-1)
    is_latent = torch.ones_like(top_token, dtype=torch.bool) if latent_mask is None else latent_mask.clone()
    if end_token_id is not None:
        is_latent &= top_token != end_token_id

    order = logits.sort(dim=-1, descending=True, stable=True).indices
    clean_ids = order[:, :top_k]
    clean_scores = log_probs.gather(-1, clean_ids)
    clean_weights = clean_scores.softmax(-1)
    if noise == "none":
        kept_scores, kept_ids, weights = clean_scores, clean_ids, clean_weights
    else:
        if exponential is None:
            row_ids = torch.arange(rows, device=logits.device) if row_ids is None else row_ids
            exponential = exponential_draws(ids, row_ids, seed, step)
        shift = gumbel_noise(exponential, noise).to(logits.dtype) * per_row(noise_scale, logits)
        in_nucleus = torch.zeros_like(order, dtype=torch.bool)
        in_nucleus.scatter_(-1, order, nucleus_mask(log_probs.gather(-1, order), top_p, top_k))
        # A candidate of probability zero has the score -inf, like all tokens outside the nucleus. Its lower id keeps it
        # ahead of them.
        outside_last = torch.where(in_nucleus, ids, ids + vocab)
        scores = torch.where(in_nucleus, log_probs + shift, -torch.inf)
        kept_scores, kept_ids = best_first(scores, outside_last, top_k)
        kept_ids = kept_ids % vocab
        weights = (kept_scores / per_row(tau, logits)).softmax(-1)
        noisy = is_latent.unsqueeze(-1)
        kept_scores = torch.where(noisy, kept_scores, clean_scores)
        kept_ids = torch.where(noisy, kept_ids, clean_ids)
        weights = torch.where(noisy, weights, clean_weights)
    mixture = mix(kept_ids, weights, embedding)
    return LatentStep(kept_ids, kept_scores.float(), weights.float(), mixture, top_token, is_latent)


def is_hard(ids: Tensor) -> Tensor:
    """Return which rows of ids [N, K] are text steps, [N] bool: -100 after the first component. For K = 1, none is."""
    return (ids[:, 1:] == UNUSED_ID).any(-1)


def mixture_weights(ids: Tensor, scores: Tensor, tau: float | Tensor) -> Tensor:
    """Return `softmax(scores / tau)` [N, K], and (1, 0, ..., 0) on text rows, whatever their scores are."""
    first = torch.full_like(scores, -torch.inf)
    first[:, :1] = 0.0
    return torch.where(is_hard(ids).unsqueeze(-1), first, scores / per_row(tau, scores)).softmax(-1)


def mix(ids: Tensor, weights: Tensor, embedding: Tensor) -> Tensor:
    """Return `sum_k weights_k embedding[ids_k]` [N, D], summed one component at a time in the dtype of the weights."""
    out = torch.zeros(len(ids), embedding.shape[1], dtype=weights.dtype, device=weights.device)
    for k in range(ids.shape[1]):
        out = out + weights[:, k : k + 1] * embedding[ids[:, k].clamp_min(0)].to(weights.dtype)
    return out.to(embedding.dtype)


def mix_embeddings_ref(ids: Tensor, scores: Tensor, embedding: Tensor, *, tau: float | Tensor = 1.0) -> Tensor:
    """Return the input embeddings [N, D] of recorded steps: mixtures with weights softmax(scores / tau) (Eq. 1).

    A text row is `embedding[ids[0]]`.
    """
    weights = mixture_weights(ids, scores.to(compute_dtype(embedding, scores)), tau)
    return mix(ids, weights, embedding)


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
        out = out + gumbel_noise(exponential, noise).to(dtype) * per_row(noise_scale, out)
    return out.to(hidden.dtype)
