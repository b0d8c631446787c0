"""The clipped policy loss: golden vectors, the oracle's loop over steps, gradients, masks and statistics."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import tolerances as tol
from support.golden import policy_loss_options
from support.kernels import NEEDS_TRITON, kernel, narrowed, precision, with_kernel
from support.oracle_loss import policy_loss as oracle_loss
from support.policy_losses import assert_same, make_batch
from torch import Tensor

from latent_kernels import PolicyStats, policy_loss
from latent_kernels.reference.loss import policy_loss_ref

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
PUBLIC_AND_REFERENCE = with_kernel(policy_loss, policy_loss_ref)
PUBLIC_AND_TRITON = with_kernel(policy_loss)


@PUBLIC_AND_REFERENCE
@pytest.mark.golden("official_a_policy_loss")
def test_loss_equals_that_of_the_released_code(operator, golden_case):
    logprob = golden_case["logp"].clone().requires_grad_()
    options, kl_coef = policy_loss_options(golden_case)
    inputs = logprob, golden_case["old_logp"], golden_case["advantages"], golden_case["mask"]
    total, stats = operator(*inputs, ref_logprob=golden_case["ref_logp"], kl_coef=kl_coef, **options)
    total.backward()
    torch.testing.assert_close(logprob.grad, golden_case["grad_logp"], rtol=0, atol=tol.GOLDEN_GRADIENT)
    loss, _ = operator(*inputs, **options)
    for actual, name in (
        (total, "total"),
        (loss, "loss"),
        (stats.clip_fraction, "clipfrac"),
        (stats.dual_clip_fraction, "clipfrac_lower"),
        (stats.approx_kl, "approx_kl"),
        (stats.kl, "kl_loss"),
    ):
        torch.testing.assert_close(actual.detach(), golden_case[name], rtol=0, atol=tol.GOLDEN_VALUE, msg=name)


OPTIONS = [
    dict(clip_low=low, clip_high=high, dual_clip=dual, aggregation=aggregation, kl_coef=kl)
    for (low, high), dual, aggregation, kl in itertools.product(
        [(0.2, 0.2), (0.0, 0.28)], [3.0, 1.2, None], AGGREGATIONS, [0.0, 0.1]
    )
]


@PUBLIC_AND_REFERENCE
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_clips_and_aggregations_equal_the_oracle(operator, options):
    expected, stats = assert_same(operator, narrowed(make_batch(), precision(operator)), options)
    assert torch.isnan(stats.margin_crossed)
    assert torch.isnan(stats.entropy)
    assert expected.stats["clip_fraction"] > 0
    assert (expected.stats["dual_clip_fraction"] > 0) == (options["dual_clip"] is not None)


VARIANTS = [
    dict(ratio=ratio, objective=objective, kl_estimator=kl)
    for ratio, objective, kl in itertools.product(("token", "sequence"), ("clip", "cispo"), ("k1", "k2", "k3"))
]
NAMED = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v.values()))


@PUBLIC_AND_REFERENCE
@NAMED
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_ratios_objectives_and_kl_estimators_equal_the_oracle(operator, variant, aggregation):
    options = dict(clip_low=0.1, clip_high=0.2, dual_clip=1.05, aggregation=aggregation, kl_coef=0.1, **variant)
    expected, _ = assert_same(operator, narrowed(make_batch(), precision(operator)), options)
    assert 0 < expected.stats["clip_fraction"] < 1
    assert (expected.stats["dual_clip_fraction"] > 0) == (variant["objective"] == "clip")
    assert (expected.gradient == 0).any()
    assert (expected.gradient != 0).any()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_sequence_ratio_has_the_gradient_of_gspos_loss(aggregation):
    """GSPO's loss has one advantage per response and is differentiated through the ratio: steps share its gradient."""
    batch = make_batch(6, 5)
    logprob, old, advantages, mask = (batch[name] for name in ("logprob", "old_logprob", "advantages", "mask"))
    options = dict(clip_low=0.2, clip_high=0.3, dual_clip=None, aggregation=aggregation)

    def gspo(logprob: Tensor) -> Tensor:
        lengths = mask.sum(-1).double()
        ratio = (((logprob - old) * mask).sum(-1) / lengths.clamp_min(1)).exp()
        loss = torch.maximum(-advantages[:, 0] * ratio, -advantages[:, 0] * ratio.clamp(0.8, 1.3))
        steps = {
            "token-mean": lengths / lengths.sum(),
            "seq-mean-token-sum": lengths / 6,
            "seq-mean-token-mean": (lengths > 0).double() / 6,
            "seq-mean-token-sum-norm": lengths / 6 / 5,
        }[aggregation]
        return (loss * steps).sum()

    logprob.requires_grad_()
    expected, (actual, _) = gspo(logprob), policy_loss(logprob, old, advantages, mask, ratio="sequence", **options)
    gradients = [torch.autograd.grad(value, logprob)[0] for value in (actual, expected)]
    torch.testing.assert_close(actual, expected, rtol=0, atol=tol.FLOAT64)
    torch.testing.assert_close(*gradients, rtol=0, atol=tol.FLOAT64)
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("dual_clip", [3.0, None])
def test_the_gradient_is_that_of_the_value(aggregation, dual_clip, kl_estimator):
    batch = make_batch(3, 4)
    logprob = batch.pop("logprob").requires_grad_()
    options = dict(aggregation=aggregation, dual_clip=dual_clip, kl_coef=0.1, kl_estimator=kl_estimator)
    assert torch.autograd.gradcheck(lambda x: policy_loss(x, **batch, **options)[0], logprob)


