"""The clipped policy loss on log-probs [R, T] (SPEC 6; Eq. 22-23)."""

from __future__ import annotations

import torch
from torch import Tensor

from latent_kernels._backend import resolve
from latent_kernels._rows import LossSpec
from latent_kernels._types import PolicyStats
from latent_kernels._validate import check_choice, check_range, check_tensor
from latent_kernels.reference import policy_loss_ref, response_weights

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


def check_loss_options(
    shape: list[int],
    like: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    aggregation: str,
    ref_logprob: Tensor | None,
    kl_coef: float,
) -> None:
    """The arguments that `policy_loss` and `fused_policy_loss` share; tensors are [R, T]."""
    for name, value in (("old_logprob", old_logprob), ("advantages", advantages), ("ref_logprob", ref_logprob)):
        if value is not None:
            check_tensor(name, value, shape, like=like)
    check_tensor("mask", mask, shape, None, like=like)
    check_range("clip_low", clip_low, 0.0, 1.0)
    check_range("clip_high", clip_high, 0.0)
    if dual_clip is not None:
        check_range("dual_clip", dual_clip, 1.0, open_low=True)
    check_choice("aggregation", aggregation, AGGREGATIONS)
    check_range("kl_coef", kl_coef, 0.0)
    if kl_coef and ref_logprob is None:
        raise ValueError(f"kl_coef is {kl_coef:g}, but ref_logprob is None; give the reference model's log-probs")


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
    ref_logprob: Tensor | None = None,
    kl_coef: float = 0.0,
    impl: str = "auto",
) -> tuple[Tensor, PolicyStats]:
    """Clipped, dual-clipped surrogate loss, 0-d and differentiable in `logprob`, and its statistics (Eq. 22-23).

    r = exp(clamp(logprob - old_logprob, -20, 20)); l = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), and
    min(l, -A dual_clip) where A < 0 (None: no dual clip); plus kl_coef times the k3 estimate of the KL to ref_logprob.

    aggregation: "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", or "seq-mean-token-sum-norm" (Dr. GRPO: sums
    divided by the constant T). Masked steps may hold anything, NaN included. A fully masked batch gives 0.
    Raises ValueError or TypeError naming the argument; RuntimeError where `impl="triton"` cannot run.
    """
    check_tensor("logprob", logprob, [None, None])
    check_loss_options(
        list(logprob.shape), logprob, old_logprob, advantages, mask, clip_low, clip_high, dual_clip, aggregation,
        ref_logprob, kl_coef,
    )  # fmt: skip
    if resolve("policy_loss", impl, logprob) == "triton":
        from latent_kernels._triton import policy_loss as kernel

        lengths = mask.bool().sum(-1, dtype=torch.float32)
        weights = response_weights(lengths, mask.shape[1], aggregation)
        spec = LossSpec(old_logprob, advantages, ref_logprob, weights, clip_low, clip_high, dual_clip, kl_coef)
        return kernel.policy_loss(logprob, spec, mask.bool(), lengths.sum())
    return policy_loss_ref(
        logprob, old_logprob, advantages, mask, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip,
        aggregation=aggregation, ref_logprob=ref_logprob, kl_coef=kl_coef,
    )  # fmt: skip
