"""The clipped policy loss: golden vectors, a step-by-step brute force, gradients, masks and statistics."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import tolerances as tol
from support.kernels import NEEDS_TRITON, kernel, narrowed, precision, with_kernel
from torch import Tensor

from latent_kernels import PolicyStats, policy_loss
from latent_kernels.reference import policy_loss_ref

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
PUBLIC_AND_REFERENCE = with_kernel(policy_loss, policy_loss_ref)
PUBLIC_AND_TRITON = with_kernel(policy_loss)


def make_batch(rows: int = 10, steps: int = 9, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Log-probs far enough apart that every branch of the loss is taken, ragged masks, one row fully masked."""
    logprob = -2.0 * torch.rand(rows, steps, dtype=torch.float64)
    lengths = torch.arange(rows).view(-1, 1) % (steps + 1)
    advantages = 0.2 + torch.rand(rows, 1)
    advantages[1::2] *= -1.0
    return dict(
        logprob=logprob.to(dtype),
        old_logprob=(logprob + 1.2 * torch.randn(rows, steps)).to(dtype),
        advantages=advantages.expand(rows, steps).to(dtype),
        mask=torch.arange(steps) < lengths,
        ref_logprob=(logprob + 0.8 * torch.randn(rows, steps)).to(dtype),
    )


def by_hand(batch: dict[str, Tensor], options: dict[str, Any]) -> dict[str, float]:
    """SPEC 6 one step at a time in Python's floats."""
    rows, steps = batch["mask"].shape
    cell = {name: value.tolist() for name, value in batch.items()}
    losses, kls = [[0.0] * steps for _ in range(rows)], [[0.0] * steps for _ in range(rows)]
    clipped = held = drift = distance = count = 0.0
    low, high, dual = 1 - options["clip_low"], 1 + options["clip_high"], options["dual_clip"]
    for i, t in itertools.product(range(rows), range(steps)):
        if not cell["mask"][i][t]:
            continue
        advantage = cell["advantages"][i][t]
        gap = min(max(cell["logprob"][i][t] - cell["old_logprob"][i][t], -20.0), 20.0)
        ratio = math.exp(gap)
        if options.get("ratio") == "sequence":
            active = [j for j in range(steps) if cell["mask"][i][j]]
            gaps = [cell["logprob"][i][j] - cell["old_logprob"][i][j] for j in active]
            ratio = math.prod(math.exp(x) for x in gaps) ** (1 / len(gaps))  # (pi(y) / pi_old(y))^(1/|y|)
        if options.get("objective") == "cispo":
            weight = min(max(ratio, low), high)
            loss = -weight * advantage * cell["logprob"][i][t]
            clipped += weight != ratio
        else:
            first, second = -advantage * ratio, -advantage * min(max(ratio, low), high)
            loss = max(first, second)
            clipped += second > first
            if dual is not None and advantage < 0:
                held += loss > -advantage * dual
                loss = min(loss, -advantage * dual)
        if "ref_logprob" in cell:
            away = min(max(cell["ref_logprob"][i][t] - cell["logprob"][i][t], -20.0), 20.0)
            kls[i][t] = {
                "k1": -away, "k2": away**2 / 2, "k3": min(math.exp(away) - away - 1.0, 10.0)
            }[options.get("kl_estimator", "k3")]  # fmt: skip
        losses[i][t] = loss + options["kl_coef"] * kls[i][t]
        drift, distance, count = drift - gap, distance + abs(gap), count + 1

    def aggregate(values: list[list[float]]) -> float:
        sums = [sum(row) for row in values]
        lengths = [max(sum(row), 1) for row in cell["mask"]]
        return {
            "token-mean": sum(sums) / max(count, 1),
            "seq-mean-token-sum": sum(sums) / rows,
            "seq-mean-token-mean": sum(s / n for s, n in zip(sums, lengths, strict=True)) / rows,
            "seq-mean-token-sum-norm": sum(sums) / rows / steps,
        }[options["aggregation"]]

    share = 1.0 / max(count, 1)
    return dict(
        loss=aggregate(losses),
        clip_fraction=clipped * share,
        dual_clip_fraction=held * share,
        approx_kl=drift * share,
        abs_log_ratio=distance * share,
        kl=aggregate(kls),
    )


