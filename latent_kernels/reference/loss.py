"""Log-probs, advantages and the policy loss in plain PyTorch (Eq. 9-11, 15-23).

Nothing here is fast, and much of it sorts or holds [N, V]. Computation is in float32, or in float64 for float64 inputs.
Equation numbers are those of arXiv 2604.27998.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from latent_kernels._loss_types import LossOptions, ResponseTerms
from latent_kernels._types import GroupAdvantages, PolicyStats
from latent_kernels.reference.latent_step import compute_dtype, has_valid_ids, is_hard

EXPONENT_MAX = 40.0  # exp(40)^2 is finite in float32, so the norm of a gradient with such margins is too
MARGIN_MAX = 1e4  # margin of a target that has probability zero under the policy: large, but finite
LOG_RATIO_MAX = 20.0  # log-ratios are clamped to +- this, so that their exponentials are finite
KL_MAX = 10.0  # largest value of the k3 estimate
VESPO_LOG_RATIO_MIN = math.log(1e-8)  # of a response, as in its authors' code
SOFT_EPSILON = 1e-6  # SofT-GRPO adds it to a probability before the logarithm
SOFT_MARGIN_MIN, SOFT_MARGIN_MAX = -1.5, 3.0  # SofT-GRPO clamps its margins to the range of the clamped noise
SOFT_LOGPROB_MIN = -3.0  # SofT-GRPO leaves out components whose log-prob is not above this
STD_EPSILON = 1e-6  # added to the standard deviation of the rewards (Eq. 9-11)


def margin_coefficients(margin: Tensor, advantages: Tensor | None, margin_gradient: str) -> Tensor:
    """Return c_k [N, K]: K times the gradient of the surrogate in the policy's log-prob of component k (Eq. 15-17)."""
    coefficients = 1.0 - torch.exp(-margin.clamp_min(-EXPONENT_MAX))
    if advantages is None or margin_gradient == "none":
        return coefficients
    # Plain c_k is negative for a negative margin, and would push the component against the sign of the advantage.
    flipped = 1.0 - torch.exp(-margin.abs())
    replaced = flipped if margin_gradient == "aligned" else -flipped
    crossed = (margin < 0) & (advantages <= 0).unsqueeze(-1)
    return torch.where(crossed, replaced, coefficients)


def component_margins(scores: Tensor, log_probs: Tensor) -> Tensor:
    """Return the margins d_k = score_k - lp_k [N, K], at most MARGIN_MAX.

    The margin is 0, which means no update, if the target itself has probability zero.
    """
    return torch.where(torch.isneginf(scores), 0.0, (scores - log_probs).clamp_max(MARGIN_MAX))


def surrogate(margin: Tensor) -> Tensor:
    """Return f [N] = mean_k(-d_k - exp(-d_k)), with an exponent of at most EXPONENT_MAX (Eq. 15)."""
    return (-margin - torch.exp(-margin.clamp_min(-EXPONENT_MAX))).mean(-1)


def used_components(ids: Tensor) -> Tensor:
    """Return which components of rows of ids [N, K] stand for an action, bool: the token alone on a text row."""
    return (torch.arange(ids.shape[-1], device=ids.device) == 0) | ~is_hard(ids).unsqueeze(-1)


