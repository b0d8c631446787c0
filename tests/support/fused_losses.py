"""Batches of responses, and the results of the fused policy loss on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from latent_kernels import PolicyStats
from support import oracle
from support import tolerances as tol
from support.kernels import narrowed, precision
from support.oracle_loss import FusedLoss, component_loss
from support.oracle_loss import fused_policy_loss as oracle_fused_loss

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


def make_batch(
    make_trajectory: Callable[..., Any],
    shape: tuple[int, int] = (4, 6),
    vocab: int = 257,
    top_k: int = 4,
    width: int = 16,
    dtype: torch.dtype = torch.float64,
    margins: str = "mixed",
) -> dict[str, Tensor]:
    """Return text and latent steps, ragged masks (row 0 is fully masked), and advantages of both signs and zero."""
    size, steps = shape
    hidden = torch.randn(size * steps, width).to(dtype)
    head = (2.0 * torch.randn(vocab, width) / width**0.5).to(dtype)
    logits, seed = hidden.double() @ head.double().T, int(torch.randint(99, ()))
    data = make_trajectory(size * steps, vocab, top_k, margins=margins, logits=logits, seed=seed)
    logprob = oracle.logprob(data.logits, data.ids, data.scores).value.view(shape)
    lengths = (2 * torch.arange(size).view(-1, 1)) % (steps + 1)
    small = torch.float64 if dtype == torch.float64 else torch.float32
    return dict(
        hidden=hidden.view(size, steps, width),
        lm_head=head,
        ids=data.ids.view(size, steps, top_k),
        scores=data.scores.view(size, steps, top_k).to(small),
        old_logprob=(logprob + 0.6 * torch.randn(shape)).to(small),
        advantages=data.advantages.view(shape).to(small),
        mask=torch.arange(steps) < lengths,
        ref_logprob=(logprob + 0.6 * torch.randn(shape)).to(small),
    )


class Result(NamedTuple):
    """A loss, its gradients in hidden and lm_head, and its statistics."""

    loss: Tensor
    hidden: Tensor
    lm_head: Tensor
    stats: PolicyStats


def run(operator: Callable[..., Any], batch: dict[str, Tensor], **options: Any) -> Result:
    """Return the operator's result on a batch, whose tensors stay as they are."""
    leaves = {name: batch[name].detach().clone().requires_grad_() for name in ("hidden", "lm_head")}
    loss, stats = operator(**{**batch, **leaves}, **options)
    return Result(loss.detach(), *torch.autograd.grad(loss, list(leaves.values())), stats)


def assert_equals_the_oracle(
    operator: Callable[..., Any], batch: dict[str, Tensor], *, stats: bool = True, **options: Any
) -> tuple[Result, FusedLoss]:
    """Loss, gradients and statistics are exact in the dtype that the operator computes in. Return both results."""
    actual = run(operator, batch, **options)
    if options.get("ratio") == "component":
        rest = {name: value for name, value in options.items() if name not in ("method", "ratio")}
        expected = component_loss(narrowed(batch, torch.float64), **rest)
    else:
        expected = oracle_fused_loss(narrowed(batch, torch.float64), **options)
    exact = tol.EXACT[precision(operator)]
    assert actual.loss.item() == pytest.approx(expected.loss, abs=exact)
    for name in ("hidden", "lm_head"):
        torch.testing.assert_close(getattr(actual, name).double(), getattr(expected, name), rtol=0, atol=exact)
    for name, value in expected.stats.items() if stats else ():
        assert getattr(actual.stats, name).item() == pytest.approx(value, abs=tol.FLOAT32), name
    return actual, expected