@PUBLIC_AND_REFERENCE
@pytest.mark.golden("official_a_policy_loss")
def test_golden_vectors(operator, golden_case):
    clip_low, clip_high, dual_clip, kl_coef = golden_case["params"].tolist()
    logprob = golden_case["logp"].clone().requires_grad_()
    options = dict(clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, aggregation=golden_case["mode"])
    inputs = logprob, golden_case["old_logp"], golden_case["advantages"], golden_case["mask"]
    total, stats = operator(*inputs, ref_logprob=golden_case["ref_logp"], kl_coef=kl_coef, **options)
    total.backward()
    torch.testing.assert_close(logprob.grad, golden_case["grad_logp"], rtol=0, atol=tol.GOLDEN_GRADIENT)
    loss, _ = operator(*inputs, **options)
    for got, name in (
        (total, "total"),
        (loss, "loss"),
        (stats.clip_fraction, "clipfrac"),
        (stats.dual_clip_fraction, "clipfrac_lower"),
        (stats.approx_kl, "approx_kl"),
        (stats.kl, "kl_loss"),
    ):
        torch.testing.assert_close(got.detach(), golden_case[name], rtol=0, atol=tol.GOLDEN_VALUE, msg=name)


OPTIONS = [
    dict(clip_low=low, clip_high=high, dual_clip=dual, aggregation=aggregation, kl_coef=kl)
    for (low, high), dual, aggregation, kl in itertools.product(
        [(0.2, 0.2), (0.0, 0.28)], [3.0, 1.2, None], AGGREGATIONS, [0.0, 0.1]
    )
]


@PUBLIC_AND_REFERENCE
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_loss_and_statistics_equal_brute_force(operator, options):
    batch = narrowed(make_batch(), precision(operator))
    expected = by_hand(batch, options)
    loss, stats = operator(**batch, **options)
    assert loss.item() == pytest.approx(expected.pop("loss"), abs=tol.EXACT[precision(operator)])
    for name, value in expected.items():
        assert getattr(stats, name).item() == pytest.approx(value, abs=tol.FLOAT32), name
    assert torch.isnan(stats.margin_crossed)
    assert torch.isnan(stats.entropy)
    assert expected["clip_fraction"] > 0
    assert (expected["dual_clip_fraction"] > 0) == (options["dual_clip"] is not None)


VARIANTS = [
    dict(ratio=ratio, objective=objective, kl_estimator=kl)
    for ratio, objective, kl in itertools.product(("token", "sequence"), ("clip", "cispo"), ("k1", "k2", "k3"))
]
NAMED = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v.values()))


@PUBLIC_AND_REFERENCE
@NAMED
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_ratios_objectives_and_kl_estimators_equal_brute_force(operator, variant, aggregation):
    batch = narrowed(make_batch(), precision(operator))
    options = dict(clip_low=0.1, clip_high=0.2, dual_clip=1.05, aggregation=aggregation, kl_coef=0.1, **variant)
    expected = by_hand(batch, options)
    loss, stats = operator(**batch, **options)
    assert loss.item() == pytest.approx(expected.pop("loss"), abs=tol.EXACT[precision(operator)])
    for name, value in expected.items():
        assert getattr(stats, name).item() == pytest.approx(value, abs=tol.FLOAT32), name
    assert 0 < expected["clip_fraction"] < 1
    assert (expected["dual_clip_fraction"] > 0) == (variant["objective"] == "clip")


