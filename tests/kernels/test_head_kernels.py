"""A head's bias, scale and soft cap in the kernels: the tanh, the two routes of a step, narrow dtypes."""

from __future__ import annotations

import pytest
import torch
from support import oracle_head
from support import tolerances as tol
from support.kernels import DEVICE, NEEDS_TRITON, kernel, with_kernel
from support.latent_steps import assert_same_step
from support.logprobs import assert_error_is_like_a_compositions, value_and_gradients

from latent_kernels import latent_logprob, latent_step_from_logits, latent_step_with_logits
from latent_kernels._types import HeadOptions

HEADS = {
    "bias": (True, {}),
    "scale": (False, dict(logit_scale=0.25)),
    "cap": (False, dict(softcap=2.0)),
    "all": (True, dict(logit_scale=0.6, softcap=1.5)),
}
EVERY_HEAD = pytest.mark.parametrize(("has_bias", "head"), HEADS.values(), ids=HEADS)


@NEEDS_TRITON
def test_the_kernels_tanh_is_exact_to_eight_roundings():
    from latent_kernels._triton.lm_head import logits_sidecar

    magnitudes = torch.logspace(-30, 2, 1024, dtype=torch.float64).float()
    corners = torch.tensor([0.0, 0.25, 0.2499999, 88.0, 1e38, torch.inf])
    x = torch.cat([magnitudes, torch.linspace(0.0, 1.0, 1024), torch.linspace(0.2, 0.3, 1024), corners])
    x = torch.stack([x, -x]).to(DEVICE)
    out = logits_sidecar(x.clone(), HeadOptions(softcap=1.0)).logits
    exact = torch.tanh(x.double())
    assert ((out.double() - exact).abs() <= 8 * 2.0**-24 * exact.abs()).all()


@NEEDS_TRITON
@pytest.mark.parametrize(("has_bias", "head"), [HEADS["all"]], ids=["all"])
@pytest.mark.parametrize("width", [16, 64], ids=["library-product", "our-product"])
@pytest.mark.parametrize("method", ["latent_grpo", "multiplex"])
def test_a_step_is_that_of_the_logits_which_it_returns(has_bias, head, width, method):
    hidden, lm_head, table = (torch.randn(size, width).bfloat16() for size in (5, 333, 333))
    bias = torch.randn(333).bfloat16() if has_bias else None
    options = dict(top_k=4, seed=3, method=method, top_p=1.0 if method == "multiplex" else 0.9)
    step, logits = kernel(latent_step_with_logits)(hidden, lm_head, table, bias=bias, **head, **options)
    expected = oracle_head.head_logits(hidden, lm_head, bias, **head).value
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=tol.FLOAT32)
    assert_same_step(step, latent_step_from_logits(logits, table, **options))


@NEEDS_TRITON
@EVERY_HEAD
def test_every_tile_of_the_product_gives_the_heads_logits(has_bias, head):
    from latent_kernels._triton.lm_head import lm_head_sidecar, logits_sidecar
    from latent_kernels._triton.lm_head_routes import PRODUCTS

    hidden, lm_head = (torch.randn(size, 64, device=DEVICE).bfloat16() for size in (3, 200))
    bias = torch.randn(200, device=DEVICE) if has_bias else None
    expected = oracle_head.head_logits(hidden.cpu(), lm_head.cpu(), None if bias is None else bias.cpu(), **head).value
    groups = torch.nn.functional.pad(expected, (0, 24), value=-torch.inf).view(3, 7, 32)
    sums = (groups - groups.amax(-1, keepdim=True)).exp().sum(-1)
    product = (hidden.float() @ lm_head.float().T).contiguous()
    options = HeadOptions(bias, **head)
    for sidecar in (
        *(lm_head_sidecar(hidden, lm_head, c, options) for c in PRODUCTS),
        logits_sidecar(product, options),
    ):
        close = dict(rtol=tol.FLOAT32, atol=tol.FLOAT32)
        torch.testing.assert_close(sidecar.logits[:, :200].double().cpu(), expected, **close)
        torch.testing.assert_close(sidecar.maxima.double().cpu(), groups.amax(-1), **close)
        torch.testing.assert_close(sidecar.sums.double().cpu(), sums, **close)


@with_kernel(latent_logprob)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(6, 1000, 4, 64), (3, 8209, 33, 8)], ids=str)
def test_error_with_a_head_is_bounded_by_a_compositions(operator, dtype, shape, make_trajectory):
    size, vocab, top_k, width = shape
    leaves = [torch.randn(size, width), 2.0 * torch.randn(vocab, width) / width**0.5, torch.randn(vocab)]
    leaves, head = [leaf.to(dtype) for leaf in leaves], dict(logit_scale=0.8, softcap=3.0)
    logits = oracle_head.head_logits(*leaves, **head)
    data = make_trajectory(size, vocab, top_k, logits=logits.value, margins="positive")
    scores, upstream = data.scores.float(), torch.randn(size)
    actual = value_and_gradients(
        lambda h, w, b: operator(h, w, data.ids, scores, bias=b, **head), *leaves, upstream=upstream
    )
    assert [part.dtype for part in actual] == [torch.float32, dtype, dtype, dtype]
    exact = oracle_head.logprob(tuple(leaves), data.ids, scores, upstream, head)
    # The composition rounds logits and their gradient to the dtype.
    rounded = logits._replace(value=logits.value.to(dtype).double())
    scored = oracle_head.oracle.logprob(rounded.value, data.ids, scores)
    dlogits = (upstream.double().unsqueeze(-1) * scored.gradient).to(dtype)
    composed = scored.value, *oracle_head.head_gradients(dlogits, rounded, *leaves[:2])
    for parts in zip(actual, composed, exact, strict=True):
        assert_error_is_like_a_compositions(*parts, dtype)
