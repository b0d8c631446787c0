"""Log-probs of text and latent rows: golden vectors, the written formulas, float64, memory and autograd's corners."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import tolerances as tol
from support.kernels import NEEDS_TRITON, kernel, narrowed, precision, with_kernel
from support.largest_tensor import LargestTensor
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from latent_kernels import _chunks as chunks
from latent_kernels import _linear as linear
from latent_kernels import latent_logprob, latent_logprob_from_logits
from latent_kernels.reference import latent_logprob_from_logits_ref

MARGIN_GRADIENTS = ("aligned", "released", "none")
PUBLIC_AND_REFERENCE = with_kernel(latent_logprob_from_logits, latent_logprob_from_logits_ref)
FROM_LOGITS = with_kernel(latent_logprob_from_logits)
FROM_HIDDEN = with_kernel(latent_logprob)


def value_and_gradients(function: Callable[..., Tensor], *leaves: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    """The result and the gradients of `(result * upstream).sum()` in detached copies of the leaves."""
    leaves = tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)
    value = function(*leaves)
    gradients = torch.autograd.grad(value, leaves, upstream.to(value.dtype))
    return value.detach(), *gradients


def assert_error_is_like_the_compositions(got: Tensor, naive: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Largest error at most ERROR_FACTOR times that of the plain composition at `dtype`, plus the floor."""
    scale = max(1.0, exact.abs().max().item())
    error, allowed = ((x.double() - exact).abs().max().item() for x in (got, naive))
    assert error <= tol.ERROR_FACTOR * allowed + tol.ERROR_FLOOR[dtype] * scale, (error, allowed, scale)


# Golden vectors


@PUBLIC_AND_REFERENCE
@pytest.mark.golden("official_a_logp")
def test_golden_vectors(operator, golden_case):
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


# The written formulas


def by_formula(
    logits: Tensor, ids: Tensor, scores: Tensor, temperature: float, advantages: Tensor | None, mode: str
) -> tuple[Tensor, Tensor]:
    """SPEC 4 row by row: log-prob [N] and its gradient in the logits [N, V], float64."""
    logits, scores = logits.double(), scores.double()
    values, gradients = [], []
    for n, row in enumerate(logits):
        if (ids[n, 1:] == -100).any():
            probs = (row / temperature).softmax(-1)
            values.append((row / temperature).log_softmax(-1)[ids[n, 0]])
            gradient = -probs / temperature
            gradient[ids[n, 0]] += 1.0 / temperature
            gradients.append(gradient)
            continue
        margin = scores[n] - row.log_softmax(-1)[ids[n]]
        values.append((-margin - (-margin).exp()).mean())
        coefficients = []
        for d in margin.tolist():
            d = torch.tensor(d, dtype=torch.float64)
            c = 1.0 - torch.exp(-d)
            if d < 0 and advantages is not None and advantages[n] <= 0:
                c = {"aligned": 1.0 - torch.exp(-d.abs()), "released": torch.exp(d) - 1.0, "none": c}[mode]
            coefficients.append(c / len(margin))
        gradient = -sum(coefficients) * row.softmax(-1)
        for k, c in zip(ids[n].tolist(), coefficients, strict=True):
            gradient[k] += c
        gradients.append(gradient)
    return torch.stack(values), torch.stack(gradients)


@PUBLIC_AND_REFERENCE
@pytest.mark.parametrize("mode", MARGIN_GRADIENTS)
@pytest.mark.parametrize("with_advantages", [True, False], ids=["advantages", "no-advantages"])
@pytest.mark.parametrize("shape", [(12, 33, 4), (1, 17, 1), (5, 31, 31), (9, 1000, 10)], ids=str)
def test_value_and_gradient_are_the_formula(operator, mode, with_advantages, shape, make_trajectory):
    data = narrowed(make_trajectory(*shape), precision(operator))
    advantages = data.advantages if with_advantages else None
    upstream = torch.randn(shape[0]).double()
    value, gradient = value_and_gradients(
        lambda logits: operator(
            logits, data.ids, data.scores, temperature=0.7, advantages=advantages, margin_gradient=mode
        ),
        data.logits,
        upstream=upstream,
    )
    expected, slope = by_formula(data.logits, data.ids, data.scores, 0.7, advantages, mode)
    exact = dict(rtol=0, atol=tol.EXACT[precision(operator)])
    torch.testing.assert_close(value.double(), expected, **exact)
    torch.testing.assert_close(gradient.double(), upstream.unsqueeze(-1) * slope, **exact)