def plain_gradient(batch: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    """d loss / d logprob [R, T] as the papers write it, for a token mean."""
    mask, advantages = batch["mask"].double(), batch["advantages"]
    gap = batch["logprob"] - batch["old_logprob"]
    ratio = gap.exp()
    if options["ratio"] == "sequence":
        ratio = ((gap * mask).sum(-1) / mask.sum(-1).clamp_min(1)).exp().unsqueeze(-1).expand_as(gap)
    low, high = 1 - options["clip_low"], 1 + options["clip_high"]
    if options["objective"] == "cispo":
        slope = -advantages * ratio.clamp(low, high)
    else:
        inside = torch.where(advantages > 0, ratio < high, (ratio > low) & (ratio < options["dual_clip"]))
        slope = -advantages * ratio * inside
    away = batch["ref_logprob"] - batch["logprob"]
    penalty = {"k1": torch.ones_like(away), "k2": -away, "k3": 1 - away.exp()}[options["kl_estimator"]]
    return (slope + options["kl_coef"] * penalty) * mask / mask.sum()


@PUBLIC_AND_REFERENCE
@NAMED
def test_gradients_are_those_of_the_papers(operator, variant):
    batch = narrowed(make_batch(), precision(operator))
    options = dict(clip_low=0.1, clip_high=0.2, dual_clip=1.05, kl_coef=0.1, **variant)
    expected = plain_gradient(narrowed(batch, torch.float64), options)
    logprob = batch.pop("logprob").requires_grad_()
    (got,) = torch.autograd.grad(operator(logprob, **batch, **options)[0], logprob)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=tol.EXACT[precision(operator)])
    assert (expected == 0).any()
    assert (expected != 0).any()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_sequence_ratio_has_the_gradient_of_its_own_loss(aggregation):
    """GSPO's loss with one advantage a response, differentiated through the ratio: steps share its gradient."""
    batch = make_batch(6, 5)
    logprob, old, advantages, mask = (batch[name] for name in ("logprob", "old_logprob", "advantages", "mask"))
    options = dict(clip_low=0.2, clip_high=0.3, dual_clip=None, aggregation=aggregation)

    def gspo(logprob: Tensor) -> Tensor:
        lengths = mask.sum(-1).double()
        ratio = (((logprob - old) * mask).sum(-1) / lengths.clamp_min(1)).exp()
        loss = torch.maximum(-advantages[:, 0] * ratio, -advantages[:, 0] * ratio.clamp(0.8, 1.3))
        steps = {
            "token-mean": lengths / lengths.sum(), "seq-mean-token-sum": lengths / 6,
            "seq-mean-token-mean": (lengths > 0).double() / 6, "seq-mean-token-sum-norm": lengths / 6 / 5,
        }[aggregation]  # fmt: skip
        return (loss * steps).sum()

    logprob.requires_grad_()
    expected, (got, _) = gspo(logprob), policy_loss(logprob, old, advantages, mask, ratio="sequence", **options)
    gradients = [torch.autograd.grad(value, logprob)[0] for value in (got, expected)]
    torch.testing.assert_close(got, expected, rtol=0, atol=tol.FLOAT64)
    torch.testing.assert_close(*gradients, rtol=0, atol=tol.FLOAT64)
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("dual_clip", [3.0, None])
def test_gradcheck(aggregation, dual_clip, kl_estimator):
    batch = make_batch(3, 4)
    logprob = batch.pop("logprob").requires_grad_()
    options = dict(aggregation=aggregation, dual_clip=dual_clip, kl_coef=0.1, kl_estimator=kl_estimator)
    assert torch.autograd.gradcheck(lambda x: policy_loss(x, **batch, **options)[0], logprob)


@PUBLIC_AND_TRITON
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_low_precision_is_computed_in_float32(operator, dtype, aggregation):
    batch = make_batch(dtype=dtype)
    exact = narrowed(batch, torch.float64)
    losses, gradients = [], []
    for run, data in ((operator, batch), (policy_loss_ref, exact)):
        data["logprob"] = data["logprob"].requires_grad_()
        loss, _ = run(**data, aggregation=aggregation, kl_coef=0.1)
        losses.append(loss)
        gradients.append(torch.autograd.grad(loss, data["logprob"])[0])
    assert losses[0].dtype == torch.float32
    torch.testing.assert_close(losses[0].double(), losses[1], rtol=tol.FLOAT32, atol=tol.FLOAT32)
    assert gradients[0].dtype == dtype
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=torch.finfo(dtype).eps, atol=tol.FLOAT32)