def soft_margins(scores: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the margins [N, K] of SofT-GRPO, before their clamp, and which components count (1 or 0).

    The target is log(q + 1e-6), with q the softmax of the K components' logits (or log-probs: log Z cancels).
    """
    target = (logits.softmax(-1) + SOFT_EPSILON).log()
    return scores - target, (target.detach() > SOFT_LOGPROB_MIN).to(target.dtype)


def soft_surrogate(scores: Tensor, logits: Tensor) -> Tensor:
    """Return the log-prob [N] of SofT-GRPO (arXiv 2511.06411, released code): mean of -d_k - exp(-d_k) where it counts.

    It is 0 if no component counts. Autograd gives the released gradient, which is 0 where the clamp holds a margin.
    """
    margin, counts = soft_margins(scores, logits)
    margin = margin.clamp(SOFT_MARGIN_MIN, SOFT_MARGIN_MAX)
    return ((-margin - torch.exp(-margin)) * counts).sum(-1) / counts.sum(-1).clamp_min(1.0)


def latent_logprob_from_logits_ref(
    logits: Tensor,  # [N, V]
    ids: Tensor,  # [N, K]
    scores: Tensor,  # [N, K]
    *,
    temperature: float = 1.0,
    advantages: Tensor | None = None,
    margin_gradient: str = "aligned",
    method: str = "latent_grpo",
    components: bool = False,
) -> Tensor:
    """Return the log-prob of text rows and the (surrogate) log-prob of latent rows, [N] or [N, K] (Eq. 15-17).

    Autograd gives the gradient of docs/method.md, section "Probability of a latent step".
    """
    logits, hard = logits.to(compute_dtype(logits)), is_hard(ids)
    exist, ids = has_valid_ids(ids, logits.shape[1]), ids.clamp(0, logits.shape[1] - 1)
    text = (logits / temperature).log_softmax(-1).gather(-1, ids[:, :1]).squeeze(-1).masked_fill(~exist, torch.nan)
    if method == "soft_grpo":
        # Zeros on text rows: whatever their scores are, 0 times their gradient must be 0.
        picked = logits.gather(-1, ids)
        inputs = (x.masked_fill(hard.unsqueeze(-1), 0.0) for x in (scores.to(logits.dtype), picked))
        return torch.where(hard, text, soft_surrogate(*inputs).masked_fill(~exist, torch.nan))
    log_probs = logits.log_softmax(-1).gather(-1, ids).masked_fill(~exist.unsqueeze(-1), torch.nan)
    if method == "multiplex":
        first = torch.nn.functional.pad(text.unsqueeze(-1), (0, ids.shape[-1] - 1))
        each = torch.where(hard.unsqueeze(-1), first, log_probs).masked_fill(~exist.unsqueeze(-1), torch.nan)
        return each if components else each.sum(-1)
    targets = torch.where(hard.unsqueeze(-1), -torch.inf, scores.to(logits.dtype))  # text rows have none
    margin = component_margins(targets, log_probs).detach()
    coefficients = margin_coefficients(margin, advantages, margin_gradient)
    # Straight-through: the value of the surrogate, with the gradient that the coefficients give. Components with
    # c_k = 0 are masked out of the sum, because the gradient of a log-prob of -inf is NaN.
    reachable = torch.where(coefficients != 0, log_probs, 0.0)
    latent = surrogate(margin) + (coefficients * (reachable - reachable.detach())).mean(-1)
    return torch.where(hard, text, latent.masked_fill(~exist, torch.nan))


def text_entropy_ref(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the entropy [N], in nats, of softmax(logits / T) on text rows of ids [N, K], and 0 on latent rows."""
    log_probs = (logits.to(compute_dtype(logits)) / temperature).log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs.clamp_min(-MARGIN_MAX)).sum(-1)
    return torch.where(is_hard(ids), entropy, 0.0)


def group_advantages_ref(
    rewards: Tensor,  # [R]
    group_ids: Tensor,  # [R]
    *,
    invalid_mask: Tensor | None = None,
    invalid: str = "exclude",
    normalize_std: bool = True,
    mean_logprob: Tensor | None = None,
    first_token: str = "best_of_correct",
    winner_from: str = "valid",
) -> GroupAdvantages:
    """Compute group-relative advantages, one group at a time (Eq. 9-11, 18-21)."""
    rewards = rewards.double()
    is_invalid = torch.zeros_like(rewards, dtype=torch.bool) if invalid_mask is None else invalid_mask.bool()
    advantages, mean, std = torch.zeros_like(rewards), torch.zeros_like(rewards), torch.ones_like(rewards)
    first_step = torch.zeros_like(rewards)
    for group in group_ids.unique():
        member = group_ids == group
        counted = member & ~is_invalid if invalid == "exclude" else member
        if counted.sum() > 1:
            mean[member], std[member] = rewards[counted].mean(), rewards[counted].std()
        scale = std + STD_EPSILON if normalize_std else 1.0
        kept = counted if invalid != "zero" else member & ~is_invalid
        centred = (rewards - mean) / scale
        advantages = torch.where(kept, centred, advantages)
        first = torch.where(member, advantages, 0.0)
        correct = member & (advantages > 0)
        # The winner may be picked before rows are set to 0, but only among rows that the mean counts.
        can_win = counted & (centred > 0) if winner_from == "all" else correct
        if first_token != "all" and can_win.any():
            assert mean_logprob is not None
            candidates = can_win.nonzero().squeeze(-1)  # the mean log-prob of all of them may be -inf
            winner = candidates[mean_logprob[candidates].argmax()]
            losers = (correct if first_token == "best_of_correct" else member).clone()
            losers[winner] = False
            first = first.masked_fill(losers, 0.0)
        first_step = first_step + first
    return GroupAdvantages(advantages.float(), first_step.float(), mean.float(), std.float())