def coefficients_of(mode: str, advantage: float, margin: float) -> float:
    """K c_k of a row with one component, read off the operator's gradient."""
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


@PUBLIC_AND_REFERENCE
def test_duplicate_ids_add_up(operator, make_trajectory):
    data = narrowed(make_trajectory(6, 33, 4, text_rows=False), precision(operator))
    ids = data.ids.clone()
    ids[:, 2] = ids[:, 0]
    ids[:3, 3] = ids[:3, 0]
    value, gradient = value_and_gradients(
        lambda logits: operator(logits, ids, data.scores), data.logits, upstream=torch.ones(6)
    )
    expected, slope = by_formula(data.logits, ids, data.scores, 1.0, None, "none")
    exact = dict(rtol=0, atol=tol.EXACT[precision(operator)])
    torch.testing.assert_close(value.double(), expected, **exact)
    torch.testing.assert_close(gradient.double(), slope, **exact)


@FROM_LOGITS
def test_temperature_is_for_text_rows_alone(operator, make_trajectory):
    data = narrowed(make_trajectory(), precision(operator))
    hard = data.ids[:, 1] == -100
    cool, warm = (operator(*data[:3], temperature=t) for t in (0.5, 2.0))
    assert torch.equal(cool[~hard], warm[~hard])
    assert (cool[hard] != warm[hard]).all()


# Gradients: gradcheck, dtypes


@pytest.mark.parametrize(
    ("margins", "mode"), [("positive", "aligned"), ("positive", "released"), ("mixed", "none")], ids=lambda p: p
)
def test_gradcheck_from_logits(margins, mode, make_trajectory):
    data = make_trajectory(6, 11, 3, margins=margins)
    options = dict(temperature=0.8, advantages=data.advantages, margin_gradient=mode)
    logits = data.logits.clone().requires_grad_()
    for operator in (latent_logprob_from_logits, latent_logprob_from_logits_ref):
        # The reference holds its margins fixed and so is straight-through: what gradcheck perturbs is its value.
        if operator is latent_logprob_from_logits_ref and margins == "mixed":
            continue
        assert torch.autograd.gradcheck(lambda z, f=operator: f(z, data.ids, data.scores, **options), logits)


def from_hidden(
    make_trajectory: Callable[..., Any], dtype: torch.dtype, shape: tuple[int, int, int, int], **options: Any
) -> tuple[Tensor, Tensor, Any]:
    """hidden [N, D] and lm_head [V, D] of `dtype`, and a trajectory over their exact logits."""
    size, vocab, top_k, width = shape
    hidden, head = torch.randn(size, width).to(dtype), (2.0 * torch.randn(vocab, width) / width**0.5).to(dtype)
    logits = hidden.double() @ head.double().T
    return hidden, head, make_trajectory(size, vocab, top_k, logits=logits, **options)


@pytest.mark.parametrize(("margins", "mode"), [("positive", "aligned"), ("mixed", "none")], ids=lambda p: p)
def test_gradcheck_from_hidden(margins, mode, make_trajectory):
    hidden, head, data = from_hidden(make_trajectory, torch.float64, (5, 11, 3, 4), margins=margins)
    hidden.requires_grad_()
    head.requires_grad_()
    options = dict(temperature=0.8, advantages=data.advantages, margin_gradient=mode)
    assert torch.autograd.gradcheck(lambda h, w: latent_logprob(h, w, data.ids, data.scores, **options), (hidden, head))


@FROM_HIDDEN
@pytest.mark.parametrize("mode", MARGIN_GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(12, 1000, 10, 64), (30, 4099, 4, 16), (1, 33, 1, 8)], ids=str)
def test_error_from_hidden_is_bounded_by_the_compositions(operator, mode, dtype, shape, make_trajectory):
    hidden, head, data = from_hidden(make_trajectory, dtype, shape)
    options = dict(temperature=0.8, advantages=data.advantages, margin_gradient=mode)
    scores, upstream = data.scores.float(), torch.randn(shape[0])

    def composition(h: Tensor, w: Tensor) -> Tensor:
        return latent_logprob_from_logits_ref(h @ w.T, data.ids, scores, **options)

    exact = value_and_gradients(composition, hidden.double(), head.double(), upstream=upstream)
    naive = value_and_gradients(composition, hidden, head, upstream=upstream)
    got = value_and_gradients(lambda h, w: operator(h, w, data.ids, scores, **options), hidden, head, upstream=upstream)
    assert [part.dtype for part in got] == [torch.float32, dtype, dtype]
    for ours, theirs, truth in zip(got, naive, exact, strict=True):
        assert_error_is_like_the_compositions(ours, theirs, truth, dtype)