@PUBLIC_AND_REFERENCE
@pytest.mark.parametrize("junk", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "variant", [dict(), dict(ratio="sequence"), dict(objective="cispo", kl_estimator="k1")], ids=str
)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_masked_steps_may_hold_anything(operator, junk, aggregation, variant):
    batch = narrowed(make_batch(), precision(operator))
    dirty = {n: v if n == "mask" else torch.where(batch["mask"], v, junk) for n, v in batch.items()}
    results = []
    for data in (batch, dirty):
        logprob = data.pop("logprob").requires_grad_()
        loss, stats = operator(logprob, **data, aggregation=aggregation, kl_coef=0.1, **variant)
        results.append((loss, torch.autograd.grad(loss, logprob)[0], *stats[:5]))
    for clean, soiled in zip(*results, strict=True):
        assert torch.equal(clean, soiled)
    assert torch.equal(results[1][1][~batch["mask"]], torch.zeros_like(results[1][1][~batch["mask"]]))


@PUBLIC_AND_REFERENCE
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("shape", [(4, 5), (0, 5), (4, 0), (1, 1)], ids=str)
def test_a_fully_masked_batch_gives_zero(operator, aggregation, shape):
    logprob = torch.randn(shape, requires_grad=True)
    other = torch.full(shape, torch.nan)
    mask = torch.zeros(shape, dtype=torch.bool)
    loss, stats = operator(logprob, other, other, mask, aggregation=aggregation, ref_logprob=other, kl_coef=1.0)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logprob.grad, torch.zeros(shape))
    assert [value.item() for value in stats[:5]] == [0.0] * 5


@PUBLIC_AND_TRITON
def test_mask_of_zeros_and_ones_equals_bool(operator):
    batch = narrowed(make_batch(), precision(operator))
    expected, _ = operator(**batch)
    for dtype in (torch.int64, torch.float32):
        assert torch.equal(operator(**{**batch, "mask": batch["mask"].to(dtype)})[0], expected)


@PUBLIC_AND_TRITON
def test_on_policy_the_gradient_is_the_advantage(operator):
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
    wide = logprob.detach().double().requires_grad_()
    policy_loss_ref(wide, zero, advantages, torch.ones(1, 2), **options)[0].backward()
    torch.testing.assert_close(logprob.grad.double(), wide.grad, rtol=tol.FLOAT32, atol=tol.FLOAT32)
    assert stats.abs_log_ratio.item() == min(gap, 20.0)
    assert stats.kl.item() <= (200.0 if variant.get("kl_estimator") == "k2" else 10.0)


@given(seed=st.integers(0, 2**31), aggregation=st.sampled_from(AGGREGATIONS))
def test_rows_may_come_in_any_order(seed, aggregation):
    torch.manual_seed(seed)
    batch, order = make_batch(), torch.randperm(10)
    expected = policy_loss(**batch, aggregation=aggregation, kl_coef=0.1)[0]
    shuffled = {name: value[order] for name, value in batch.items()}
    got = policy_loss(**shuffled, aggregation=aggregation, kl_coef=0.1)[0]
    assert got.item() == pytest.approx(expected.item(), abs=tol.FLOAT64)


@given(seed=st.integers(0, 2**31), factor=st.sampled_from([0.5, 2.0, 8.0]))
def test_loss_is_linear_in_the_advantages(seed, factor):
    torch.manual_seed(seed)
    batch = make_batch()
    expected = factor * policy_loss(**batch)[0]
    got = policy_loss(**{**batch, "advantages": factor * batch["advantages"]})[0]
    assert got.item() == pytest.approx(expected.item(), abs=tol.FLOAT64)


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


