"""Memory and autograd of the fused policy loss: chunks, subsets of gradients, checkpointing, autocast."""

from __future__ import annotations

import sys

import pytest
import torch
from support import tolerances as tol
from support.fused_losses import make_batch, run
from support.kernels import narrowed, precision, with_kernel
from support.largest_tensor import ROWS, VOCAB, LargestTensor, one_chunk
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from latent_kernels import _chunks as chunks
from latent_kernels import _linear as linear
from latent_kernels import fused_policy_loss
from latent_kernels._eager import streamed_logprob

FUSED = with_kernel(fused_policy_loss)


@FUSED
@pytest.mark.parametrize("rows_per_chunk", [1, 5])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_chunks_do_not_change_the_result(operator, rows_per_chunk, entropy_coef, make_trajectory, monkeypatch):
    dtype = precision(operator)
    batch = narrowed(make_batch(make_trajectory), dtype)
    options = dict(kl_coef=0.1, entropy_coef=entropy_coef)
    expected = run(operator, batch, **options)
    for limit in ("CHUNK_BYTES", "CUDA_CHUNK_BYTES"):
        monkeypatch.setattr(chunks, limit, rows_per_chunk * 257 * dtype.itemsize)
    monkeypatch.setattr(linear, "BLOCK_ROWS", 50)
    assert len(chunks.row_chunks(int(batch["mask"].sum()), 257, dtype, torch.device("cpu"))) > 1
    actual = run(operator, batch, **options)
    for a, b in zip(actual[:3], expected[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tol.EXACT[dtype])
    for a, b in zip(actual[3], expected[3], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tol.FLOAT32, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tensor_is_as_large_as_all_logits(dtype, make_trajectory, monkeypatch):
    batch = make_batch(make_trajectory, (8, ROWS // 8), vocab=VOCAB, width=8, dtype=dtype)
    batch["mask"][:] = True
    with one_chunk(monkeypatch):
        run(fused_policy_loss, batch)
    with LargestTensor() as composed:
        (batch["hidden"] @ batch["lm_head"].T).log_softmax(-1)
    assert composed.elements >= ROWS * VOCAB


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_frozen_head_needs_no_chunk_of_logits(softcap, make_trajectory, monkeypatch):
    size, vocab, block = 96, 512, 16
    monkeypatch.setattr(streamed_logprob, "BLOCK_TOKENS", block)
    batch = make_batch(make_trajectory, (8, 12), vocab=vocab, width=8, dtype=torch.float32)
    batch["mask"][:] = True
    batch["hidden"].requires_grad_()
    with LargestTensor() as seen:
        fused_policy_loss(**batch, softcap=softcap)[0].backward()
    assert seen.elements == block * size < vocab * 8
    gradient, batch["hidden"] = batch["hidden"].grad, batch["hidden"].detach()
    batch["hidden"].requires_grad_()
    batch["lm_head"].requires_grad_()  # its gradient needs chunks of logits
    fused_policy_loss(**batch, softcap=softcap)[0].backward()
    torch.testing.assert_close(gradient, batch["hidden"].grad, rtol=0, atol=tol.FLOAT32)


# Autograd's corners


@FUSED
@pytest.mark.parametrize("required", ["both", "hidden", "lm_head", "neither", "no-grad"])
def test_only_the_required_gradients_are_computed(operator, required, make_trajectory, monkeypatch):
    batch = narrowed(make_batch(make_trajectory), precision(operator))
    expected = run(operator, batch)
    leaves = {"both": ("hidden", "lm_head"), "no-grad": ("hidden", "lm_head"), "neither": ()}.get(required, (required,))
    for name in leaves:
        batch[name].requires_grad_()
    if required in ("neither", "no-grad"):  # nothing may be spent on gradients
        module = sys.modules["latent_kernels.ops.fused_policy_loss"]
        for product in ("back_project", "add_outer_"):
            monkeypatch.setattr(module, product, lambda *_: pytest.fail("computed a gradient that nothing requires"))
    with torch.set_grad_enabled(required != "no-grad"):
        loss, _ = operator(**batch)
    assert torch.equal(loss, expected[0])
    assert loss.requires_grad == (required in ("both", "hidden", "lm_head"))
    if not loss.requires_grad:
        return
    loss.backward()
    for name, gradient in zip(("hidden", "lm_head"), expected[1:3], strict=True):
        if name in leaves:
            torch.testing.assert_close(batch[name].grad, gradient, rtol=0, atol=tol.EXACT[precision(operator)])
        else:
            assert batch[name].grad is None


@FUSED
def test_upstream_scales_and_calls_accumulate(operator, make_trajectory):
    batch = narrowed(make_batch(make_trajectory), precision(operator))
    once = run(operator, batch)[1:3]
    leaves = batch["hidden"].requires_grad_(), batch["lm_head"].requires_grad_()
    for factor in (2.0, -0.5):
        (factor * operator(**batch)[0]).backward()
    for leaf, gradient in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, 1.5 * gradient, rtol=0, atol=tol.EXACT[precision(operator)])


@FUSED
def test_backward_may_run_twice_over_a_retained_graph(operator, make_trajectory):
    batch = narrowed(make_batch(make_trajectory), precision(operator))
    hidden = batch["hidden"].requires_grad_()
    loss, _ = operator(**batch)
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(3.0 * loss, hidden)
    torch.testing.assert_close(second, 3.0 * first, rtol=0, atol=tol.EXACT[precision(operator)])


@FUSED
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_activation_checkpointing_changes_nothing(operator, reentrant, make_trajectory):
    batch = narrowed(make_batch(make_trajectory), precision(operator))

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        return operator(**{**batch, "hidden": torch.tanh(hidden), "lm_head": head})[0]

    results = []
    for call in (loss, lambda *leaves: checkpoint(loss, *leaves, use_reentrant=reentrant)):
        leaves = [batch[name].clone().requires_grad_() for name in ("hidden", "lm_head")]
        value = call(*leaves)
        value.backward()
        results.append((value, leaves[0].grad, leaves[1].grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@FUSED
def test_autocast_changes_nothing(operator, make_trajectory):
    batch = make_batch(make_trajectory, dtype=torch.float32)
    expected = run(operator, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(operator, batch)
    assert all(torch.equal(a, b) for a, b in zip(actual[:3], expected[:3], strict=True))


@FUSED
def test_a_second_derivative_raises(operator, make_trajectory):
    batch = narrowed(make_batch(make_trajectory), precision(operator))
    hidden = batch["hidden"].requires_grad_()
    loss, _ = operator(**batch)
    for total in (loss, loss.square()):  # the upstream gradient is a constant, or has a graph
        (gradient,) = torch.autograd.grad(total, hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            (total + gradient.sum()).backward(retain_graph=True)


@FUSED
def test_no_gradient_reaches_the_other_inputs(operator, make_trajectory):
    batch = narrowed(make_batch(make_trajectory), precision(operator))
    hidden = batch["hidden"].requires_grad_()
    for name in ("old_logprob", "advantages", "scores", "ref_logprob"):
        batch[name].requires_grad_()
    loss, _ = operator(**batch, kl_coef=0.1)
    loss.backward()
    assert hidden.grad is not None
    assert all(batch[name].grad is None for name in ("old_logprob", "advantages", "scores", "ref_logprob"))