@FROM_LOGITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [17, 1000, 4099, 20_011])
def test_error_from_logits_is_bounded_by_the_compositions(operator, dtype, vocab, make_trajectory):
    logits = (3.0 * torch.randn(9, vocab)).to(dtype)
    data = make_trajectory(9, vocab, 5, logits=logits)
    scores, upstream = data.scores.float(), torch.randn(9)

    def run(operator: Callable[..., Tensor], z: Tensor) -> tuple[Tensor, ...]:
        return value_and_gradients(
            lambda z: operator(z, data.ids, scores, advantages=data.advantages), z, upstream=upstream
        )

    exact = run(latent_logprob_from_logits_ref, logits.double())
    naive = run(latent_logprob_from_logits_ref, logits)
    got = run(operator, logits)
    assert [part.dtype for part in got] == [torch.float32, dtype]
    for ours, theirs, truth in zip(got, naive, exact, strict=True):
        assert_error_is_like_the_compositions(ours, theirs, truth, dtype)


@FROM_HIDDEN
def test_hidden_and_head_may_differ_in_dtype(operator, make_trajectory):
    hidden, head, data = from_hidden(make_trajectory, torch.bfloat16, (6, 257, 4, 16))
    upstream = torch.ones(6)
    expected = value_and_gradients(
        lambda h, w: latent_logprob(h, w, data.ids, data.scores), hidden.float(), head.float(), upstream=upstream
    )
    for h, w in ((hidden, head.float()), (hidden.float(), head)):
        got = value_and_gradients(lambda h, w: operator(h, w, data.ids, data.scores), h, w, upstream=upstream)
        assert [part.dtype for part in got[1:]] == [h.dtype, w.dtype]
        torch.testing.assert_close(got[0], expected[0], rtol=0, atol=tol.FLOAT32)
        for part, truth in zip(got[1:], expected[1:], strict=True):
            torch.testing.assert_close(part.float(), truth, rtol=2.0**-8, atol=2.0**-9)


# Rows


@with_kernel(latent_logprob_from_logits, latent_logprob, pytest.param(kernel(latent_logprob), marks=NEEDS_TRITON))
def test_no_rows(operator):
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
    got, expected = (
        value_and_gradients(lambda z, s=s: operator(z, data.ids, s), data.logits, upstream=upstream)
        for s in (scores, data.scores)
    )
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mode", MARGIN_GRADIENTS)
@PUBLIC_AND_REFERENCE
def test_huge_margins_stay_finite(operator, dtype, mode):
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
    assert torch.equal(gradient[6], torch.zeros(5, dtype=dtype)), "a target of probability zero asks for no update"


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
def test_shift_and_permutation_of_rows(make_trajectory, seed, shift, order_seed):
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
def test_strided_logits_equal_contiguous_ones(operator, make_trajectory):
    data = narrowed(make_trajectory(6, 257, 4), torch.float32)
    upstream = torch.randn(6)
    results = []
    for logits in (data.logits, data.logits.T.contiguous().T, torch.cat([data.logits, data.logits], 1)[:, :257]):
        leaf = logits.detach().requires_grad_()
        value = operator(leaf, data.ids.T.contiguous().T, data.scores.T.contiguous().T)
        results.append((value.detach(), *torch.autograd.grad(value, leaf, upstream)))
    for got in results[1:]:
        for a, b in zip(got, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tol.REORDERED)


@FROM_HIDDEN
def test_strided_inputs_equal_contiguous_ones(operator, make_trajectory):
    hidden, head, data = from_hidden(make_trajectory, torch.float32, (6, 257, 4, 16))
    ids, scores = data.ids.T.contiguous().T, data.scores.float().T.contiguous().T
    upstream = torch.randn(6)
    expected = value_and_gradients(lambda h, w: operator(h, w, data.ids, data.scores), hidden, head, upstream=upstream)
    hidden_t, head_t = hidden.T.contiguous().requires_grad_(), head.T.contiguous().requires_grad_()
    value = operator(hidden_t.T, head_t.T, ids, scores)
    got = value, *torch.autograd.grad(value, (hidden_t, head_t), upstream)
    for a, b in zip(got, (expected[0], expected[1].T, expected[2].T), strict=True):
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


