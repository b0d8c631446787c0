"""Rows that are easy to get wrong: none, junk in text rows, huge margins, excluded targets, order and strides."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import oracle
from support import tolerances as tol
from support.kernels import NEEDS_TRITON, kernel, narrowed, precision, with_kernel
from support.logprobs import MARGIN_GRADIENTS, from_hidden, value_and_gradients
from torch import Tensor

from latent_kernels import latent_logprob, latent_logprob_from_logits
from latent_kernels.reference.loss import latent_logprob_from_logits_ref

PUBLIC_AND_REFERENCE = with_kernel(latent_logprob_from_logits, latent_logprob_from_logits_ref)
FROM_LOGITS = with_kernel(latent_logprob_from_logits)
FROM_HIDDEN = with_kernel(latent_logprob)


@with_kernel(latent_logprob_from_logits, latent_logprob, pytest.param(kernel(latent_logprob), marks=NEEDS_TRITON))
def test_no_rows_give_empty_results(operator):
    ids, scores, hidden, head = torch.zeros(0, 3).long(), torch.zeros(0, 3), torch.zeros(0, 8), torch.randn(9, 8)
    hidden.requires_grad_()
    head.requires_grad_()
    from_logits = "logits" in operator.__name__
    out = operator(hidden @ head.T, ids, scores) if from_logits else operator(hidden, head, ids, scores)
    assert out.shape == (0,)
    out.sum().backward()
    assert hidden.grad.shape == (0, 8)
    assert torch.equal(head.grad, torch.zeros_like(head))


@PUBLIC_AND_REFERENCE
@pytest.mark.parametrize("junk", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
def test_scores_of_text_rows_are_not_read(operator, junk, make_trajectory):
    data = narrowed(make_trajectory(), precision(operator))
    hard = data.ids[:, 1] == -100
    scores = torch.where(hard.unsqueeze(-1), junk, data.scores)
    upstream = torch.ones(len(hard))
    actual, expected = (
        value_and_gradients(lambda z, s=s: operator(z, data.ids, s), data.logits, upstream=upstream)
        for s in (scores, data.scores)
    )
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mode", MARGIN_GRADIENTS)
@PUBLIC_AND_REFERENCE
def test_huge_margins_stay_finite_and_clamped(operator, dtype, mode):
    if dtype == torch.float64 and precision(operator) != dtype:
        pytest.skip("kernels compute in float32")
    logits = torch.zeros(8, 5, dtype=dtype)
    logits[:, 0] = 1.0
    ids = torch.arange(3).expand(8, -1)
    offset = torch.tensor([1e4, -1e4, 60.0, -60.0, 1e30, -1e30, -torch.inf, 0.0], dtype=dtype)
    scores = logits.log_softmax(-1)[:, :3] + offset.unsqueeze(-1)
    advantages = torch.tensor([-1.0, 1.0] * 4, dtype=dtype)
    for sign in (1.0, -1.0):
        value, gradient = value_and_gradients(
            lambda z, s=sign: operator(z, ids, scores, advantages=s * advantages, margin_gradient=mode),
            logits,
            upstream=torch.ones(8),
        )
        assert torch.isfinite(value).all()
        assert torch.isfinite(gradient).all()
        assert torch.isfinite(gradient.square().sum()), "the norm of the gradient overflows"
        expected = oracle.logprob(logits, ids, scores, advantages=sign * advantages, margin_gradient=mode)
        for actual, exact in zip((value, gradient), expected, strict=True):
            torch.testing.assert_close(actual.double(), exact, rtol=tol.FLOAT32, atol=tol.FLOAT32)
    assert torch.equal(gradient[6], torch.zeros(5, dtype=dtype)), "a target of probability zero asks for an update"


@FROM_LOGITS
def test_targets_that_the_policy_excludes_stay_finite(operator):
    # -inf logits at a component of a latent row: a large finite margin, and a gradient towards it.
    logits = torch.zeros(2, 6)
    logits[:, 1] = -torch.inf
    ids = torch.tensor([[1, 2], [3, 1]])
    value, gradient = value_and_gradients(lambda z: operator(z, ids, torch.zeros(2, 2)), logits, upstream=torch.ones(2))
    assert torch.isfinite(value).all()
    assert (value < -1e3).all()
    assert torch.isfinite(gradient).all()
    assert (gradient[:, 1] > 0).all()


@given(seed=st.integers(0, 2**31), shift=st.floats(-30, 30), order_seed=st.integers(0, 100))
def test_a_shift_of_the_logits_and_the_order_of_rows_do_not_matter(make_trajectory, seed, shift, order_seed):
    data = make_trajectory(7, 40, 4, seed=seed)
    options = dict(temperature=0.6, advantages=data.advantages)
    upstream = torch.linspace(-1, 1, 7, dtype=torch.float64)

    def run(logits: Tensor, part: Tensor) -> tuple[Tensor, ...]:
        return value_and_gradients(
            lambda z: latent_logprob_from_logits(
                z, data.ids[part], data.scores[part], temperature=0.6, advantages=options["advantages"][part]
            ),
            logits,
            upstream=upstream[part],
        )

    everything = torch.arange(7)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(order_seed))
    expected = run(data.logits, everything)
    for a, b in zip(run(data.logits + shift, everything), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tol.FLOAT64)
    for a, b in zip(run(data.logits[order], order), expected, strict=True):
        torch.testing.assert_close(a, b[order], rtol=0, atol=tol.FLOAT64)
    assert expected[1].sum(-1).abs().max() < tol.FLOAT64, "a gradient in logits sums to zero"


@FROM_LOGITS
def test_strides_of_the_logits_do_not_matter(operator, make_trajectory):
    data = narrowed(make_trajectory(6, 257, 4), torch.float32)
    upstream = torch.randn(6)
    results = []
    for logits in (data.logits, data.logits.T.contiguous().T, torch.cat([data.logits, data.logits], 1)[:, :257]):
        leaf = logits.detach().requires_grad_()
        value = operator(leaf, data.ids.T.contiguous().T, data.scores.T.contiguous().T)
        results.append((value.detach(), *torch.autograd.grad(value, leaf, upstream)))
    for actual in results[1:]:
        for a, b in zip(actual, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tol.REORDERED)


@FROM_HIDDEN
def test_strides_of_the_inputs_do_not_matter(operator, make_trajectory):
    hidden, head, data = from_hidden(make_trajectory, torch.float32, (6, 257, 4, 16))
    ids, scores = data.ids.T.contiguous().T, data.scores.float().T.contiguous().T
    upstream = torch.randn(6)
    expected = value_and_gradients(lambda h, w: operator(h, w, data.ids, data.scores), hidden, head, upstream=upstream)
    hidden_t, head_t = hidden.T.contiguous().requires_grad_(), head.T.contiguous().requires_grad_()
    value = operator(hidden_t.T, head_t.T, ids, scores)
    actual = value, *torch.autograd.grad(value, (hidden_t, head_t), upstream)
    for a, b in zip(actual, (expected[0], expected[1].T, expected[2].T), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tol.REORDERED)


@pytest.mark.parametrize("impl", ["eager", pytest.param("triton", marks=NEEDS_TRITON)])
def test_inputs_are_left_as_they_were(impl, make_trajectory):
    hidden, head, data = from_hidden(make_trajectory, torch.float32, (6, 257, 4, 16))
    inputs = [hidden, head, data.ids, data.scores.float(), (hidden @ head.T)]
    before = [t.clone() for t in inputs]
    for leaf in (hidden, head, inputs[4]):
        leaf.requires_grad_()
    latent_logprob(hidden, head, data.ids, inputs[3], impl=impl).sum().backward()
    latent_logprob_from_logits(inputs[4], data.ids, inputs[3], impl=impl).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@NEEDS_TRITON
@pytest.mark.parametrize("method", ["latent_grpo", "soft_grpo", "multiplex"])
@pytest.mark.parametrize("operator", [latent_logprob_from_logits, kernel(latent_logprob_from_logits)])
def test_a_row_with_an_id_outside_the_vocabulary_is_nan_without_a_gradient(operator, method):
    bad = [
        [9, 1],
        [1, 9],
        [-1, 1],
        [1, -101],
        [1, 2**40],
        [-(2**62), 1],
        [9, -100],
        [-5, -100],
        [-100, 1],
        [-100, -100],
    ]
    ids = torch.tensor([[3, 4], *bad, [5, -100]])
    logits, scores = torch.randn(len(ids), 9, requires_grad=True), torch.zeros(len(ids), 2)
    value = operator(logits, ids, scores, method=method)
    (gradient,) = torch.autograd.grad(value, logits, torch.ones(len(ids)))
    assert torch.isnan(value).tolist() == [False, *(True for _ in bad), False]
    assert not gradient[1:-1].any()
    assert (gradient[[0, -1]] != 0).any(-1).all()


@NEEDS_TRITON
@pytest.mark.parametrize("source", ["logits", "hidden"])
def test_the_kernel_does_not_hide_nan_or_inf_in_logits(source):
    logits, ids, scores = torch.randn(3, 40), torch.arange(6).view(3, 2), torch.zeros(3, 2)
    for junk in (torch.nan, torch.inf):
        dirty = logits.clone()
        dirty[1, 30] = junk
        leaf, head = dirty.requires_grad_(), torch.eye(40)
        operator = kernel(latent_logprob if source == "hidden" else latent_logprob_from_logits)
        value = operator(leaf, *((head,) if source == "hidden" else ()), ids, scores)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        assert torch.isnan(value).tolist() == [False, True, False]
        assert torch.isnan(gradient).all(-1).tolist() == [False, True, False]
