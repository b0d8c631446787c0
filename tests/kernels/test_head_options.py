"""Logits of a head with a bias, a scale and a soft cap: every operator against the oracle, and each error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import oracle_head
from support import tolerances as tol
from support.fused_losses import make_batch
from support.kernels import narrowed, precision, with_kernel
from support.largest_tensor import ROWS, VOCAB, one_chunk
from support.latent_steps import assert_same_step
from support.logprobs import from_hidden, value_and_gradients
from torch import Tensor

from latent_kernels import (
    fused_policy_loss,
    latent_logprob,
    latent_step,
    latent_step_from_logits,
    latent_step_with_logits,
)
from latent_kernels._eager import latent_logprob as eager_rows
from latent_kernels.reference.head import head_logits_ref

LOGPROB, FUSED = with_kernel(latent_logprob), with_kernel(fused_policy_loss)
STEP = pytest.mark.parametrize("operator", [latent_step_with_logits], ids=["public"])
HEADS = {
    "bias": (True, {}),
    "scale": (False, dict(logit_scale=0.25)),
    "cap": (False, dict(softcap=2.0)),
    "scale-cap": (False, dict(logit_scale=1.7, softcap=3.0)),
    "all": (True, dict(logit_scale=0.6, softcap=1.5)),
}
EVERY_HEAD = pytest.mark.parametrize(("has_bias", "head"), HEADS.values(), ids=HEADS)
METHODS = ("latent_grpo", "soft_grpo", "multiplex")


def test_the_references_logits_and_their_gradients_equal_the_oracle():
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 4), (7, 4), (7,))]
    upstream = torch.randn(5, 7)
    for has_bias, head in HEADS.values():
        bias = leaves[2] if has_bias else None
        value = head_logits_ref(*leaves[:2], bias=bias, **head)
        gradients = torch.autograd.grad(value, leaves[: 2 + has_bias], upstream.double())
        expected = oracle_head.head_logits(leaves[0], leaves[1], bias, **head)
        torch.testing.assert_close(value.detach(), expected.value, rtol=0, atol=tol.FLOAT64)
        exact = oracle_head.head_gradients(upstream, expected, *leaves[:2])
        for actual, truth in zip(gradients, exact, strict=False):
            torch.testing.assert_close(actual, truth, rtol=0, atol=tol.FLOAT64)


# Log-probs


@LOGPROB
@EVERY_HEAD
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(7, 261, 4, 16), (1, 17, 1, 8)], ids=str)
def test_log_probs_and_gradients_equal_the_oracle(operator, has_bias, head, method, shape, make_trajectory):
    size, vocab, top_k, width = shape
    hidden, lm_head = torch.randn(size, width), 2.0 * torch.randn(vocab, width) / width**0.5
    leaves = [x.to(precision(operator)) for x in (hidden, lm_head, *([torch.randn(vocab)] if has_bias else []))]
    logits = oracle_head.head_logits(hidden, lm_head, leaves[2] if has_bias else None, **head).value
    data = narrowed(make_trajectory(size, vocab, top_k, logits=logits), precision(operator))
    upstream = torch.randn(shape[0])
    options = dict(temperature=0.7, method=method, advantages=data.advantages)

    def score(hidden: Tensor, lm_head: Tensor, bias: Tensor | None = None) -> Tensor:
        return operator(hidden, lm_head, data.ids, data.scores, bias=bias, **head, **options)

    actual = value_and_gradients(score, *leaves, upstream=upstream)
    expected = oracle_head.logprob(tuple(leaves), data.ids, data.scores, upstream, head, **options)
    for part, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(part.double(), exact, rtol=0, atol=tol.EXACT[precision(operator)])


@pytest.mark.parametrize("wanted", ["hidden", "lm_head", "bias", "hidden lm_head", "lm_head bias", "all"])
@pytest.mark.parametrize("of", ["latent_grpo", "soft_grpo", "multiplex", "components"])
def test_gradients_of_log_probs_are_those_of_the_value(wanted, of, make_trajectory):
    hidden, lm_head, data = from_hidden(make_trajectory, torch.float64, (5, 11, 3, 4), margins="positive")
    leaves = dict(hidden=hidden, lm_head=lm_head, bias=torch.randn(11, dtype=torch.float64))
    names = [name for name in leaves if wanted == "all" or name in wanted.split()]
    options = dict(method="multiplex", components=True) if of == "components" else dict(method=of)
    options.update(temperature=0.8, logit_scale=0.7, softcap=2.5, ids=data.ids, scores=data.scores)

    def score(*chosen: Tensor) -> Tensor:
        return latent_logprob(**{**leaves, **dict(zip(names, chosen, strict=True))}, **options)

    assert torch.autograd.gradcheck(score, [leaves[name].requires_grad_() for name in names])


@LOGPROB
def test_a_bias_wants_no_gradient_without_grad_mode(operator, make_trajectory):
    hidden, lm_head, data = from_hidden(make_trajectory, torch.float32, (5, 33, 3, 4))
    bias = torch.randn(33, requires_grad=True)
    with torch.no_grad():
        value = operator(hidden, lm_head, data.ids, data.scores, bias=bias, softcap=3.0)
    assert not value.requires_grad


# The fused loss


LOSSES = [
    dict(kl_coef=0.1),
    dict(entropy_coef=0.3, objective="cispo"),
    dict(ratio="sequence", aggregation="seq-mean-token-sum"),
    dict(method="multiplex", entropy_coef=0.1, ratio="sequence"),
    dict(method="soft_grpo", dual_clip=None),
]


def head_batch(
    make_trajectory: Callable[..., Any], bias: Tensor | None, head: dict[str, Any], method: str
) -> dict[str, Tensor]:
    """Return a batch of `make_batch` whose targets and old log-probs are those of the head's logits, with noise."""
    batch = make_batch(make_trajectory)
    logits = oracle_head.head_logits(batch["hidden"].flatten(0, 1), batch["lm_head"], bias, **head).value
    data = make_trajectory(24, 257, 4, margins="mixed", logits=logits)
    score = oracle_head.oracle.logprob(logits, data.ids, data.scores, temperature=0.7, method=method).value
    old, reference = (score.view(4, 6) + 0.4 * torch.randn(4, 6) for _ in range(2))
    given = dict(ids=data.ids.view(4, 6, 4), scores=data.scores.view(4, 6, 4))
    return {**batch, **given, "old_logprob": old, "ref_logprob": reference}