# Chunks and memory


@NEEDS_TRITON
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_do_not_change_the_kernels_result(dtype, make_trajectory, monkeypatch):
    hidden, head, data = from_hidden(make_trajectory, dtype, (11, 261, 4, 16))  # rows of logits are padded to 272
    upstream = torch.randn(11)

    def run() -> tuple[Tensor, ...]:
        return value_and_gradients(
            lambda h, w: kernel(latent_logprob)(h, w, data.ids, data.scores), hidden, head, upstream=upstream
        )

    expected = run()
    for limit in ("CHUNK_BYTES", "CUDA_CHUNK_BYTES"):
        monkeypatch.setattr(chunks, limit, 3 * 261 * 4)
    for got, wanted in zip(run(), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=torch.finfo(dtype).eps, atol=tol.REORDERED)


@pytest.mark.parametrize("rows_a_chunk", [1, 3, 5, 11])
def test_chunks_do_not_change_the_result(rows_a_chunk, make_trajectory, monkeypatch):
    hidden, head, data = from_hidden(make_trajectory, torch.float64, (11, 257, 4, 16))
    upstream = torch.randn(11)

    def run() -> list[Tensor]:
        options = dict(temperature=0.7, advantages=data.advantages)
        both = value_and_gradients(
            lambda h, w: latent_logprob(h, w, data.ids, data.scores, **options), hidden, head, upstream=upstream
        )
        logits = value_and_gradients(
            lambda z: latent_logprob_from_logits(z, data.ids, data.scores, **options), data.logits, upstream=upstream
        )
        return [*both, *logits]

    expected = run()
    monkeypatch.setattr(chunks, "CHUNK_BYTES", rows_a_chunk * 257 * 8)
    monkeypatch.setattr(linear, "BLOCK_ROWS", 50)
    assert len(chunks.row_chunks(11, 257, torch.float64, torch.device("cpu"))) == -(-11 // rows_a_chunk)
    for got, wanted in zip(run(), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=tol.FLOAT64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wants_head", [True, False], ids=["head-gradient", "frozen-head"])
def test_no_tensor_is_as_large_as_all_logits(dtype, wants_head, make_trajectory, monkeypatch):
    size, vocab, width, rows_a_chunk = 96, 512, 8, 12
    monkeypatch.setattr(chunks, "CHUNK_BYTES", rows_a_chunk * vocab * 4)
    hidden, head, data = from_hidden(make_trajectory, dtype, (size, vocab, 4, width))
    hidden.requires_grad_()
    head.requires_grad_(wants_head)
    with LargestTensor() as seen:
        latent_logprob(hidden, head, data.ids, data.scores).sum().backward()
    assert rows_a_chunk * vocab <= seen.elements < size * vocab / 4
    with LargestTensor() as naive:
        latent_logprob_from_logits_ref(hidden @ head.T, data.ids, data.scores).sum().backward()
    assert naive.elements >= size * vocab


def test_logits_are_saved_once_and_nothing_else_of_their_size(make_trajectory):
    data = make_trajectory(64, 512, 4)
    logits = data.logits.float().requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        latent_logprob_from_logits(logits, data.ids, data.scores.float())
    large = [t for t in saved if t.numel() >= logits.numel()]
    assert len(large) == 1
    assert large[0].data_ptr() == logits.data_ptr()


# Autograd's corners


@FROM_HIDDEN
@pytest.mark.parametrize("wanted", ["both", "hidden", "head", "neither", "no-grad"])
def test_gradient_subsets(operator, wanted, make_trajectory, monkeypatch):
    hidden, head, data = from_hidden(make_trajectory, torch.float32, (6, 257, 4, 16))
    upstream = torch.randn(6)
    value, *gradients = value_and_gradients(
        lambda h, w: operator(h, w, data.ids, data.scores), hidden, head, upstream=upstream
    )
    hidden.requires_grad_(wanted in ("both", "hidden", "no-grad"))
    head.requires_grad_(wanted in ("both", "head", "no-grad"))
    if wanted in ("neither", "no-grad"):  # nothing may be spent on gradients
        module = sys.modules["latent_kernels.ops.latent_logprob"]
        for product in ("back_project", "add_outer_"):
            monkeypatch.setattr(module, product, lambda *_: pytest.fail("took a gradient that nobody wants"))
    with torch.set_grad_enabled(wanted != "no-grad"):
        out = operator(hidden, head, data.ids, data.scores)
    assert torch.equal(out, value)
    assert out.requires_grad == (wanted in ("both", "hidden", "head"))
    if not out.requires_grad:
        return
    out.backward(upstream)
    for leaf, gradient in zip((hidden, head), gradients, strict=True):
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, gradient, rtol=0, atol=tol.REORDERED)
        else:
            assert leaf.grad is None


def test_upstream_scales_and_calls_accumulate(make_trajectory):
    hidden, head, data = from_hidden(make_trajectory, torch.float64, (6, 257, 4, 16))
    _, *once = value_and_gradients(
        lambda h, w: latent_logprob(h, w, data.ids, data.scores), hidden, head, upstream=torch.ones(6)
    )
    leaves = hidden.requires_grad_(), head.requires_grad_()
    for factor in (2.0, -0.5):
        (factor * latent_logprob(*leaves, data.ids, data.scores)).sum().backward()
    for leaf, gradient in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, 1.5 * gradient, rtol=0, atol=tol.FLOAT64)


