"""Soft objectives (SAPO, VESPO) and the KL that the ratio weighs, against the oracle and against autograd."""

from __future__ import annotations

import itertools

import pytest
import torch
from support import tolerances as tol
from support.kernels import narrowed, precision, with_kernel
from support.oracle_loss import policy_loss as oracle_loss
from support.policy_losses import assert_same, make_batch
from torch import Tensor

from latent_kernels import policy_loss
from latent_kernels.reference.loss import policy_loss_ref

PUBLIC_AND_REFERENCE = with_kernel(policy_loss, policy_loss_ref)
SOFT_VARIANTS = [
    dict(ratio=ratio, objective=objective, kl_bias_correction=corrected, kl_estimator=kl)
    for ratio, objective, (corrected, kl) in itertools.product(
        ("token", "sequence"), ("clip", "sapo", "vespo"), ((False, "k3"), (True, "k3"), (True, "k1"))
    )
]


@PUBLIC_AND_REFERENCE
@pytest.mark.parametrize("variant", SOFT_VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum"])
def test_soft_objectives_and_corrected_kls_equal_the_oracle(operator, variant, aggregation):
    shape = dict(sapo_temperatures=(1.3, 0.8), vespo_k=(1.5, 2.5), vespo_lambda=(0.7, 0.4))
    options = dict(aggregation=aggregation, kl_coef=0.1, dual_clip=1.5, **variant, **shape)
    batch = make_batch(7, 5)
    batch["old_logprob"] = batch["logprob"] + 0.4 * (batch["old_logprob"] - batch["logprob"])
    batch = narrowed(batch, precision(operator))
    expected, _ = assert_same(operator, batch, options)
    assert (expected.stats["clip_fraction"] > 0) == (variant["objective"] == "clip")
    assert expected.gradient.abs().max() > 1e-3
    for name in ("sapo_temperatures", "vespo_k", "vespo_lambda"):  # each number is read, and only where it belongs
        for i in range(2):
            changed = dict(options, **{name: tuple(x + 0.1 * (i == j) for j, x in enumerate(shape[name]))})
            moves = oracle_loss(**narrowed(batch, torch.float64), **changed).loss != expected.loss
            assert moves == name.startswith(variant["objective"]), (name, i)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_a_corrected_kl_has_the_gradient_of_the_ratio_too(ratio):
    """Autograd through KL times ratio, written out for whole responses: nothing is detached."""
    batch = make_batch(4, 5)
    logprob, old, reference, mask = (batch[name] for name in ("logprob", "old_logprob", "ref_logprob", "mask"))
    old = logprob + 0.3 * (old - logprob)
    lengths = mask.sum(-1, keepdim=True).clamp_min(1)

    def penalty(logprob: Tensor) -> Tensor:
        gap, log_ratio = reference - logprob, logprob - old
        if ratio == "sequence":
            log_ratio = (log_ratio * mask).sum(-1, keepdim=True) / lengths
        return ((gap.exp() - gap - 1) * log_ratio.exp() * mask).sum() / mask.sum()

    options = dict(ratio=ratio, ref_logprob=reference, kl_coef=1.0, kl_bias_correction=True)
    leaf = logprob.requires_grad_()
    actual, stats = policy_loss(leaf, old, torch.zeros_like(old), mask, **options)
    expected = penalty(leaf)
    gradients = [torch.autograd.grad(value, leaf)[0] for value in (actual, expected)]
    torch.testing.assert_close(actual, expected, rtol=0, atol=tol.FLOAT64)
    torch.testing.assert_close(*gradients, rtol=0, atol=tol.FLOAT64)
    assert stats.kl.item() == pytest.approx(expected.item(), abs=tol.FLOAT32)


@pytest.mark.parametrize("options", [dict(objective="sapo"), dict(kl_bias_correction=True)], ids=str)
def test_gradients_of_soft_objectives_are_those_of_the_value(options):
    batch = make_batch(3, 4)
    logprob = batch.pop("logprob").requires_grad_()
    assert torch.autograd.gradcheck(lambda x: policy_loss(x, **batch, kl_coef=0.1, **options)[0], logprob)