def sequence_log_ratio(logprob: Tensor, old_logprob: Tensor, mask: Tensor) -> Tensor:
    """Return log s [R] of responses: the mean of the clamped log-ratios of their active steps (GSPO, arXiv 2507.18071).

    The inputs are [R, T]. Masked steps may hold anything.
    """
    gaps = torch.where(mask, (logprob - old_logprob).clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX), 0.0)
    return gaps.sum(-1) / mask.sum(-1).clamp_min(1)


def kl_estimate(logprob: Tensor, ref_logprob: Tensor, estimator: str) -> Tensor:
    """Return the estimate "k1", "k2" or "k3" of KL(policy || reference) from samples of the policy; any shape."""
    gap = (ref_logprob - logprob).clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX)
    if estimator == "k1":
        return -gap
    if estimator == "k2":
        return 0.5 * gap.square()
    return (gap.exp() - gap - 1.0).clamp(-KL_MAX, KL_MAX)


def vespo_weights(log_ratio: Tensor, advantages: Tensor, options: LossOptions) -> Tensor:
    """Return phi = w^k exp(lambda (1 - w)) of every step [R, T], w being the ratio of its response (arXiv 2602.10693).

    log_ratio [R]: the sum of the log-ratios of a response; w is at least 1e-8. k and lambda have one value for steps
    with an advantage of 0 or more, and one for the others.
    """
    log_w = log_ratio.clamp(VESPO_LOG_RATIO_MIN, LOG_RATIO_MAX).unsqueeze(-1)
    positive = advantages >= 0
    k, decay = (by_sign(positive, log_w, pair) for pair in (options.vespo_k, options.vespo_lambda))
    return (decay + k * log_w - decay * log_w.exp()).exp()


def by_sign(positive: Tensor, like: Tensor, pair: tuple[float, float]) -> Tensor:
    """Return the first number of the pair where `positive`, else the second, in the dtype of `like`."""
    return torch.where(positive, like.new_full((), pair[0]), like.new_full((), pair[1]))


def response_terms(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    ref_logprob: Tensor | None,
    mask: Tensor,
    options: LossOptions,
) -> ResponseTerms:
    """Return what the loss of steps [R, T] depends on their whole responses for. Masked steps may hold anything."""
    logprob = logprob.detach()
    log_ratio = sequence_log_ratio(logprob, old_logprob, mask) if options.reads_responses else None
    kl = None
    if options.objective == "vespo":
        assert log_ratio is not None
        advantages = advantages * vespo_weights(log_ratio * mask.sum(-1), advantages, options)
    if options.ratio != "sequence":
        log_ratio = None
    elif ref_logprob is not None and options.kl_bias_correction:
        steps = torch.where(mask, kl_estimate(logprob, ref_logprob, options.kl_estimator), 0.0)
        kl = steps.sum(-1) / mask.sum(-1).clamp_min(1)
    return ResponseTerms(advantages, log_ratio, kl)


