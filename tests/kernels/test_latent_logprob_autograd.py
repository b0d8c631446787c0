"""Memory and autograd of the log-probs: chunks, what is saved, subsets of gradients, checkpointing, autocast."""

from __future__ import annotations

import sys

import pytest
import torch
from support import tolerances as tol
from support.kernels import NEEDS_TRITON, kernel, precision, with_kernel
from support.largest_tensor import ROWS, VOCAB, LargestTensor, one_chunk
from support.logprobs import from_hidden, value_and_gradients
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from latent_kernels import _chunks as chunks
from latent_kernels import _linear as linear
from latent_kernels import latent_logprob, latent_logprob_from_logits
from latent_kernels._eager import streamed_logprob

FROM_HIDDEN = with_kernel(latent_logprob)


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
    for actual, reference in zip(run(), expected, strict=True):
        torch.testing.assert_close(actual, reference, rtol=torch.finfo(dtype).eps, atol=tol.REORDERED)


@pytest.mark.parametrize("rows_per_chunk", [1, 3, 5, 11])
def test_chunks_do_not_change_the_result(rows_per_chunk, make_trajectory, monkeypatch):
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
    monkeypatch.setattr(chunks, "CHUNK_BYTES", rows_per_chunk * 257 * 8)
    monkeypatch.setattr(linear, "BLOCK_ROWS", 50)
    monkeypatch.setattr(streamed_logprob, "BLOCK_TOKENS", 50)
    monkeypatch.setattr(streamed_logprob, "MAX_ROWS", rows_per_chunk)
    assert len(streamed_logprob.streamed_chunks(11)) == -(-11 // rows_per_chunk)
    assert len(chunks.row_chunks(11, 257, torch.float64, torch.device("cpu"))) == -(-11 // rows_per_chunk)
    for actual, reference in zip(run(), expected, strict=True):
        torch.testing.assert_close(actual, reference, rtol=0, atol=tol.FLOAT64)


def test_tokens_without_a_probability_may_fill_the_first_blocks(make_trajectory, monkeypatch):
    hidden, head, data = from_hidden(make_trajectory, torch.float64, (11, 257, 4, 16))
    impossible = torch.ones(257, dtype=torch.bool)
    impossible[data.ids.clamp_min(0)] = False
    impossible[200:] = False
    bias = torch.zeros(257, dtype=torch.float64).masked_fill(impossible, -torch.inf)

    def run() -> tuple[Tensor, ...]:
        return value_and_gradients(
            lambda h, w: latent_logprob(h, w, data.ids, data.scores, bias=bias), hidden, head, upstream=torch.ones(11)
        )

    expected = run()
    monkeypatch.setattr(streamed_logprob, "BLOCK_TOKENS", 1)
    for actual, reference in zip(run(), expected, strict=True):
        assert reference.isfinite().all()
        torch.testing.assert_close(actual, reference, rtol=0, atol=tol.FLOAT64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("needs_head", [True, False], ids=["head-gradient", "frozen-head"])
def test_no_tensor_is_as_large_as_all_logits(dtype, needs_head, make_trajectory, monkeypatch):
    monkeypatch.setattr(streamed_logprob, "BLOCK_TOKENS", 64)
    hidden, head, data = from_hidden(make_trajectory, dtype, (ROWS, VOCAB, 4, 8))
    hidden.requires_grad_()
    head.requires_grad_(needs_head)
    with one_chunk(monkeypatch):
        latent_logprob(hidden, head, data.ids, data.scores).sum().backward()
    with LargestTensor() as composed:
        (hidden @ head.T).log_softmax(-1)
    assert composed.elements >= ROWS * VOCAB


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
@pytest.mark.parametrize("required", ["both", "hidden", "head", "neither", "no-grad"])
def test_only_the_required_gradients_are_computed(operator, required, make_trajectory, monkeypatch):
    hidden, head, data = from_hidden(make_trajectory, torch.float32, (6, 257, 4, 16))
    upstream = torch.randn(6)
    value, *gradients = value_and_gradients(
        lambda h, w: operator(h, w, data.ids, data.scores), hidden, head, upstream=upstream
    )
    hidden.requires_grad_(required in ("both", "hidden", "no-grad"))
    head.requires_grad_(required in ("both", "head", "no-grad"))
    if required in ("neither", "no-grad"):  # nothing may be spent on gradients
        module = sys.modules["latent_kernels.ops.latent_logprob"]
        for product in ("back_project", "add_outer_"):
            monkeypatch.setattr(module, product, lambda *_: pytest.fail("computed a gradient that nothing requires"))
    with torch.set_grad_enabled(required != "no-grad"):
        out = operator(hidden, head, data.ids, data.scores)
    assert torch.equal(out, value)
    assert out.requires_grad == (required in ("both", "hidden", "head"))
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
def test_activation_checkpointing_changes_nothing(operator, reentrant, make_trajectory):
    hidden, head, data = from_hidden(make_trajectory, precision(operator), (6, 257, 4, 16))

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return operator(torch.tanh(h), w, data.ids, data.scores)

    upstream = torch.randn(6)
    expected = value_and_gradients(loss, hidden, head, upstream=upstream)
    leaves = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    value = checkpoint(loss, *leaves, use_reentrant=reentrant)
    value.backward(upstream.to(value.dtype))
    for actual, reference in zip((value, leaves[0].grad, leaves[1].grad), expected, strict=True):
        assert torch.equal(actual, reference)


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
        actual = *run(), *run(logits)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@with_kernel(latent_logprob_from_logits, latent_logprob, pytest.param(kernel(latent_logprob), marks=NEEDS_TRITON))
def test_a_second_derivative_raises(operator, make_trajectory):
    hidden, head, data = from_hidden(make_trajectory, precision(operator), (3, 33, 4, 8))
    hidden.requires_grad_()
    from_logits = "logits" in operator.__name__
    value = operator(*((hidden @ head.T,) if from_logits else (hidden, head)), data.ids, data.scores)
    for total in (value.sum(), value.square().sum()):  # the upstream gradient is a constant, or has a graph
        (gradient,) = torch.autograd.grad(total, hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()
