"""The tests' own evaluation of the operators: float64, one row or one step at a time, with analytic gradients.

Written from the paper (arXiv 2604.27998, "Eq. N") and docs/method.md, not from the code under test: nothing of
`latent_kernels` is imported here, and every gradient is a written formula instead of autograd.
tests/kernels/test_oracle.py holds the oracle against the released code's outputs and against cases worked out by hand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

UNUSED = -100  # the id of every component but the first in a row that stands for one text token

# Clamps that belong to the contract of the operators, with the reason for each.
EXPONENT_MAX = 40.0  # of exp(-margin): exp(40) squared is finite in float32, so the norm of a gradient is finite too
MARGIN_MAX = 1e4  # of a margin: a component of probability zero under the policy gives a large number, not infinity
LOG_RATIO_MAX = 20.0  # of log-ratios: exp(20) is finite in float32 and far outside every clip range
KL_MAX = 10.0  # of the k3 estimate of a step, as in the released code
STD_EPSILON = 1e-6  # added to a group's standard deviation (Eq. 10)
SOFT_EPSILON, SOFT_LOGPROB_MIN = 1e-6, -3.0  # of the released SofT-GRPO: under the logarithm, and who counts
GUMBEL_LOW, GUMBEL_HIGH = -1.5, 3.0  # the clamp of the noise (Eq. 13)

WORD = 0xFFFFFFFF


# Noise


def philox(counter: Sequence[Any], key: tuple[int, int]) -> list[Any]:
    """Return the four output words of Philox-4x32-10 (Salmon et al. 2011).

    The words of the counter are Python integers below 2^32 or uint64 arrays of them that broadcast against each other.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ k0, second & WORD, (first >> 32) ^ c3 ^ k1, first & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return [c0, c1, c2, c3]


def exponential_draws(vocab: int, row_ids: Sequence[int], seed: int, step: int) -> Tensor:
    """Return the Exp(1) draws [B, V] float32 of the stream (seed, step, row) for ids 0, 1, ..., V - 1.

    The uniform number is rounded to float32 before its logarithm: that rounding is part of the stream.
    """
    ids, key = np.arange(vocab, dtype=np.uint64), (int(seed) & WORD, (int(seed) >> 32) & WORD)
    rows = []
    for row in row_ids:
        words = philox((ids, int(row) & WORD, (int(row) >> 32) & WORD, int(step) & WORD), key)[0]
        uniform = words.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
        rows.append(-np.log(uniform.astype(np.float64)))
    return torch.from_numpy(np.array(rows, dtype=np.float32).reshape(-1, vocab))


def uniform_draws(count: int, row_id: int, seed: int, step: int) -> np.ndarray:
    """Return the uniform draws of the stream (seed, step, row) for ids 0, 1, ..., count - 1, in float64."""
    counter = (np.arange(count, dtype=np.uint64), row_id & WORD, (row_id >> 32) & WORD, step & WORD)
    return (philox(counter, (seed & WORD, (seed >> 32) & WORD))[0].astype(np.float64) + 0.5) / 2.0**32


def gumbel(exponential: np.ndarray, kind: str) -> np.ndarray:
    """Return the clamped Gumbel noise of Exp(1) draws in float64 (Eq. 12-13); one-sided noise starts at zero."""
    if kind == "none":
        return np.zeros(exponential.shape)
    with np.errstate(divide="ignore"):
        noise = np.clip(-np.log(exponential.astype(np.float64)), GUMBEL_LOW, GUMBEL_HIGH)
    return noise - GUMBEL_LOW if kind == "one_sided" else noise


def per_row(value: float | Tensor, rows: int) -> list[float]:
    """Return one number per row from an option that is one number or a tensor [B]."""
    return torch.as_tensor(value, dtype=torch.float64).expand(rows).tolist()


# The latent step and its replay


class Step(NamedTuple):
    """One latent step of B rows, with the fields of `LatentStep`."""

    ids: Tensor
    scores: Tensor
    weights: Tensor
    embedding: Tensor
    top_token: Tensor
    is_latent: Tensor


def log_softmax(row: np.ndarray) -> np.ndarray:
    """Return the log-probabilities of one row of logits [V] in float64."""
    shifted = row.astype(np.float64) - row.max()
    with np.errstate(divide="ignore"):
        return shifted - math.log(np.exp(shifted).sum())


def softmax(row: np.ndarray) -> np.ndarray:
    """Return the probabilities of one row of logits in float64."""
    return np.exp(log_softmax(row))


