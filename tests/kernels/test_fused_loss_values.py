"""Hidden states to policy loss in one pass: values, gradients and statistics against the oracle and its two parts."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support import tolerances as tol
from support.fused_losses import AGGREGATIONS, assert_equals_the_oracle, make_batch, run
from support.kernels import narrowed, precision, with_kernel
from support.oracle_loss import crossed_share
from support.oracle_loss import fused_policy_loss as oracle_fused_loss
from torch import Tensor

from latent_kernels import PolicyStats, fused_policy_loss, latent_logprob, policy_loss

FUSED = with_kernel(fused_policy_loss)


def composition(hidden: Tensor, lm_head: Tensor, *, temperature: float, **batch: Any) -> tuple[Tensor, PolicyStats]:
    """Return what the two operators give after one another."""
    shape = batch["mask"].shape
    flat = (batch.pop(name).flatten(0, 1) for name in ("ids", "scores"))
    options = dict(advantages=batch["advantages"].flatten())
    if "margin_gradient" in batch:
        options["margin_gradient"] = batch.pop("margin_gradient")
    logprob = latent_logprob(hidden.flatten(0, 1), lm_head, *flat, temperature=temperature, **options)
    return policy_loss(logprob.view(shape), **batch)


OPTIONS = (
    [
        dict(aggregation=aggregation, margin_gradient=mode, dual_clip=dual, kl_coef=kl)
        for aggregation, (mode, dual, kl) in itertools.product(
            AGGREGATIONS, [("aligned", 3.0, 0.0), ("released", 1.2, 0.1), ("none", None, 0.5)]
        )
    ]
    + [
        dict(ratio=ratio, objective=objective, kl_estimator=kl, kl_coef=0.1)
        for ratio, objective, kl in itertools.product(("token", "sequence"), ("clip", "cispo"), ("k1", "k2", "k3"))
    ]
    + [
        dict(ratio=ratio, objective=objective, kl_bias_correction=corrected, kl_coef=0.1 * corrected)
        for ratio, objective, corrected in itertools.product(
            ("token", "sequence"), ("clip", "sapo", "vespo"), (False, True)
        )
        if objective != "clip" or corrected
    ]
)


NAMED_OPTIONS = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))


@FUSED
@NAMED_OPTIONS
def test_loss_and_gradients_equal_the_oracle(operator, options, make_trajectory):
    batch = narrowed(make_batch(make_trajectory), precision(operator))
    options = dict(options, temperature=0.7, clip_low=0.1, clip_high=0.3)
    actual, _ = assert_equals_the_oracle(operator, batch, **options)
    assert (actual.stats.clip_fraction > 0) == (options.get("objective", "clip") in ("clip", "cispo"))
    assert (actual.stats.kl != 0).item()


@NAMED_OPTIONS
def test_one_pass_equals_log_probs_and_then_their_loss(options, make_trajectory):
    batch = make_batch(make_trajectory)
    options = dict(options, temperature=0.7, clip_low=0.1, clip_high=0.3)
    actual, expected = (run(operator, batch, **options) for operator in (fused_policy_loss, composition))
    for result, part in zip(actual[:3], expected[:3], strict=True):
        torch.testing.assert_close(result, part, rtol=0, atol=tol.FLOAT64)
    for result, part in zip(actual.stats[:5], expected.stats[:5], strict=True):
        torch.testing.assert_close(result, part, rtol=0, atol=tol.FLOAT32)


@pytest.mark.parametrize(
    "case",
    [
        dict(shape=(1, 1)),
        dict(shape=(1, 9), vocab=17, top_k=1),
        dict(shape=(3, 5), vocab=31, top_k=31),
        dict(shape=(2, 7), vocab=4099, top_k=10),
    ],
    ids=["one-step", "one-row-vocab-17-k-1", "k-is-vocab-31", "vocab-4099"],
)
@FUSED
def test_odd_sizes_equal_the_oracle(operator, case, make_trajectory):
    batch = narrowed(make_batch(make_trajectory, **case), precision(operator))
    batch["mask"][:] = True
    batch["advantages"][:] = 1.0
    options = dict(clip_low=1.0, clip_high=1e3)  # nothing is clipped
    actual = run(operator, batch, **options)
    expected = oracle_fused_loss(narrowed(batch, torch.float64), **options)
    rtol = tol.EXACT[precision(operator)]
    assert actual.loss.item() == pytest.approx(expected.loss, rel=rtol, abs=tol.FLOAT32)
    for name in ("hidden", "lm_head"):
        gradients = getattr(actual, name).double(), getattr(expected, name)
        torch.testing.assert_close(*gradients, rtol=rtol, atol=tol.FLOAT32)
    assert actual.hidden.abs().max() > 0


@FUSED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_error_is_bounded_by_a_compositions(operator, dtype, aggregation, make_trajectory):
    batch = make_batch(make_trajectory, vocab=1000, top_k=10, width=64, dtype=dtype)
    options = dict(aggregation=aggregation, temperature=0.8)
    actual = run(operator, batch, **options)
    exact, composed = (oracle_fused_loss(batch, dtype=at, **options) for at in (torch.float64, dtype))
    assert [part.dtype for part in actual[:3]] == [torch.float32, dtype, dtype]
    for name in ("loss", "hidden", "lm_head"):
        value, composed_value, truth = (
            torch.as_tensor(getattr(part, name)).double() for part in (actual, composed, exact)
        )
        scale = max(1.0, truth.abs().max().item())
        error, allowed = ((part - truth).abs().max().item() for part in (value, composed_value))
        assert error <= tol.ERROR_FACTOR * allowed + tol.ERROR_FLOOR[dtype] * scale, name


@pytest.mark.parametrize(("margins", "mode"), [("positive", "aligned"), ("mixed", "none")], ids=lambda p: p)
def test_gradients_are_those_of_the_value(margins, mode, make_trajectory):
    batch = make_batch(make_trajectory, (2, 3), vocab=11, top_k=3, width=4, margins=margins)
    batch["mask"][:] = True
    leaves = batch.pop("hidden").requires_grad_(), batch.pop("lm_head").requires_grad_()
    options = dict(margin_gradient=mode, kl_coef=0.1, temperature=0.8)
    assert torch.autograd.gradcheck(lambda h, w: fused_policy_loss(h, w, **batch, **options)[0], leaves)


@FUSED
def test_statistics_count_the_crossed_margins(operator, make_trajectory):
    batch = narrowed(make_batch(make_trajectory), precision(operator))
    # Steps without an advantage are left out of the statistics, so every step gets a little.
    batch["advantages"] = torch.where(batch["advantages"] == 0, 0.01, batch["advantages"])
    _, stats = operator(**batch)
    mask = batch["mask"]
    logits = batch["hidden"][mask].double() @ batch["lm_head"].double().T
    expected = crossed_share(logits, batch["ids"][mask], batch["scores"][mask])
    assert 0.1 < expected < 0.9
    assert stats.margin_crossed.item() == pytest.approx(expected, abs=tol.FLOAT32)
    assert isinstance(stats, PolicyStats)
    assert all(value.shape == () and value.dtype == torch.float32 for value in stats)
    assert not any(value.requires_grad for value in stats)


@FUSED
def test_margins_are_nan_where_no_step_is_latent(operator, make_trajectory):
    batch = narrowed(make_batch(make_trajectory), precision(operator))
    batch["ids"][..., 1:] = -100
    assert torch.isnan(operator(**batch)[1].margin_crossed)


def padded(value: Tensor, rows: int, steps: int) -> Tensor:
    """Return zeros [rows, steps, ...] with the tensor [r, t, ...] in the first corner."""
    out = value.new_zeros(rows, steps, *value.shape[2:])
    out[: value.shape[0], : value.shape[1]] = value
    return out


@FUSED
def test_float16_gradients_keep_their_bits_in_a_large_batch(operator, make_trajectory):
    small = make_batch(make_trajectory, (2, 4), dtype=torch.float16)
    small["mask"][:] = True
    # A step's weight is 1 / (512 * 1024): times it, float16 would hold gradients of one to three bits.
    large = {name: value if name == "lm_head" else padded(value, 512, 1024) for name, value in small.items()}
    options = dict(aggregation="seq-mean-token-sum-norm", clip_low=1.0, clip_high=1e3)
    leaves = [large[name].requires_grad_() for name in ("hidden", "lm_head")]
    loss, _ = operator(**large, **options)
    for_hidden, for_head = torch.autograd.grad(loss * 2.0**19, leaves)  # the loss scale of float16
    exact = oracle_fused_loss(small, **options)  # its steps weigh 1 / (2 * 4)
    for actual, expected in ((for_hidden[:2, :4], 8.0 * exact.hidden), (for_head, 8.0 * exact.lm_head)):
        tolerance = tol.ERROR_FLOOR[torch.float16] * expected.abs().max().item()
        torch.testing.assert_close(actual.double(), expected, rtol=tol.ERROR_FLOOR[torch.float16], atol=tolerance)