@PUBLIC_AND_TRITON
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_low_precision_is_computed_in_float32(operator, dtype, aggregation):
    batch = make_batch(dtype=dtype)
    options = dict(aggregation=aggregation, kl_coef=0.1)
    expected = oracle_loss(**narrowed(batch, torch.float64), **options)
    logprob = batch.pop("logprob").requires_grad_()
    loss, _ = operator(logprob, **batch, **options)
    (gradient,) = torch.autograd.grad(loss, logprob)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    assert loss.item() == pytest.approx(expected.loss, rel=tol.FLOAT32, abs=tol.FLOAT32)
    torch.testing.assert_close(gradient.double(), expected.gradient, rtol=torch.finfo(dtype).eps, atol=tol.FLOAT32)


@PUBLIC_AND_REFERENCE
@pytest.mark.parametrize("junk", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "variant",
    [
        dict(),
        dict(ratio="sequence", kl_bias_correction=True),
        dict(objective="cispo", kl_estimator="k1"),
        dict(objective="vespo"),
    ],
    ids=str,
)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_values_of_masked_steps_are_not_read(operator, junk, aggregation, variant):
    batch = narrowed(make_batch(), precision(operator))
    dirty = {
        name: value if name == "mask" else torch.where(batch["mask"], value, junk) for name, value in batch.items()
    }
    results = []
    for data in (batch, dirty):
        logprob = data.pop("logprob").requires_grad_()
        loss, stats = operator(logprob, **data, aggregation=aggregation, kl_coef=0.1, **variant)
        results.append((loss, torch.autograd.grad(loss, logprob)[0], *stats[:5]))
    for clean, soiled in zip(*results, strict=True):
        assert torch.equal(clean, soiled)
    assert not results[1][1][~batch["mask"]].any()


@PUBLIC_AND_REFERENCE
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("shape", [(4, 5), (0, 5), (4, 0), (1, 1)], ids=str)
def test_a_fully_masked_batch_has_loss_and_gradient_zero(operator, aggregation, shape):
    logprob = torch.randn(shape, requires_grad=True)
    other = torch.full(shape, torch.nan)
    mask = torch.zeros(shape, dtype=torch.bool)
    loss, stats = operator(logprob, other, other, mask, aggregation=aggregation, ref_logprob=other, kl_coef=1.0)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logprob.grad, torch.zeros(shape))
    assert [value.item() for value in stats[:5]] == [0.0] * 5


@PUBLIC_AND_TRITON
def test_a_mask_of_zeros_and_ones_equals_one_of_bools(operator):
    batch = narrowed(make_batch(), precision(operator))
    expected, _ = operator(**batch)
    for dtype in (torch.int64, torch.float32):
        assert torch.equal(operator(**{**batch, "mask": batch["mask"].to(dtype)})[0], expected)


@PUBLIC_AND_TRITON
def test_on_policy_the_gradient_is_minus_the_advantage(operator):
    batch = narrowed(make_batch(), precision(operator))
    logprob = batch["logprob"].requires_grad_()
    mask = batch["mask"]
    loss, stats = operator(logprob, logprob.detach(), batch["advantages"], mask)
    (gradient,) = torch.autograd.grad(loss, logprob)
    expected = -batch["advantages"] * mask / mask.sum()
    torch.testing.assert_close(gradient, expected, rtol=0, atol=tol.EXACT[precision(operator)])
    assert [value.item() for value in stats[:5]] == [0.0] * 5


