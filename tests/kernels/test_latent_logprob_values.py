"""Values and gradients of log-probs of text and latent rows: golden vectors, the oracle, errors in every dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import oracle
from support import tolerances as tol
from support.kernels import narrowed, precision, with_kernel
from support.logprobs import (
    MARGIN_GRADIENTS,
    assert_error_is_like_a_compositions,
    from_hidden,
    oracle_from_hidden,
    value_and_gradients,
)
from torch import Tensor

from latent_kernels import latent_logprob, latent_logprob_from_logits
from latent_kernels.reference.loss import latent_logprob_from_logits_ref

PUBLIC_AND_REFERENCE = with_kernel(latent_logprob_from_logits, latent_logprob_from_logits_ref)
FROM_LOGITS = with_kernel(latent_logprob_from_logits)
FROM_HIDDEN = with_kernel(latent_logprob)


def assert_equals_the_oracle(operator: Any, data: Any, ids: Tensor, upstream: Tensor, **options: Any) -> None:
    """Value and gradient are exact in the dtype that the operator computes in."""
    value, gradient = value_and_gradients(
        lambda logits: operator(logits, ids, data.scores, **options), data.logits, upstream=upstream
    )
    expected = oracle.logprob(data.logits, ids, data.scores, **options)
    exact = dict(rtol=0, atol=tol.EXACT[precision(operator)])
    torch.testing.assert_close(value.double(), expected.value, **exact)
    torch.testing.assert_close(gradient.double(), upstream.double().unsqueeze(-1) * expected.gradient, **exact)


@PUBLIC_AND_REFERENCE
@pytest.mark.golden("official_a_logp")
def test_log_probs_equal_those_of_the_released_code(operator, golden_case):
    ids, scores, temperature = golden_case["ids"], golden_case["scores"], float(golden_case["temperature"])
    hard = golden_case["hard"]
    assert hard.any()
    assert not hard.all()
    assert torch.equal(ids[hard, 0], golden_case["labels"][hard])

    def logprob(logits: Tensor, **options: Any) -> Tensor:
        return operator(logits, ids, scores, temperature=temperature, **options)

    value, gradient = value_and_gradients(
        lambda logits: logprob(logits, advantages=golden_case["advantages"], margin_gradient="released"),
        golden_case["logits"],
        upstream=golden_case["upstream"],
    )
    torch.testing.assert_close(value, golden_case["logp"], rtol=0, atol=tol.GOLDEN_VALUE)
    torch.testing.assert_close(gradient, golden_case["grad_logits"], rtol=0, atol=tol.GOLDEN_GRADIENT)
    torch.testing.assert_close(logprob(golden_case["logits"]), golden_case["logp_noadv"], rtol=0, atol=tol.GOLDEN_VALUE)


@PUBLIC_AND_REFERENCE
@pytest.mark.parametrize("mode", MARGIN_GRADIENTS)
@pytest.mark.parametrize("with_advantages", [True, False], ids=["advantages", "no-advantages"])
@pytest.mark.parametrize("shape", [(12, 33, 4), (1, 17, 1), (5, 31, 31), (9, 1000, 10)], ids=str)
def test_value_and_gradient_equal_the_oracle(operator, mode, with_advantages, shape, make_trajectory):
    data = narrowed(make_trajectory(*shape), precision(operator))
    advantages = data.advantages if with_advantages else None
    options = dict(temperature=0.7, advantages=advantages, margin_gradient=mode)
    assert_equals_the_oracle(operator, data, data.ids, torch.randn(shape[0]), **options)


def coefficients_of(mode: str, advantage: float, margin: float) -> float:
    """Return the coefficient c_1 of a row with one component, read off the operator's gradient."""
    logits = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    scores = logits.detach().log_softmax(-1)[:, :1] + margin
    advantages = torch.tensor([advantage], dtype=torch.float64)
    value = latent_logprob_from_logits(
        logits, torch.zeros(1, 1, dtype=torch.int64), scores, advantages=advantages, margin_gradient=mode
    )
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    return (gradient[0, 0] - gradient[0, 1]).item()


@pytest.mark.parametrize("margin", [-0.7, 0.7])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("mode", MARGIN_GRADIENTS)
def test_coefficient_of_each_mode_by_hand(mode, advantage, margin):
    kept = 1.0 - 2.718281828459045**-margin
    flipped = {"aligned": 1.0 - 2.718281828459045**-0.7, "released": 2.718281828459045**-0.7 - 1.0, "none": kept}[mode]
    expected = flipped if margin < 0 and advantage <= 0 else kept
    assert coefficients_of(mode, advantage, margin) == pytest.approx(expected, abs=tol.FLOAT64)


def test_aligned_coefficients_push_a_negative_advantage_down():
    assert coefficients_of("aligned", -1.0, -0.7) > 0 > coefficients_of("released", -1.0, -0.7)


@FROM_LOGITS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_sign_of_an_advantage_is_read_in_any_dtype(operator, dtype, make_trajectory):
    data = narrowed(make_trajectory(margins="mixed"), precision(operator))
    assert (data.advantages < 0).any()
    gradients = []
    for advantages in (data.advantages, data.advantages.to(dtype)):
        logits = data.logits.clone().requires_grad_()
        operator(logits, data.ids, data.scores, advantages=advantages).sum().backward()
        gradients.append(logits.grad)
    assert torch.equal(*gradients)