@FROM_HIDDEN
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_activation_checkpointing(operator, reentrant, make_trajectory):
    hidden, head, data = from_hidden(make_trajectory, precision(operator), (6, 257, 4, 16))

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return operator(torch.tanh(h), w, data.ids, data.scores)

    upstream = torch.randn(6)
    expected = value_and_gradients(loss, hidden, head, upstream=upstream)
    leaves = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    value = checkpoint(loss, *leaves, use_reentrant=reentrant)
    value.backward(upstream.to(value.dtype))
    for got, wanted in zip((value, leaves[0].grad, leaves[1].grad), expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("run_on", ["eager", pytest.param("triton", marks=NEEDS_TRITON)])
def test_autocast_changes_nothing(run_on, make_trajectory):
    from_head, from_logits = latent_logprob, latent_logprob_from_logits
    if run_on == "triton":
        from_head, from_logits = kernel(from_head), kernel(from_logits)
    hidden, head, data = from_hidden(make_trajectory, torch.float32, (6, 257, 4, 16))
    upstream = torch.randn(6)

    def run(z: Tensor | None = None) -> tuple[Tensor, ...]:
        if z is not None:
            return value_and_gradients(lambda z: from_logits(z, data.ids, data.scores), z, upstream=upstream)
        return value_and_gradients(lambda h, w: from_head(h, w, data.ids, data.scores), hidden, head, upstream=upstream)

    logits = data.logits.float()
    expected = *run(), *run(logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = *run(), *run(logits)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@with_kernel(latent_logprob_from_logits, latent_logprob, pytest.param(kernel(latent_logprob), marks=NEEDS_TRITON))
def test_double_backward_raises(operator, make_trajectory):
    hidden, head, data = from_hidden(make_trajectory, precision(operator), (3, 33, 4, 8))
    hidden.requires_grad_()
    from_logits = "logits" in operator.__name__
    value = operator(*((hidden @ head.T,) if from_logits else (hidden, head)), data.ids, data.scores)
    (gradient,) = torch.autograd.grad(value.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# Validation

IDS, SCORES = torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 3)
SHARED_INVALID = {
    "ids-rows": (dict(ids=IDS[:3]), ValueError, r"ids must have shape \[4, \*\], got \[3, 3\]"),
    "ids-dtype": (dict(ids=IDS.int()), TypeError, "ids must be torch.int64, got torch.int32"),
    "ids-empty": (dict(ids=IDS[:, :0]), ValueError, r"ids .* component .* \[4, 0\]"),
    "scores-shape": (dict(scores=SCORES[:, :2]), ValueError, r"scores must have shape \[4, 3\], got \[4, 2\]"),
    "scores-dtype": (dict(scores=IDS), TypeError, "scores .* got torch.int64"),
    "scores-device": (dict(scores=SCORES.to("meta")), ValueError, "scores is on meta"),
    "temperature-0": (dict(temperature=0.0), ValueError, r"temperature must be in \(0, inf\], got 0.0"),
    "temperature-str": (dict(temperature="1"), TypeError, "temperature must be a number, got str"),
    "advantages-shape": (dict(advantages=torch.zeros(4, 1)), ValueError, r"advantages .* \[4\], got \[4, 1\]"),
    "advantages-int": (dict(advantages=IDS[:, 0]), TypeError, "advantages .* got torch.int64"),
    "margin-gradient": (dict(margin_gradient="flip"), ValueError, "margin_gradient must be one of .* got 'flip'"),
    "impl-bogus": (dict(impl="bogus"), ValueError, "impl must be one of .* got 'bogus'"),
    "impl-triton": (dict(impl="triton"), RuntimeError, "use impl='auto'"),
}


@pytest.mark.parametrize("operator", [latent_logprob, latent_logprob_from_logits], ids=["hidden", "logits"])
@pytest.mark.parametrize(("change", "error", "message"), SHARED_INVALID.values(), ids=SHARED_INVALID)
def test_wrong_arguments_are_named(operator, change, error, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = (torch.zeros(4, 8), torch.zeros(9, 8)) if operator is latent_logprob else (torch.zeros(4, 9),)
    with pytest.raises(error, match=message):
        operator(*inputs, **{"ids": IDS, "scores": SCORES, **change})


@pytest.mark.parametrize(
    ("hidden", "head", "error", "message"),
    [
        (torch.zeros(4, 2, 8), torch.zeros(9, 8), ValueError, r"hidden must have shape \[\*, \*\], got \[4, 2, 8\]"),
        (torch.zeros(4, 8).long(), torch.zeros(9, 8), TypeError, "hidden .* got torch.int64"),
        (torch.zeros(4, 8), torch.zeros(9, 7), ValueError, r"lm_head must have shape \[\*, 8\], got \[9, 7\]"),
        (torch.zeros(4, 8), torch.zeros(9, 8, device="meta"), ValueError, "lm_head is on meta"),
        (torch.zeros(4, 8), None, TypeError, "lm_head must be a tensor, got NoneType"),
    ],
    ids=["hidden-shape", "hidden-dtype", "head-shape", "head-device", "head-none"],
)
def test_wrong_hidden_or_head_is_named(hidden, head, error, message):
    with pytest.raises(error, match=message):
        latent_logprob(hidden, head, IDS, SCORES)


def test_wrong_logits_are_named():
    with pytest.raises(ValueError, match=r"logits must have shape \[\*, \*\], got \[9\]"):
        latent_logprob_from_logits(torch.zeros(9), IDS, SCORES)
    with pytest.raises(TypeError, match=r"logits .* got torch.int64"):
        latent_logprob_from_logits(torch.zeros(4, 9).long(), IDS, SCORES)


@NEEDS_TRITON
@pytest.mark.parametrize("name", ["hidden", "lm_head", "logits"])
def test_kernels_refuse_float64(name):
    inputs = {"hidden": torch.zeros(4, 8), "lm_head": torch.zeros(9, 8)}
    if name == "logits":
        inputs = {"logits": torch.zeros(4, 9)}
    inputs[name] = inputs[name].double()
    operator = latent_logprob_from_logits if name == "logits" else latent_logprob
    with pytest.raises(RuntimeError, match=r"computes in float32, got torch\.float64; use impl='auto'"):
        operator(**inputs, ids=IDS, scores=SCORES, impl="triton")


@NEEDS_TRITON
def test_kernels_take_rows_of_up_to_128_components():
    logits, scores = torch.randn(2, 200), torch.randn(2, 129)
    ids = torch.randint(20, (2, 129))  # most are there several times
    with pytest.raises(RuntimeError, match="scores at most 128 components per row, got 129; use impl='auto'"):
        latent_logprob_from_logits(logits, ids, scores, impl="triton")
    assert latent_logprob_from_logits(logits, ids, scores).shape == (2,)
    got, expected = (
        value_and_gradients(lambda z, f=f: f(z, ids[:, :128], scores[:, :128]), z, upstream=torch.ones(2))
        for f, z in ((kernel(latent_logprob_from_logits), logits), (latent_logprob_from_logits_ref, logits.double()))
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tol.FLOAT32, atol=tol.FLOAT32)


@NEEDS_TRITON
def test_an_id_outside_the_vocabulary_makes_the_kernels_row_not_a_number():
    logits, ids, scores = torch.randn(3, 9, requires_grad=True), torch.arange(6).view(3, 2), torch.zeros(3, 2)
    ids[1, 1] = 9
    value = kernel(latent_logprob_from_logits)(logits, ids, scores)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert torch.isnan(value).tolist() == [False, True, False]
    assert torch.isnan(gradient).any(-1).tolist() == [False, True, False]


@NEEDS_TRITON
@pytest.mark.parametrize("source", ["logits", "hidden"])
def test_logits_that_are_not_numbers_are_not_hidden_by_the_kernel(source):
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
