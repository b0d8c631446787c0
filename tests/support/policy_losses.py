"""Batches of log-probs, and the comparison of the policy loss on them with the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from latent_kernels import PolicyStats
from support import tolerances as tol
from support.kernels import narrowed, precision
from support.oracle_loss import PolicyLoss
from support.oracle_loss import policy_loss as oracle_loss


def make_batch(rows: int = 10, steps: int = 9, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Return log-probs far enough apart that every branch of the loss is taken, ragged masks, one row fully masked."""
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


def assert_same(
    operator: Any, batch: dict[str, Tensor], options: dict[str, Any], *, rtol: float = 0.0
) -> tuple[PolicyLoss, PolicyStats]:
    """Loss, gradient and statistics of the operator are the oracle's. Return the oracle's result and the statistics."""
    expected = oracle_loss(**narrowed(batch, torch.float64), **options)
    rest = {name: value for name, value in batch.items() if name != "logprob"}
    logprob = batch["logprob"].detach().requires_grad_()
    loss, stats = operator(logprob, **rest, **options)
    (gradient,) = torch.autograd.grad(loss, logprob)
    exact = tol.EXACT[precision(operator)]
    assert loss.item() == pytest.approx(expected.loss, abs=exact, rel=rtol)
    torch.testing.assert_close(gradient.double(), expected.gradient, rtol=rtol, atol=exact)
    for name, value in expected.stats.items():
        assert getattr(stats, name).item() == pytest.approx(value, abs=tol.FLOAT32), name
    return expected, stats
