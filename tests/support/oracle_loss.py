"""The oracle of tests/support/oracle.py for whole responses: group advantages and the policy loss, in Python floats."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from support import oracle
from support.oracle import KL_MAX, LOG_RATIO_MAX, STD_EPSILON, clamp

# Group advantages


class Advantages(NamedTuple):
    """Advantages of R responses, with the fields of `GroupAdvantages`."""

    advantages: Tensor
    first_step: Tensor
    group_mean: Tensor
    group_std: Tensor


def group_advantages(
    rewards: Tensor,  # [R]
    group_ids: Tensor,  # [R]
    *,
    invalid_mask: Tensor | None = None,
    mean_logprob: Tensor | None = None,
    invalid: str = "exclude",
    first_token: str = "best_of_correct",
    winner_from: str = "valid",
    normalize_std: bool = True,
) -> Advantages:
    """Return group-relative advantages, one group after the other (Eq. 9-11, 18-21)."""
    size, values, groups = len(rewards), rewards.tolist(), group_ids.tolist()
    broken = [False] * size if invalid_mask is None else invalid_mask.tolist()
    log_probs = [0.0] * size if mean_logprob is None else mean_logprob.tolist()
    advantages, first, means, stds = [0.0] * size, [0.0] * size, [0.0] * size, [1.0] * size
    for group in set(groups):
        members = [i for i in range(size) if groups[i] == group]
        counted = [values[i] for i in members if invalid != "exclude" or not broken[i]]
        mean, std = 0.0, 1.0  # of a group with at most one member that counts
        if len(counted) > 1:
            mean = math.fsum(counted) / len(counted)
            std = math.sqrt(math.fsum((value - mean) ** 2 for value in counted) / (len(counted) - 1))
        scaled = {i: (values[i] - mean) / (std + STD_EPSILON if normalize_std else 1.0) for i in members}
        for i in members:
            means[i], stds[i] = mean, std
            if invalid == "keep" or not broken[i]:
                advantages[i] = scaled[i]
            first[i] = advantages[i]
        correct = [i for i in members if advantages[i] > 0]
        candidates = correct
        if invalid == "zero" and winner_from == "all":  # the winner is picked before the others are set to 0
            candidates = [i for i in members if scaled[i] > 0]
        if first_token == "all" or not candidates:
            continue
        winner = max(candidates, key=lambda i: (log_probs[i], -i))  # a tie goes to the first row
        for i in correct if first_token == "best_of_correct" else members:
            if i != winner:
                first[i] = 0.0
    return Advantages(*(torch.tensor(x, dtype=torch.float32) for x in (advantages, first, means, stds)))


# The policy loss


class PolicyLoss(NamedTuple):
    """A loss, its gradient in the log-probs [R, T] in float64, and its statistics by the names of `PolicyStats`."""

    loss: float
    gradient: Tensor
    stats: dict[str, float]


class Sample(NamedTuple):
    """What the loss of one response step depends on."""

    logprob: float
    old_logprob: float
    advantage: float
    ref_logprob: float | None
    response_ratio: float | None  # of the whole response, where that is what is clipped
    response_kl: float | None = None  # mean of the whole response, where its ratio weighs the KL


def kl(sample: Sample, estimator: str) -> tuple[float, float]:
    """Return the estimate "k1", "k2" or "k3" of KL(policy || reference) at one step and its gradient in the log-prob.

    A clamp that holds the estimate makes its gradient zero.
    """
    assert sample.ref_logprob is not None
    distance = sample.ref_logprob - sample.logprob
    gap, free = clamp(distance, -LOG_RATIO_MAX, LOG_RATIO_MAX), float(abs(distance) <= LOG_RATIO_MAX)
    if estimator == "k1":
        return -gap, free
    if estimator == "k2":
        return gap * gap / 2.0, -gap * free
    value = math.exp(gap) - gap - 1.0
    return min(value, KL_MAX), (1.0 - math.exp(gap)) * free * (value <= KL_MAX)


def own_gap(sample: Sample) -> float:
    """Return the clamped log-ratio of one step."""
    return clamp(sample.logprob - sample.old_logprob, -LOG_RATIO_MAX, LOG_RATIO_MAX)


def own_ratio(sample: Sample) -> tuple[float, bool]:
    """Return the ratio of one step, or of its response, and whether it moves with the log-prob."""
    distance = sample.logprob - sample.old_logprob
    free = abs(distance) <= LOG_RATIO_MAX  # beyond it the clamp makes the gradient of the ratio zero
    if sample.response_ratio is not None:
        return sample.response_ratio, free
    return math.exp(own_gap(sample)), free


def step_loss(
    sample: Sample,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    objective: str,
    sapo_temperatures: tuple[float, float] = (1.0, 1.05),
) -> tuple[float, float, bool, bool]:
    """Return the surrogate of one step, its gradient, and whether the clip and the dual clip hold it (Eq. 22-23).

    The ratio of a response takes the place of the step's own ratio but gives its gradient to the step's log-prob
    (GSPO-token, arXiv 2507.18071, 4.3). With "vespo" the advantage is that times the weight of the response.
    """
    ratio, free = own_ratio(sample)
    advantage, held = sample.advantage, clamp(ratio, 1.0 - clip_low, 1.0 + clip_high)
    if objective == "vespo":
        return -advantage * sample.logprob, -advantage, False, False
    if objective == "sapo":  # sigmoid(x) = (1 + tanh(x / 2)) / 2, whose derivative is 1 / (4 cosh(x / 2)^2)
        t = sapo_temperatures[0] if advantage > 0 else sapo_temperatures[1]
        half = t * (ratio - 1.0) / 2.0
        slope = 0.0 if abs(half) > 300.0 else 1.0 / math.cosh(half) ** 2
        return -advantage * 2.0 * (1.0 + math.tanh(half)) / t, -advantage * slope * ratio * free, False, False
    if objective == "cispo":
        return -advantage * held * sample.logprob, -advantage * held, held != ratio, False
    unclipped, clipped = -advantage * ratio, -advantage * held
    loss, gradient = max(unclipped, clipped), -advantage * ratio * free
    if clipped > unclipped:
        gradient = 0.0
    dual_clipped = dual_clip is not None and advantage < 0 and loss > -advantage * dual_clip
    if dual_clipped:
        loss, gradient = -advantage * float(dual_clip or 0.0), 0.0
    return loss, gradient, clipped > unclipped, dual_clipped


def penalty(sample: Sample, estimator: str, corrected: bool) -> tuple[float, float]:
    """Return the KL term of one step, times the ratio if `corrected`, and its gradient in the log-prob."""
    value, pull = kl(sample, estimator)
    if not corrected:
        return value, pull
    ratio, free = own_ratio(sample)
    return ratio * value, ratio * (pull + free * (value if sample.response_kl is None else sample.response_kl))


def vespo_weight(gap: float, advantage: float, k: tuple[float, float], decay: tuple[float, float]) -> float:
    """Return w^k exp(lambda (1 - w)) for a response whose log-ratios add up to `gap` (arXiv 2602.10693)."""
    w = math.exp(clamp(gap, math.log(1e-8), LOG_RATIO_MAX))
    i = 0 if advantage >= 0 else 1
    return math.pow(w, k[i]) * math.exp(max(decay[i] * (1.0 - w), -700.0))


def samples(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    mask: Tensor,
    ref_logprob: Tensor | None,
    ratio: str,
    estimator: str,
) -> list[list[Sample]]:
    """Return what the loss of every step [R][T] depends on.

    The ratio of a response is (pi(y) / pi_old(y))^(1/|y|) over its active steps, and its KL is the mean over them.
    """
    columns = (x.double().tolist() for x in (logprob, old_logprob, advantages))
    reference = [[None] * mask.shape[1]] * len(mask) if ref_logprob is None else ref_logprob.tolist()
    rows = []
    for *values, active in zip(*columns, reference, mask.tolist(), strict=True):
        row = [Sample(*step, None) for step in zip(*values, strict=True)]
        used = [sample for sample, on in zip(row, active, strict=True) if on]
        if ratio == "sequence":
            whole = math.exp(math.fsum(map(own_gap, used)) / max(len(used), 1))
            row = [sample._replace(response_ratio=whole) for sample in row]
            if ref_logprob is not None:
                mean = math.fsum(kl(sample, estimator)[0] for sample in used) / max(len(used), 1)
                row = [sample._replace(response_kl=mean) for sample in row]
        rows.append(row)
    return rows


def step_weights(mask: Tensor, aggregation: str) -> Tensor:
    """Return the weight of every step [R, T] in the loss, in float64; a masked step has weight 0."""
    rows, steps = mask.shape
    weights = torch.zeros(rows, steps, dtype=torch.float64)
    lengths = [int(row.sum()) for row in mask]
    for i, length in enumerate(lengths):
        if length:
            weights[i, mask[i]] = {
                "token-mean": 1.0 / sum(lengths),
                "seq-mean-token-sum": 1.0 / rows,
                "seq-mean-token-mean": 1.0 / rows / length,
                "seq-mean-token-sum-norm": 1.0 / rows / steps,
            }[aggregation]
    return weights


def policy_loss(
    logprob: Tensor,  # [R, T]
    old_logprob: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = 3.0,
    aggregation: str = "token-mean",
    ratio: str = "token",
    objective: str = "clip",
    ref_logprob: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_bias_correction: bool = False,
    sapo_temperatures: tuple[float, float] = (1.0, 1.05),
    vespo_k: tuple[float, float] = (2.0, 3.0),
    vespo_lambda: tuple[float, float] = (3.0, 2.0),
) -> PolicyLoss:
    """Return the clipped policy loss one step at a time, its gradient in the log-probs and its statistics (Eq. 22-23).

    Statistics are means over the active steps; the KL of `stats` is weighed as the loss is.
    """
    mask = mask.bool()
    rows = samples(logprob, old_logprob, advantages, mask, ref_logprob, ratio, kl_estimator)
    weights, gradient = step_weights(mask, aggregation).tolist(), torch.zeros(mask.shape, dtype=torch.float64)
    means = ("clip_fraction", "dual_clip_fraction", "approx_kl", "abs_log_ratio")
    stats, total = dict.fromkeys((*means, "kl"), 0.0), 0.0
    active = mask.nonzero().tolist()
    for i, t in active:
        sample = rows[i][t]
        if objective == "vespo":
            whole = math.fsum(own_gap(rows[i][s]) for s in range(len(rows[i])) if mask[i, s])
            phi = vespo_weight(whole, sample.advantage, vespo_k, vespo_lambda)
            sample = sample._replace(advantage=sample.advantage * phi)
        loss, pull, clipped, dual_clipped = step_loss(
            sample,
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
            objective=objective,
            sapo_temperatures=sapo_temperatures,
        )
        weight = weights[i][t]
        if sample.ref_logprob is not None:
            term, term_pull = penalty(sample, kl_estimator, kl_bias_correction)
            loss, pull = loss + kl_coef * term, pull + kl_coef * term_pull
            stats["kl"] += weight * term
        total += weight * loss
        gradient[i, t] = weight * pull
        gap = own_gap(sample)
        for name, term in zip(means, (clipped, dual_clipped, -gap, abs(gap)), strict=True):
            stats[name] += term / len(active)
    return PolicyLoss(total, gradient, stats)


# From hidden states to the loss

STATS = ("clip_fraction", "dual_clip_fraction", "approx_kl", "abs_log_ratio", "kl")


class FusedLoss(NamedTuple):
    """A loss, its gradients in hidden [R, T, D] and lm_head [V, D] as float64, and its statistics."""

    loss: float
    hidden: Tensor
    lm_head: Tensor
    stats: dict[str, float]


def fused_policy_loss(
    batch: dict[str, Any],
    *,
    temperature: float = 1.0,
    margin_gradient: str = "aligned",
    method: str = "latent_grpo",
    entropy_coef: float = 0.0,
    dtype: torch.dtype = torch.float64,
    **loss_options: Any,
) -> FusedLoss:
    """Return the loss of a batch of responses and its gradients by the chain rule, over all logits of active steps.

    An entropy bonus takes `entropy_coef` times the mean entropy of the text steps off the loss.
    `dtype` is that of the matrix products: in a coarse one, the result has the least error of a composition of PyTorch
    operations, which rounds logits and their gradient.
    """
    mask = batch["mask"].bool()
    hidden, head = batch["hidden"].detach()[mask].to(dtype), batch["lm_head"].detach().to(dtype)
    ids, scores, advantages = (batch[name][mask] for name in ("ids", "scores", "advantages"))
    logits = hidden @ head.T
    scored = oracle.logprob(
        logits,
        ids,
        scores,
        temperature=temperature,
        advantages=advantages,
        margin_gradient=margin_gradient,
        method=method,
    )
    values = torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, scored.value)
    rest = (batch[name] for name in ("old_logprob", "advantages", "mask"))
    loss, gradient, stats = policy_loss(values, *rest, ref_logprob=batch.get("ref_logprob"), **loss_options)
    dlogits = gradient[mask].unsqueeze(-1) * scored.gradient
    if entropy_coef:
        bonus = oracle.entropy(logits, ids, temperature)
        text = torch.tensor([oracle.is_text(row) for row in ids])
        weights = text.double() / max(int(text.sum()), 1)
        loss -= entropy_coef * float(weights @ bonus.value)
        dlogits = dlogits - entropy_coef * weights.unsqueeze(-1) * bonus.gradient
        stats["entropy"] = float(bonus.value[text].mean())
    for_hidden = torch.zeros(batch["hidden"].shape, dtype=torch.float64)
    for_hidden[mask] = (dlogits.to(dtype) @ head).double()
    return FusedLoss(loss, for_hidden, (dlogits.to(dtype).T @ hidden).double(), stats)


def component_loss(
    batch: dict[str, Any],
    *,
    temperature: float = 1.0,
    aggregation: str = "token-mean",
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_bias_correction: bool = False,
    entropy_coef: float = 0.0,
    **clips: Any,
) -> FusedLoss:
    """Return the loss of Multiplex Thinking with a ratio for each component, its gradients and statistics, in float64.

    A text step has one component. A step weighs what it weighs in `policy_loss`, and so do its components.
    """
    weights = step_weights(batch["mask"].bool(), aggregation)
    logits = batch["hidden"].detach().double() @ batch["lm_head"].detach().double().T
    dlogits, loss, stats, count = torch.zeros_like(logits), 0.0, dict.fromkeys(STATS, 0.0), 0
    for i, t in batch["mask"].nonzero().tolist():
        ids, text = batch["ids"][i, t].tolist(), oracle.is_text(batch["ids"][i, t])
        row = logits[i, t].numpy() / (temperature if text else 1.0)
        for k, place in enumerate(ids[:1] if text else ids):
            old, reference = (float(batch[name][i, t, k]) for name in ("old_logprob", "ref_logprob"))
            logprob = float(oracle.log_softmax(row)[place])
            sample = Sample(logprob, old, float(batch["advantages"][i, t]), reference, None)
            value, pull, clipped, dual_clipped = step_loss(sample, **clips)
            term, term_pull = penalty(sample, kl_estimator, kl_bias_correction)
            weight, gap = float(weights[i, t]), clamp(logprob - old, -LOG_RATIO_MAX, LOG_RATIO_MAX)
            loss += weight * (value + kl_coef * term)
            gradient = -torch.from_numpy(oracle.softmax(row))
            gradient[place] += 1.0
            dlogits[i, t] += weight * (pull + kl_coef * term_pull) / (temperature if text else 1.0) * gradient
            for name, value in zip(STATS, (clipped, dual_clipped, -gap, abs(gap), weight * term), strict=True):
                stats[name] += value
            count += 1
    bonus = oracle.entropy(logits.flatten(0, 1), batch["ids"].flatten(0, 1), temperature)
    text = batch["mask"].bool().flatten() & torch.tensor([oracle.is_text(row) for row in batch["ids"].flatten(0, 1)])
    share = text.double() / max(int(text.sum()), 1)
    loss -= entropy_coef * float(share @ bonus.value)
    dlogits -= entropy_coef * (share.unsqueeze(-1) * bonus.gradient).view_as(dlogits)
    means = {name: value if name == "kl" else value / count for name, value in stats.items()}
    head, states = batch["lm_head"].detach().double(), batch["hidden"].detach().double()
    return FusedLoss(loss, dlogits @ head, dlogits.flatten(0, 1).T @ states.flatten(0, 1), means)


def crossed_share(logits: Tensor, ids: Tensor, scores: Tensor) -> float:
    """Return the share of components of latent rows whose margin is negative."""
    latent = [n for n in range(len(ids)) if not oracle.is_text(ids[n])]
    arrays = (logits.double().numpy(), ids.numpy(), scores.double().numpy())
    crossed = [oracle.margins(*(array[n] for array in arrays)) < 0 for n in latent]
    return sum(int(row.sum()) for row in crossed) / sum(len(row) for row in crossed)
