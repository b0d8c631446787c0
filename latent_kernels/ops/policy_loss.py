"""The clipped policy loss on log-probs [R, T] (Eq. 22-23)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latent_kernels._dispatch import on_input_device, resolve
from latent_kernels._loss_types import LossOptions, LossSpec
from latent_kernels._operator import operator
from latent_kernels._types import PolicyStats
from latent_kernels._validate import FLOAT32_MAX, check_choice, check_range, check_tensor
from latent_kernels.reference.latent_step import compute_dtype
from latent_kernels.reference.loss import loss_of_options, response_terms, response_weights

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
RATIOS = ("token", "sequence")
OBJECTIVES = ("clip", "cispo", "sapo", "vespo")
KL_ESTIMATORS = ("k1", "k2", "k3")


def check_loss_options(
    shape: list[int],
    like: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    mask: Tensor,
    ref_logprob: Tensor | None,
    options: LossOptions,
    ratios: tuple[str, ...] = RATIOS,
    components: int = 1,
) -> None:
    """Check the arguments that `policy_loss` and `fused_policy_loss` share; tensors have `shape`, [R, T].

    With ratio="component", log-probs have a third dimension: K components.
    """
    check_choice("ratio", options.ratio, ratios)
    logprob_shape = [*shape, components] if options.ratio == "component" else shape
    check_tensor("old_logprob", old_logprob, logprob_shape, like=like)
    check_tensor("advantages", advantages, shape, like=like)
    if ref_logprob is not None:
        check_tensor("ref_logprob", ref_logprob, logprob_shape, like=like)
    check_tensor("mask", mask, shape, None, like=like)
    check_choice("aggregation", options.aggregation, AGGREGATIONS)
    check_choice("objective", options.objective, OBJECTIVES)
    check_range("clip_low", options.clip_low, 0.0, 1.0)
    check_range("clip_high", options.clip_high, -1.0 if options.objective == "cispo" else 0.0)
    if options.dual_clip is not None:
        check_range("dual_clip", options.dual_clip, 1.0, open_low=True)
    for name in ("sapo_temperatures", "vespo_k", "vespo_lambda"):
        pair = getattr(options, name)
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(f"{name} must be a pair (of positive advantages, of others), got {pair!r}")
        for value in pair:
            check_range(name, value, 0.0, open_low=name != "vespo_k")
    if options.objective == "vespo" and options.ratio == "component":
        raise ValueError("objective 'vespo' weighs responses by their ratio; give ratio 'token' or 'sequence'")
    check_choice("kl_estimator", options.kl_estimator, KL_ESTIMATORS)
    check_range("kl_coef", options.kl_coef, 0.0, FLOAT32_MAX)
    if options.kl_coef and ref_logprob is None:
        raise ValueError(f"kl_coef is {options.kl_coef:g}, but ref_logprob is None; give the reference's log-probs")


def loss_shapes(like: Tensor, *others: Tensor) -> list[Tensor]:
    """Return a loss and the fields of PolicyStats, of any values."""
    loss = like.new_empty((), dtype=compute_dtype(like, *others))
    return [loss, *(like.new_empty((), dtype=torch.float32) for _ in PolicyStats._fields)]


def loss_result(outputs: list[Tensor]) -> tuple[Tensor, PolicyStats]:
    """Return a loss and its statistics from their tensors."""
    return outputs[0], PolicyStats(*outputs[1:])


def _shapes(logprob: Tensor, **_: Any) -> list[Tensor]:
    return loss_shapes(logprob)


@operator(differentiable=("logprob",), shapes=_shapes, result=loss_result)
@on_input_device
def policy_loss(
    logprob: Tensor,  # [R, T]
    old_logprob: Tensor,  # [R, T]
    advantages: Tensor,  # [R, T]
    mask: Tensor,  # [R, T] bool or 0/1
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
    impl: str = "auto",
) -> tuple[Tensor, PolicyStats]:
    """Compute the clipped, dual-clipped policy loss and its statistics (Eq. 22-23).

    With r = exp(clamp(logprob - old_logprob, -20, 20)), a step's loss is l = max(-A r, -A clip(r, 1 - clip_low,
    1 + clip_high)). Where A < 0 it is at most -A dual_clip (None: no bound). kl_coef times an estimate of the KL to the
    reference is added. The aggregate is 0-d, and differentiable in `logprob`.

    Args:
        aggregation: "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", or "seq-mean-token-sum-norm" (Dr. GRPO:
            sums divided by the constant T).
        ratio: "token", or "sequence": r is exp of the response's mean log-ratio, and the gradient of step t is
            A_t r dlogprob_t (GSPO-token, arXiv 2507.18071, 4.3; GSPO itself if A is one number per response).
        objective: "clip", or one of these, which do not read dual_clip.
            "cispo": l = -A stop_gradient(clip(r, 1 - clip_low, 1 + clip_high)) logprob, so that no step loses its
            gradient (arXiv 2506.13585). With clip_low = 1, r has no lower bound. clip_high may be down to -1.
            "sapo": l = -A (4 / t) sigmoid(t (r - 1)), a soft clip (arXiv 2511.20347). t is sapo_temperatures[0] where
            A > 0, else sapo_temperatures[1].
            "vespo": l = -A stop_gradient(phi(w)) logprob with phi(w) = w^k exp(lambda (1 - w)), w being the product of
            the ratios of a response (arXiv 2602.10693). k is vespo_k[0] and lambda is vespo_lambda[0] where A >= 0,
            else the second of each pair.
        kl_bias_correction: multiply the estimate of the KL by r, with its gradient, which makes the gradient that of
            the KL of the policy at hand (arXiv 2512.02556).
        kl_estimator: with g = ref_logprob - logprob clamped to [-20, 20]: "k1" is -g (its gradient has mean zero
            on-policy), "k2" is g^2 / 2, "k3" is exp(g) - g - 1, at most 10 (Schulman 2020).

    Masked steps may hold anything, NaN included. A fully masked batch gives 0.
    Raises ValueError or TypeError naming the argument, and RuntimeError if `impl="triton"` cannot run.
    """
    check_tensor("logprob", logprob, [None, None])
    options = LossOptions(
        clip_low, clip_high, dual_clip, aggregation, ratio, objective, kl_coef, kl_estimator,
        kl_bias_correction, sapo_temperatures, vespo_k, vespo_lambda,
    )  # fmt: skip
    check_loss_options(list(logprob.shape), logprob, old_logprob, advantages, mask, ref_logprob, options)
    if resolve("policy_loss", impl, logprob) == "triton":
        return _with_kernel(logprob, old_logprob, advantages, mask, ref_logprob, options)
    return loss_of_options(logprob, old_logprob, advantages, mask, ref_logprob, options)


def _with_kernel(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    mask: Tensor,
    ref_logprob: Tensor | None,
    options: LossOptions,
) -> tuple[Tensor, PolicyStats]:
    """Run `policy_loss` as a kernel. What it needs per response is computed here, in PyTorch."""
    from latent_kernels._triton.policy_loss import policy_loss_triton

    keep = mask.bool()
    lengths = keep.sum(-1, dtype=torch.float32)
    weights = response_weights(lengths, mask.shape[1], options.aggregation)
    ref = None if ref_logprob is None else ref_logprob.float()
    response = response_terms(logprob.float(), old_logprob.float(), advantages.float(), ref, keep, options)
    spec = LossSpec(old_logprob, response.advantages, ref_logprob, weights, response.log_ratio, response.kl, options)
    return policy_loss_triton(logprob, spec, keep, lengths.sum())