def highest(scores: np.ndarray, ids: np.ndarray, count: int) -> np.ndarray:
    """Return positions of the `count` highest scores, best first, ties to the lower id."""
    return np.lexsort((ids, -scores))[:count]


def noisy_row(
    log_probs: np.ndarray, order: np.ndarray, noise: np.ndarray, top_p: float, top_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and scores [K] of one row: the best of the nucleus after noise (Eq. 12-14)."""
    mass = np.exp(log_probs[order].astype(np.float64))
    before = np.cumsum(mass) - mass
    in_nucleus = (before < top_p) | (top_p >= 1.0) | (np.arange(len(order)) < top_k)
    candidates = order[in_nucleus]
    scores = log_probs[candidates] + noise[candidates]
    best = highest(scores, candidates, top_k)
    return candidates[best], scores[best]


def soft_grpo_step(
    row: np.ndarray, order: np.ndarray, noise: np.ndarray, top_p: float, top_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and scores [K] of one row of SofT-GRPO: noise on log(q + 1e-6) of the K most probable tokens.

    Top-k and top-p are thresholds, as in the released code: equal logits are kept or dropped together.
    """
    with np.errstate(invalid="ignore"):
        probs = np.where(row >= row[order[top_k - 1]], np.exp(row - row.max()), 0.0)
    probs = probs / probs.sum()
    for token in order[:top_k]:
        if top_p < 1.0 and row[token] < row.max() and probs[row > row[token]].sum() >= top_p:
            probs = np.where(row <= row[token], 0.0, probs)
            break
    ids = order[:top_k]
    scores = np.log(probs[ids] / probs[ids].sum() + 1e-6) + noise[ids]
    best = highest(scores, ids, top_k)
    return ids[best], scores[best]


def multiplex_step(log_probs: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and scores [K] of one row of Multiplex Thinking: where each draw lies among the cumulative masses."""
    mass, ids = np.exp(log_probs), []
    for draw in draws:
        remainder = draw * mass.sum()
        for token in np.flatnonzero(mass):
            remainder -= mass[token]
            if remainder < 0:
                break
        ids.append(int(token))
    return np.array(ids), log_probs[ids]


def latent_step(
    logits: Tensor,  # [B, V]
    table: Tensor,  # [V, D']
    *,
    top_k: int = 10,
    top_p: float | Tensor = 0.95,
    tau: float | Tensor = 1.0,
    noise: str = "one_sided",
    noise_scale: float | Tensor = 1.0,
    seed: int = 0,
    step: int = 0,
    row_ids: Tensor | None = None,
    exponential: Tensor | None = None,
    latent_mask: Tensor | None = None,
    end_token_id: int | None = None,
    noise_delta: float = 0.0,
    method: str = "latent_grpo",
) -> Step:
    """Return the latent step of logits by the plain rule: a full sort and noise on the whole vocabulary (Eq. 12-14).

    Ties are part of the rule and are decided on rounded numbers. So log-probs, noise and scores are rounded to the
    operator's dtype (float32, or float64 for float64 logits); everything else stays in float64.
    """
    rows, vocab = logits.shape
    dtype = np.float64 if logits.dtype == torch.float64 else np.float32
    stream = range(rows) if row_ids is None else row_ids.tolist()
    injected = exponential is not None
    draws = exponential if injected else exponential_draws(vocab, stream, int(seed), int(step))
    options = zip(*(per_row(value, rows) for value in (top_p, tau, noise_scale)), strict=True)
    shape = (rows, top_k)
    ids, scores, weights = np.zeros(shape, np.int64), np.zeros(shape), np.zeros(shape)
    top_token, is_latent = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.bool)
    for row, (limit, temperature, scale) in enumerate(options):
        values = logits[row].to(torch.float64).numpy()
        log_z = dtype(values.max() + math.log(np.exp(values - values.max()).sum()))
        log_probs = (values.astype(dtype) - log_z).astype(dtype)
        order = highest(values, np.arange(vocab), vocab)
        top_token[row] = int(order[0])
        is_latent[row] = (latent_mask is None or bool(latent_mask[row])) and int(order[0]) != end_token_id
        added = gumbel(draws[row].numpy(), noise) + (noise_delta if noise == "one_sided" else 0.0)
        added = (added * float(dtype(scale))).astype(dtype)
        if not is_latent[row] or (noise == "none" and method != "soft_grpo"):
            ids[row], scores[row], temperature = order[:top_k], log_probs[order[:top_k]], 1.0
        elif method == "soft_grpo":
            ids[row], scores[row] = soft_grpo_step(values, order, added, limit, top_k)
            temperature = 1.0 if noise == "none" else temperature
        elif method == "multiplex":
            uniform = np.exp(-draws[row, :top_k].double().numpy())
            if not injected:
                uniform = uniform_draws(top_k, int(stream[row]), int(seed), int(step))
            ids[row], scores[row] = multiplex_step(values - float(log_z), uniform)
        else:
            ids[row], scores[row] = noisy_row(log_probs, order, added, limit, top_k)
        weights[row] = softmax(scores[row] / temperature)
    kept, shares = torch.from_numpy(ids), torch.from_numpy(weights)
    embedding = mix(kept, shares, table)
    return Step(kept, torch.from_numpy(scores).float(), shares.float(), embedding, top_token, is_latent)


def mix(ids: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    """Return `sum_k weights_k table[ids_k]` [N, D'] in the table's dtype, summed in float64 (Eq. 1)."""
    rows = [weight @ table[row].double() for row, weight in zip(ids, weights, strict=True)]
    return torch.stack(rows).to(table.dtype) if rows else table.new_zeros(0, table.shape[1])


def is_text(ids: Tensor) -> bool:
    """Whether the ids [K] of one row stand for one text token."""
    return UNUSED in ids[1:].tolist()


def mixture(ids: Tensor, scores: Tensor, table: Tensor, tau: float | Tensor = 1.0) -> Tensor:
    """Return the replayed input embeddings [N, D'] in float64; a text row is its token's row of the table (Eq. 1)."""
    out = torch.zeros(len(ids), table.shape[1], dtype=torch.float64)
    for row, temperature in enumerate(per_row(tau, len(ids))):
        if is_text(ids[row]):
            out[row] = table[ids[row, 0]]
            continue
        weights = softmax(scores[row].double().numpy() / temperature)
        for k, weight in zip(ids[row].tolist(), weights.tolist(), strict=True):
            out[row] += weight * table[k].double()
    return out


def mixture_gradients(
    ids: Tensor, scores: Tensor, table: Tensor, tau: float | Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `(mixture * upstream).sum()` in scores [N, K] and table [V, D'], in float64.

    With a_k = <upstream, table[id_k]>, the gradient in score_k is w_k (a_k - sum_j w_j a_j) / tau.
    """
    for_scores, for_table = torch.zeros(scores.shape).double(), torch.zeros(table.shape).double()
    for row, temperature in enumerate(per_row(tau, len(ids))):
        if is_text(ids[row]):
            for_table[ids[row, 0]] += upstream[row].double()
            continue
        weights = torch.from_numpy(softmax(scores[row].double().numpy() / temperature))
        products = table[ids[row]].double() @ upstream[row].double()
        for_scores[row] = weights * (products - weights @ products) / temperature
        for k, weight in zip(ids[row].tolist(), weights.tolist(), strict=True):
            for_table[k] += weight * upstream[row].double()
    return for_scores, for_table


def project_with_noise(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, exponential: Tensor, noise: str, scale: float | Tensor
) -> Tensor:
    """Return `hidden @ weight.T + bias + scale * noise` [B, D'] in float64."""
    out = hidden.double() @ weight.double().T
    if bias is not None:
        out = out + bias.double()
    for row, factor in enumerate(per_row(scale, len(hidden))):
        out[row] += factor * torch.from_numpy(gumbel(exponential[row].numpy(), noise))
    return out


# Log-probs and entropies


def clamp(value: float, low: float, high: float) -> float:
    """Return the nearest number in [low, high]."""
    return min(max(value, low), high)


class RowValues(NamedTuple):
    """A value per row [N] and its gradient in the row's logits [N, V], in float64."""

    value: Tensor
    gradient: Tensor


def margins(row: np.ndarray, ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return d_k = score_k - log p(id_k) [K] of one latent row.

    A target score of -inf is a target of probability zero: it asks for no update, so its margin is 0.
    """
    distance = np.minimum(scores - log_softmax(row)[ids], MARGIN_MAX)
    return np.where(np.isneginf(scores), 0.0, distance)


def coefficient(margin: float, advantage: float | None, margin_gradient: str) -> float:
    """Return c_k, K times the gradient of the surrogate in log p(id_k) (Eq. 15-17).

    Where the policy has passed the target (a negative margin) and the advantage is not positive, "aligned" keeps the
    coefficient positive and "released" keeps it bounded but negative, as the released code does.
    """
    if margin < 0 and advantage is not None and advantage <= 0:
        if margin_gradient == "aligned":
            return -math.expm1(margin)
        if margin_gradient == "released":
            return math.expm1(margin)
    return 1.0 - math.exp(min(-margin, EXPONENT_MAX))


def logprob(
    logits: Tensor,  # [N, V]
    ids: Tensor,  # [N, K]
    scores: Tensor,  # [N, K]
    *,
    temperature: float = 1.0,
    advantages: Tensor | None = None,
    margin_gradient: str = "aligned",
    method: str = "latent_grpo",
) -> RowValues:
    """Return log-probs of text rows and surrogate log-probs of latent rows, with their gradients (Eq. 15-17).

    Text: log_softmax(logits / T)[token]; dlogits = (onehot - softmax) / T.
    Latent: mean_k(-d_k - exp(-d_k)); dlogits = sum_k (c_k / K) onehot(id_k) - (sum_k c_k / K) softmax(logits).
    """
    values, gradients = np.zeros(len(logits)), np.zeros(logits.shape)
    for n, row in enumerate(logits.detach().double().numpy()):
        if is_text(ids[n]):
            token = int(ids[n, 0])
            values[n] = log_softmax(row / temperature)[token]
            gradients[n] = -softmax(row / temperature) / temperature
            gradients[n, token] += 1.0 / temperature
            continue
        places = ids[n].tolist()
        if method != "latent_grpo":
            picked = soft_row if method == "soft_grpo" else multiplex_row
            values[n], gradients[n] = picked(row, places, scores[n].detach().double().tolist())
            continue
        distance = margins(row, ids[n].numpy(), scores[n].detach().double().numpy())
        values[n] = np.mean([-d - math.exp(min(-d, EXPONENT_MAX)) for d in distance])
        advantage = None if advantages is None else float(advantages[n])
        pulls = [coefficient(d, advantage, margin_gradient) / len(places) for d in distance]
        gradients[n] = -sum(pulls) * softmax(row)
        for place, pull in zip(places, pulls, strict=True):  # a repeated id gets the sum
            gradients[n, place] += pull
    return RowValues(torch.from_numpy(values), torch.from_numpy(gradients))


def soft_row(row: np.ndarray, places: list[int], scores: list[float]) -> tuple[float, np.ndarray]:
    """Return the log-prob of one latent row of SofT-GRPO and its gradient [V] (arXiv 2511.06411, as released).

    With q the softmax of the K picked logits, dl_k / dz_j = q_k / (q_k + 1e-6) ((k = j) - q_j) for l = log(q + 1e-6).
    """
    share = softmax(row[places])
    targets = [math.log(q + SOFT_EPSILON) for q in share]
    counted = [k for k, target in enumerate(targets) if target > SOFT_LOGPROB_MIN]
    value, gradient = 0.0, np.zeros(len(row))
    for k in counted:
        distance = scores[k] - targets[k]
        held = clamp(distance, GUMBEL_LOW, GUMBEL_HIGH)
        value += (-held - math.exp(-held)) / len(counted)
        if held == distance:
            pull = (1.0 - math.exp(-held)) / len(counted) * share[k] / (share[k] + SOFT_EPSILON)
            for j, place in enumerate(places):
                gradient[place] += pull * ((j == k) - share[j])
    return value, gradient


def multiplex_row(row: np.ndarray, places: list[int], scores: list[float]) -> tuple[float, np.ndarray]:
    """Return the log-prob of one latent row of Multiplex Thinking, sum_k log p(id_k), and its gradient [V]."""
    value, gradient = 0.0, -len(places) * softmax(row)
    for place in places:
        value += log_softmax(row)[place]
        gradient[place] += 1.0
    return value, gradient


def entropy(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> RowValues:
    """Return the entropy H of softmax(logits / T) in nats on text rows and its gradient -p (log p + H) / T.

    Both are 0 on latent rows. A token of probability zero adds nothing to either.
    """
    values, gradients = np.zeros(len(logits)), np.zeros(logits.shape)
    for n, row in enumerate(logits.detach().double().numpy()):
        if is_text(ids[n]):
            log_probs = log_softmax(row / temperature)
            possible = np.isfinite(log_probs)
            probs = np.exp(log_probs[possible])
            values[n] = -(probs * log_probs[possible]).sum()
            gradients[n, possible] = -probs * (log_probs[possible] + values[n]) / temperature
    return RowValues(torch.from_numpy(values), torch.from_numpy(gradients))