@PUBLIC_AND_TRITON
@pytest.mark.parametrize("gap", [19.0, 25.0, 1e4, float("inf")])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("variant", [dict(), dict(ratio="sequence"), dict(kl_estimator="k2")], ids=str)
def test_huge_log_ratios_stay_finite(operator, gap, sign, variant):
    logprob = torch.full((1, 2), sign * gap, requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0]])
    zero = torch.zeros(1, 2)
    options = dict(dual_clip=None, ref_logprob=zero, kl_coef=0.1, **variant)
    loss, stats = operator(logprob, zero, advantages, torch.ones(1, 2), **options)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logprob.grad).all()
    expected = oracle_loss(logprob.detach(), zero, advantages, torch.ones(1, 2), **options)
    assert loss.item() == pytest.approx(expected.loss, rel=tol.FLOAT32, abs=tol.FLOAT32)
    torch.testing.assert_close(logprob.grad.double(), expected.gradient, rtol=tol.FLOAT32, atol=tol.FLOAT32)
    assert stats.abs_log_ratio.item() == min(gap, 20.0)
    assert stats.kl.item() <= (200.0 if variant.get("kl_estimator") == "k2" else 10.0)


@given(seed=st.integers(0, 2**31), aggregation=st.sampled_from(AGGREGATIONS))
def test_the_order_of_responses_does_not_matter(seed, aggregation):
    torch.manual_seed(seed)
    batch, order = make_batch(), torch.randperm(10)
    expected = policy_loss(**batch, aggregation=aggregation, kl_coef=0.1)[0]
    shuffled = {name: value[order] for name, value in batch.items()}
    actual = policy_loss(**shuffled, aggregation=aggregation, kl_coef=0.1)[0]
    assert actual.item() == pytest.approx(expected.item(), abs=tol.FLOAT64)


@given(seed=st.integers(0, 2**31), factor=st.sampled_from([0.5, 2.0, 8.0]))
def test_loss_is_linear_in_the_advantages(seed, factor):
    torch.manual_seed(seed)
    batch = make_batch()
    expected = factor * policy_loss(**batch)[0]
    actual = policy_loss(**{**batch, "advantages": factor * batch["advantages"]})[0]
    assert actual.item() == pytest.approx(expected.item(), abs=tol.FLOAT64)


@PUBLIC_AND_TRITON
def test_upstream_scales_calls_accumulate_and_no_grad_records_nothing(operator):
    batch = narrowed(make_batch(), precision(operator))
    logprob = batch.pop("logprob").requires_grad_()
    (once,) = torch.autograd.grad(operator(logprob, **batch)[0], logprob)
    for factor in (2.0, -0.5):
        loss, stats = operator(logprob, **batch)
        (factor * loss).backward()
    torch.testing.assert_close(logprob.grad, 1.5 * once, rtol=0, atol=tol.EXACT[precision(operator)])
    assert not any(value.requires_grad for value in stats)
    with torch.no_grad():
        assert not operator(logprob, **batch)[0].requires_grad


def test_no_gradient_comes_from_the_other_inputs():
    batch = {name: x if name == "mask" else x.clone().requires_grad_() for name, x in make_batch().items()}
    loss, _ = policy_loss(**batch, kl_coef=0.1)
    (gradient,) = torch.autograd.grad(loss, batch["logprob"])
    fixed = {name: value.detach() for name, value in batch.items() if name != "logprob"}
    only_leaf = batch["logprob"].detach().requires_grad_()
    (expected,) = torch.autograd.grad(policy_loss(only_leaf, **fixed, kl_coef=0.1)[0], only_leaf)
    assert torch.equal(gradient, expected)


@PUBLIC_AND_TRITON
def test_strides_of_the_inputs_do_not_matter(operator):
    batch = narrowed(make_batch(), precision(operator))
    strided = {name: value.T.contiguous().T for name, value in batch.items()}
    assert operator(**strided)[0].item() == pytest.approx(operator(**batch)[0].item(), abs=tol.FLOAT64)


@NEEDS_TRITON
@pytest.mark.parametrize("variant", [dict(), dict(ratio="sequence"), dict(objective="cispo")], ids=str)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_kernel_adds_up_several_programs(aggregation, variant):
    batch = narrowed(make_batch(70, 61), torch.float32)
    assert_same(kernel(policy_loss), batch, dict(aggregation=aggregation, kl_coef=0.1, **variant), rtol=tol.FLOAT32)