@FUSED
@EVERY_HEAD
@pytest.mark.parametrize("loss", LOSSES, ids=lambda options: "-".join(str(value) for value in options.values()))
def test_the_loss_and_its_gradients_equal_the_oracle(operator, has_bias, head, loss, make_trajectory, monkeypatch):
    monkeypatch.setattr(eager_rows, "BLOCK_COLUMNS", 100)
    bias = torch.randn(257) if has_bias else None
    options = dict(loss, temperature=0.7, clip_low=0.3, clip_high=0.5)
    wide = head_batch(make_trajectory, bias, head, loss.get("method", "latent_grpo"))
    batch = narrowed(wide, precision(operator))
    bias = None if bias is None else bias.to(precision(operator))
    leaves = [x.clone().requires_grad_() for x in (batch["hidden"], batch["lm_head"], bias) if x is not None]
    named = {**batch, **dict(zip(("hidden", "lm_head", "bias"), leaves, strict=False))}
    value, _ = operator(**named, **head, **options)
    gradients = torch.autograd.grad(value, leaves)
    expected, exact = oracle_head.fused_policy_loss(narrowed(batch, torch.float64), bias, head, **options)
    atol = tol.EXACT[precision(operator)] * max(1.0, abs(expected))
    assert value.item() == pytest.approx(expected, abs=atol)
    for actual, truth in zip(gradients, exact, strict=False):
        assert truth.abs().max() > 0
        torch.testing.assert_close(actual.double(), truth, rtol=tol.EXACT[precision(operator)], atol=atol)