@PUBLIC_AND_REFERENCE
def test_gradients_of_duplicate_ids_add_up(operator, make_trajectory):
    data = narrowed(make_trajectory(6, 33, 4, text_rows=False), precision(operator))
    ids = data.ids.clone()
    ids[:, 2] = ids[:, 0]
    ids[:3, 3] = ids[:3, 0]
    assert_equals_the_oracle(operator, data, ids, torch.ones(6))


@FROM_LOGITS
def test_temperature_changes_text_rows_only(operator, make_trajectory):
    data = narrowed(make_trajectory(), precision(operator))
    hard = data.ids[:, 1] == -100
    cool, warm = (operator(*data[:3], temperature=t) for t in (0.5, 2.0))
    assert torch.equal(cool[~hard], warm[~hard])
    assert (cool[hard] != warm[hard]).all()


@pytest.mark.parametrize(
    ("margins", "mode"), [("positive", "aligned"), ("positive", "released"), ("mixed", "none")], ids=lambda p: p
)
def test_the_gradient_in_logits_is_that_of_the_value(margins, mode, make_trajectory):
    data = make_trajectory(6, 11, 3, margins=margins)
    options = dict(temperature=0.8, advantages=data.advantages, margin_gradient=mode)
    logits = data.logits.clone().requires_grad_()
    for operator in (latent_logprob_from_logits, latent_logprob_from_logits_ref):
        # The reference is straight-through: it holds its margins fixed, so gradcheck sees another value than its own.
        if operator is latent_logprob_from_logits_ref and margins == "mixed":
            continue
        assert torch.autograd.gradcheck(lambda z, f=operator: f(z, data.ids, data.scores, **options), logits)


@pytest.mark.parametrize(("margins", "mode"), [("positive", "aligned"), ("mixed", "none")], ids=lambda p: p)
def test_the_gradients_in_hidden_and_head_are_those_of_the_value(margins, mode, make_trajectory):
    hidden, head, data = from_hidden(make_trajectory, torch.float64, (5, 11, 3, 4), margins=margins)
    hidden.requires_grad_()
    head.requires_grad_()
    options = dict(temperature=0.8, advantages=data.advantages, margin_gradient=mode)
    assert torch.autograd.gradcheck(lambda h, w: latent_logprob(h, w, data.ids, data.scores, **options), (hidden, head))


@FROM_HIDDEN
@pytest.mark.parametrize("mode", MARGIN_GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(12, 1000, 10, 64), (6, 4099, 4, 16), (1, 33, 1, 8)], ids=str)
def test_error_from_hidden_is_bounded_by_a_compositions(operator, mode, dtype, shape, make_trajectory):
    hidden, head, data = from_hidden(make_trajectory, dtype, shape)
    options = dict(temperature=0.8, advantages=data.advantages, margin_gradient=mode)
    scores, upstream = data.scores.float(), torch.randn(shape[0])
    inputs = hidden, head, data.ids, scores, upstream
    exact, composed = (oracle_from_hidden(*inputs, at, **options) for at in (torch.float64, dtype))
    results = value_and_gradients(
        lambda h, w: operator(h, w, data.ids, scores, **options), hidden, head, upstream=upstream
    )
    assert [result.dtype for result in results] == [torch.float32, dtype, dtype]
    for parts in zip(results, composed, exact, strict=True):
        assert_error_is_like_a_compositions(*parts, dtype)


@FROM_LOGITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [17, 1000, 4099, 20_011])
def test_error_from_logits_is_bounded_by_a_rounding(operator, dtype, vocab, make_trajectory):
    logits = (3.0 * torch.randn(6, vocab)).to(dtype)
    data = make_trajectory(6, vocab, 5, logits=logits)
    scores, upstream = data.scores.float(), torch.randn(6)
    results = value_and_gradients(
        lambda z: operator(z, data.ids, scores, advantages=data.advantages), logits, upstream=upstream
    )
    scored = oracle.logprob(logits, data.ids, scores, advantages=data.advantages)
    exact = scored.value, upstream.double().unsqueeze(-1) * scored.gradient
    rounded = exact[0].float(), exact[1].to(dtype)
    assert [result.dtype for result in results] == [torch.float32, dtype]
    for parts in zip(results, rounded, exact, strict=True):
        assert_error_is_like_a_compositions(*parts, dtype)


@FROM_HIDDEN
def test_hidden_and_head_may_differ_in_dtype(operator, make_trajectory):
    hidden, head, data = from_hidden(make_trajectory, torch.bfloat16, (6, 257, 4, 16))
    upstream = torch.ones(6)
    exact = oracle_from_hidden(hidden, head, data.ids, data.scores, upstream, torch.float64)
    for h, w in ((hidden, head.float()), (hidden.float(), head)):
        results = value_and_gradients(lambda h, w: operator(h, w, data.ids, data.scores), h, w, upstream=upstream)
        assert [result.dtype for result in results[1:]] == [h.dtype, w.dtype]
        torch.testing.assert_close(results[0].double(), exact[0], rtol=0, atol=tol.FLOAT32)
        for actual, expected in zip(results[1:], exact[1:], strict=True):
            torch.testing.assert_close(actual.double(), expected, rtol=2.0**-8, atol=2.0**-9)