@NEEDS_TRITON
def test_the_kernel_does_not_hide_nan():
    zero = torch.zeros(2, 2)
    broken = torch.tensor([[torch.nan, 0.0], [0.0, 0.0]], requires_grad=True)
    penalties = (dict(ref_logprob=zero, kl_coef=0.1, kl_estimator=kl) for kl in ("k1", "k2", "k3"))
    objectives = (dict(objective=name) for name in ("cispo", "sapo", "vespo"))
    for options in (dict(), dict(ratio="sequence"), *objectives, *penalties):
        for advantage in (1.0, -1.0):
            loss, _ = kernel(policy_loss)(broken, zero, zero + advantage, torch.ones(2, 2), **options)
            assert torch.isnan(loss)
            (gradient,) = torch.autograd.grad(loss, broken)
            assert torch.isnan(gradient[0, 0])
            assert torch.isfinite(gradient[1]).all()


@NEEDS_TRITON
def test_a_second_derivative_of_the_kernel_raises():
    batch = narrowed(make_batch(), torch.float32)
    logprob = batch.pop("logprob").requires_grad_()
    loss, _ = kernel(policy_loss)(logprob, **batch)
    for total in (loss, loss.square()):  # the upstream gradient is a constant, or has a graph
        (gradient,) = torch.autograd.grad(total, logprob, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


def test_statistics_are_scalars_in_float32():
    _, stats = policy_loss(**make_batch())
    assert isinstance(stats, PolicyStats)
    assert all(value.shape == () and value.dtype == torch.float32 for value in stats)


ZERO = torch.zeros(2, 3)
INVALID = {
    "logprob-shape": (dict(logprob=torch.zeros(3)), ValueError, r"logprob must have shape \[\*, \*\], got \[3\]"),
    "logprob-dtype": (dict(logprob=ZERO.long()), TypeError, "logprob .* got torch.int64"),
    "old-shape": (dict(old_logprob=torch.zeros(2, 4)), ValueError, r"old_logprob .* \[2, 3\], got \[2, 4\]"),
    "old-none": (dict(old_logprob=[0.0]), TypeError, "old_logprob must be a tensor, got list"),
    "advantages-shape": (dict(advantages=torch.zeros(2)), ValueError, r"advantages .* \[2, 3\], got \[2\]"),
    "advantages-device": (dict(advantages=ZERO.to("meta")), ValueError, "advantages is on meta"),
    "mask-shape": (dict(mask=torch.ones(3, 2)), ValueError, r"mask must have shape \[2, 3\], got \[3, 2\]"),
    "ref-shape": (dict(ref_logprob=torch.zeros(1, 3)), ValueError, r"ref_logprob .* got \[1, 3\]"),
    "clip-low": (dict(clip_low=1.5), ValueError, r"clip_low must be in \[0, 1\], got 1.5"),
    "clip-high": (dict(clip_high=-0.1), ValueError, "clip_high .* got -0.1"),
    "dual-clip": (dict(dual_clip=1.0), ValueError, r"dual_clip must be in \(1, inf\], got 1.0"),
    "aggregation": (dict(aggregation="mean"), ValueError, "aggregation must be one of .* got 'mean'"),
    "ratio": (dict(ratio="response"), ValueError, "ratio must be one of 'token', 'sequence', got 'response'"),
    "objective": (dict(objective="ppo"), ValueError, "objective must be one of 'clip', .*'vespo', got 'ppo'"),
    "sapo-pair": (dict(sapo_temperatures=1.0), ValueError, "sapo_temperatures must be a pair .* got 1.0"),
    "sapo-zero": (dict(sapo_temperatures=(0.0, 1.0)), ValueError, "sapo_temperatures .* got 0.0"),
    "vespo-lambda": (dict(vespo_lambda=(1.0, -1.0)), ValueError, "vespo_lambda .* got -1.0"),
    "vespo-k": (dict(vespo_k=(-1.0, 1.0)), ValueError, "vespo_k .* got -1.0"),
    "kl-estimator": (dict(kl_estimator="k4"), ValueError, "kl_estimator must be one of .* got 'k4'"),
    "kl-coef": (dict(kl_coef=-1.0), ValueError, "kl_coef .* got -1.0"),
    "kl-without-ref": (dict(kl_coef=0.1), ValueError, "kl_coef is 0.1, but ref_logprob is None"),
    "impl-bogus": (dict(impl="bogus"), ValueError, "impl must be one of .* got 'bogus'"),
    "impl-triton": (dict(impl="triton"), RuntimeError, "use impl='auto'"),
}


@pytest.mark.parametrize(("change", "error", "message"), INVALID.values(), ids=INVALID)
def test_an_error_names_the_wrong_argument(change, error, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = {"logprob": ZERO, "old_logprob": ZERO, "advantages": ZERO, "mask": ZERO.bool(), **change}
    with pytest.raises(error, match=message):
        policy_loss(**arguments)