def token_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    ref_logprob: Tensor | None,
    response_log_ratio: Tensor | None,
    response_kl: Tensor | None,
    options: LossOptions,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of every step with its KL penalty (Eq. 22-23), and the terms of the statistics; any shape.

    `response_log_ratio`, if given, is the mean log-ratio of the step's response. It replaces the value of the step's
    own log-ratio, but not its gradient: s_t = sg[s] pi(t) / sg[pi(t)] (GSPO-token, arXiv 2507.18071, 4.3). With
    "vespo", the advantages are those of `response_terms`.
    """
    own = (logprob - old_logprob).clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX)
    terms = {"approx_kl": -own, "abs_log_ratio": own.abs()}
    log_ratio = own
    if response_log_ratio is not None:
        log_ratio = response_log_ratio.detach() + (own - own.detach())
    ratio = log_ratio.exp()
    if options.objective == "clip":
        loss = _clipped_loss(ratio, advantages, options, terms)
    elif options.objective == "sapo":
        temperature = by_sign(advantages > 0, ratio, options.sapo_temperatures)
        loss = -advantages * torch.sigmoid(temperature * (ratio - 1.0)) * 4.0 / temperature
    elif options.objective == "vespo":
        loss = -advantages * logprob
    else:
        weight = ratio.clamp(1.0 - options.clip_low, 1.0 + options.clip_high).detach()
        loss = -advantages * weight * logprob
        terms["clip_fraction"] = weight != ratio
    if ref_logprob is not None:
        kl = kl_estimate(logprob, ref_logprob, options.kl_estimator)
        if options.kl_bias_correction:
            # The ratio of a response has a gradient at each of its steps, whose KL is in the mean of the response.
            of_ratio = kl if response_kl is None else response_kl
            kl = kl * ratio.detach() + of_ratio.detach() * (ratio - ratio.detach())
        terms["kl"] = kl
        loss = loss + options.kl_coef * kl
    return loss, {name: term.detach().to(loss.dtype) for name, term in terms.items()}


def _clipped_loss(ratio: Tensor, advantages: Tensor, options: LossOptions, terms: dict[str, Tensor]) -> Tensor:
    """Return the clipped, dual-clipped loss of every step (Eq. 22-23), and add to the terms what was clipped."""
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - options.clip_low, 1.0 + options.clip_high)
    loss = torch.maximum(plain, clipped)
    terms["clip_fraction"] = clipped > plain
    if options.dual_clip is not None:
        bound = -advantages * options.dual_clip
        terms["dual_clip_fraction"] = (advantages < 0) & (loss > bound)
        loss = torch.where(advantages < 0, torch.minimum(loss, bound), loss)
    return loss


def response_weights(lengths: Tensor, steps: int, aggregation: str) -> Tensor:
    """Return the weight [R] of each active step of a response, given the numbers [R] of active steps; T = `steps`."""
    if aggregation == "token-mean":
        return (1.0 / lengths.sum().clamp_min(1.0)).expand_as(lengths)
    weights = torch.full_like(lengths, 1.0 / max(len(lengths), 1))
    if aggregation == "seq-mean-token-mean":
        return weights / lengths.clamp_min(1.0)
    return weights / max(steps, 1) if aggregation == "seq-mean-token-sum-norm" else weights


def aggregation_weights(mask: Tensor, aggregation: str) -> Tensor:
    """Return the weight of every step [R, T], 0 where masked. The aggregate is `(weights * loss).sum()`."""
    return mask * response_weights(mask.sum(-1), mask.shape[1], aggregation).unsqueeze(-1)


def policy_stats(terms: dict[str, Tensor], mask: Tensor, weights: Tensor) -> PolicyStats:
    """Return the statistics of the terms of `token_loss`, all [R, T] or all flattened."""
    count = mask.sum().clamp_min(1.0)
    zero = torch.zeros((), dtype=torch.float32, device=mask.device)

    def mean(name: str) -> Tensor:
        return (terms[name] * mask).sum().float() / count if name in terms else zero

    return PolicyStats(
        clip_fraction=mean("clip_fraction"),
        dual_clip_fraction=mean("dual_clip_fraction"),
        approx_kl=mean("approx_kl"),
        abs_log_ratio=mean("abs_log_ratio"),
        kl=(terms["kl"] * weights).sum().float() if "kl" in terms else zero,
        margin_crossed=torch.full_like(zero, torch.nan),
        entropy=torch.full_like(zero, torch.nan),
    )


def policy_loss_ref(
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
) -> tuple[Tensor, PolicyStats]:
    """Compute the clipped, dual-clipped policy loss and its statistics (Eq. 22-23).

    Masked steps may hold anything, NaN included.
    """
    options = LossOptions(
        clip_low, clip_high, dual_clip, aggregation, ratio, objective, kl_coef, kl_estimator,
        kl_bias_correction, sapo_temperatures, vespo_k, vespo_lambda,
    )  # fmt: skip
    return loss_of_options(logprob, old_logprob, advantages, mask, ref_logprob, options)


def loss_of_options(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    mask: Tensor,
    ref_logprob: Tensor | None,
    options: LossOptions,
) -> tuple[Tensor, PolicyStats]:
    """Compute `policy_loss_ref` of tensors [R, T]."""
    dtype = compute_dtype(logprob)
    keep = mask.bool()
    logprob, old_logprob, advantages = (torch.where(keep, x.to(dtype), 0.0) for x in (logprob, old_logprob, advantages))
    if ref_logprob is not None:
        ref_logprob = torch.where(keep, ref_logprob.to(dtype), 0.0)
    response = response_terms(logprob, old_logprob, advantages, ref_logprob, keep, options)
    log_ratio, kl = (None if x is None else x.unsqueeze(-1) for x in response[1:])
    loss, terms = token_loss(logprob, old_logprob, response.advantages, ref_logprob, log_ratio, kl, options)
    weights = aggregation_weights(keep.to(dtype), options.aggregation)
    return (loss * weights).sum(), policy_stats(terms, keep.float(), weights)