def test_no_gradient_reaches_what_is_held_fixed():
    batch = {n: v.clone().requires_grad_() if n != "mask" else v for n, v in make_batch().items()}
    loss, _ = policy_loss(**batch, kl_coef=0.1)
    (gradient,) = torch.autograd.grad(loss, batch["logprob"])
    fixed = {n: v.detach() for n, v in batch.items() if n != "logprob"}
    alone = batch["logprob"].detach().requires_grad_()
    (expected,) = torch.autograd.grad(policy_loss(alone, **fixed, kl_coef=0.1)[0], alone)
    assert torch.equal(gradient, expected)


@PUBLIC_AND_TRITON
def test_strided_inputs_equal_contiguous_ones(operator):
    batch = narrowed(make_batch(), precision(operator))
    strided = {name: value.T.contiguous().T for name, value in batch.items()}
    assert operator(**strided)[0].item() == pytest.approx(operator(**batch)[0].item(), abs=tol.FLOAT64)


@NEEDS_TRITON
@pytest.mark.parametrize("variant", [dict(), dict(ratio="sequence"), dict(objective="cispo")], ids=str)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_kernel_equals_the_reference_over_several_programs(aggregation, variant):
    batch = narrowed(make_batch(70, 61), torch.float32)
    results = []
    for operator, data in ((kernel(policy_loss), batch), (policy_loss_ref, narrowed(batch, torch.float64))):
        logprob = data.pop("logprob").requires_grad_()
        loss, stats = operator(logprob, **data, aggregation=aggregation, kl_coef=0.1, **variant)
        results.append((loss.detach(), *torch.autograd.grad(loss, logprob), *stats[:5]))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected.to(got.dtype), rtol=tol.FLOAT32, atol=tol.FLOAT32)


@NEEDS_TRITON
def test_not_a_number_is_not_hidden_by_the_kernel():
    zero = torch.zeros(2, 2)
    broken = torch.tensor([[torch.nan, 0.0], [0.0, 0.0]], requires_grad=True)
    penalties = (dict(ref_logprob=zero, kl_coef=0.1, kl_estimator=kl) for kl in ("k1", "k2", "k3"))
    for options in (dict(), dict(ratio="sequence"), dict(objective="cispo"), *penalties):
        for advantage in (1.0, -1.0):
            loss, _ = kernel(policy_loss)(broken, zero, zero + advantage, torch.ones(2, 2), **options)
            assert torch.isnan(loss)
            (gradient,) = torch.autograd.grad(loss, broken)
            assert torch.isnan(gradient[0, 0])
            assert torch.isfinite(gradient[1]).all()


@NEEDS_TRITON
def test_the_kernels_gradient_cannot_be_differentiated():
    batch = narrowed(make_batch(), torch.float32)
    logprob = batch.pop("logprob").requires_grad_()
    loss, _ = kernel(policy_loss)(logprob, **batch)
    (gradient,) = torch.autograd.grad(loss.square(), logprob, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_statistics_are_0_d_float32():
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
    "objective": (dict(objective="ppo"), ValueError, "objective must be one of 'clip', 'cispo', got 'ppo'"),
    "kl-estimator": (dict(kl_estimator="k4"), ValueError, "kl_estimator must be one of .* got 'k4'"),
    "kl-coef": (dict(kl_coef=-1.0), ValueError, "kl_coef .* got -1.0"),
    "kl-without-ref": (dict(kl_coef=0.1), ValueError, "kl_coef is 0.1, but ref_logprob is None"),
    "impl-bogus": (dict(impl="bogus"), ValueError, "impl must be one of .* got 'bogus'"),
    "impl-triton": (dict(impl="triton"), RuntimeError, "use impl='auto'"),
}


@pytest.mark.parametrize(("change", "error", "message"), INVALID.values(), ids=INVALID)
def test_wrong_arguments_are_named(change, error, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = {"logprob": ZERO, "old_logprob": ZERO, "advantages": ZERO, "mask": ZERO.bool(), **change}
    with pytest.raises(error, match=message):
        policy_loss(**arguments)