@pytest.mark.parametrize("ratio", ["token", "component"])
def test_gradients_of_the_loss_are_those_of_the_value(ratio, make_trajectory):
    batch = make_batch(make_trajectory, (2, 3), vocab=11, top_k=3, width=4, margins="positive")
    batch["mask"][:] = True
    if ratio == "component":
        batch["old_logprob"], batch["ref_logprob"] = (x.unsqueeze(-1).expand(2, 3, 3) / 3 for x in (
            batch["old_logprob"], batch["ref_logprob"]
        ))  # fmt: skip
    leaves = batch.pop("hidden"), batch.pop("lm_head"), torch.randn(11, dtype=torch.float64)
    options = dict(method="multiplex", ratio=ratio, clip_low=1.0, clip_high=1e3, dual_clip=None, entropy_coef=0.1)
    options.update(softcap=2.0, logit_scale=1.3, temperature=0.8)

    def loss(hidden: Tensor, lm_head: Tensor, bias: Tensor) -> Tensor:
        return fused_policy_loss(hidden, lm_head, **batch, bias=bias, **options)[0]

    assert torch.autograd.gradcheck(loss, [leaf.requires_grad_() for leaf in leaves])


def test_a_soft_cap_holds_no_second_chunk_of_logits(make_trajectory, monkeypatch):
    monkeypatch.setattr(eager_rows, "BLOCK_COLUMNS", 64)
    batch = make_batch(make_trajectory, (8, ROWS // 8), vocab=VOCAB, width=8, dtype=torch.float32)
    batch["mask"][:] = True
    for name in ("hidden", "lm_head"):
        batch[name].requires_grad_()
    with one_chunk(monkeypatch):
        fused_policy_loss(**batch, bias=torch.randn(VOCAB, requires_grad=True), softcap=3.0)[0].backward()


# The latent step


@STEP
@EVERY_HEAD
@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_that_of_the_logits_which_it_returns(operator, has_bias, head, method):
    hidden, lm_head, table = torch.randn(5, 16), torch.randn(333, 16), torch.randn(333, 12)
    bias = torch.randn(333) if has_bias else None
    options = dict(top_k=4, seed=3, method=method, top_p=1.0 if method == "multiplex" else 0.9)
    step, logits = operator(hidden, lm_head, table, bias=bias, **head, **options)
    expected = oracle_head.head_logits(hidden, lm_head, bias, **head).value
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=tol.FLOAT32)
    assert_same_step(step, latent_step_from_logits(logits, table, **options))
    if operator is latent_step_with_logits:
        assert_same_step(step, latent_step(hidden, lm_head, table, bias=bias, **head, **options))


# Errors


INVALID = {
    "bias-shape": (dict(bias=torch.zeros(8)), ValueError, r"bias must have shape \[9\], got \[8\]"),
    "bias-int": (dict(bias=torch.zeros(9).long()), TypeError, "bias .* got torch.int64"),
    "bias-device": (dict(bias=torch.zeros(9, device="meta")), ValueError, "bias is on meta"),
    "scale-0": (dict(logit_scale=0.0), ValueError, r"logit_scale must be in \(0, .* got 0.0"),
    "scale-negative": (dict(logit_scale=-1.0), ValueError, "logit_scale .* got -1.0"),
    "scale-inf": (dict(logit_scale=float("inf")), ValueError, "logit_scale .* got inf"),
    "scale-nan": (dict(logit_scale=float("nan")), ValueError, "logit_scale .* got nan"),
    "scale-none": (dict(logit_scale=None), TypeError, "logit_scale must be a number, got NoneType"),
    "cap-0": (dict(softcap=0.0), ValueError, r"softcap must be in \(0, .* got 0.0"),
    "cap-negative": (dict(softcap=-30.0), ValueError, "softcap .* got -30.0"),
    "cap-inf": (dict(softcap=float("inf")), ValueError, "softcap .* got inf"),
    "cap-str": (dict(softcap="30"), TypeError, "softcap must be a number, got str"),
}


@pytest.mark.parametrize(("change", "error", "message"), INVALID.values(), ids=INVALID)
def test_an_error_names_the_wrong_option(change, error, message):
    hidden, lm_head = torch.zeros(4, 8), torch.zeros(9, 8)
    ids, scores = torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 3)
    steps = [x.unsqueeze(0) for x in (ids, scores, scores[:, 0], scores[:, 0], scores[:, 0])]
    for call in (
        lambda: latent_logprob(hidden, lm_head, ids, scores, **change),
        lambda: latent_step(hidden, lm_head, lm_head, top_k=2, **change),
        lambda: latent_step_with_logits(hidden, lm_head, lm_head, top_k=2, **change),
        lambda: fused_policy_loss(hidden.unsqueeze(0), lm_head, *steps, **change),
    ):
        with pytest.raises(error, match=message):
            call()
