"""float16 ends at 65,504: a gradient overflows only where the true one does, and then it is infinite."""

from __future__ import annotations

import pytest
import torch
from support.kernels import with_kernel
from torch import Tensor

from latent_kernels import fused_policy_loss, latent_logprob, latent_logprob_from_logits

LARGEST = 65504.0


def token_rows(rows: int) -> tuple[Tensor, Tensor]:
    """Return ids and scores [rows, 2] of text steps with the token 0."""
    return torch.tensor([[0, -100]]).expand(rows, 2), torch.zeros(rows, 2)


@with_kernel(fused_policy_loss)
def test_a_large_sum_over_steps_with_small_weights_stays_finite(operator):
    """The head's gradient is about -400, and before the weights of the steps are applied 256 times as much."""
    rows, width, vocab = 256, 8, 16
    hidden = torch.randn(rows, width)
    hidden[:, 0] = 400.0  # an outlier channel, as final norms have
    hidden, head = hidden.half(), (torch.randn(vocab, width) * 0.002).half()
    ids, scores = token_rows(rows)
    logits = hidden.double() @ head.double().T
    old = logits.log_softmax(-1)[:, 0].float()
    leaf, bias = head.clone().requires_grad_(), torch.zeros(vocab, dtype=torch.float16, requires_grad=True)
    ones = torch.ones(1, rows)
    loss, _ = operator(hidden[None], leaf, ids[None], scores[None], old[None], ones, ones, bias=bias)
    loss.backward()
    dlogits = (logits.softmax(-1) - torch.eye(vocab, dtype=torch.float64)[0]) / rows
    exact = dlogits.T @ hidden.double()
    assert exact.abs().max() * rows > LARGEST
    torch.testing.assert_close(leaf.grad.double(), exact, rtol=2.0**-8, atol=2.0**-10)
    torch.testing.assert_close(bias.grad.double(), dlogits.sum(0), rtol=2.0**-8, atol=2.0**-10)


@with_kernel(latent_logprob)
@pytest.mark.parametrize("upstream", [1e-9, 1.0, 131072.0, 1e12])
def test_gradients_scale_with_an_upstream_gradient_of_any_size(operator, upstream):
    """Small states, as many as it takes: the true gradients of the head lie within float16."""
    hidden = (torch.randn(4, 16) * min(1.0, 1.0 / upstream) * 100.0).clamp(-200.0, 200.0).half()
    head = torch.randn(40, 16).half()
    ids, scores = token_rows(4)
    leaf = head.clone().requires_grad_()
    (operator(hidden, leaf, ids, scores).sum() * upstream).backward()
    slope = torch.eye(40, dtype=torch.float64)[0] - (hidden.double() @ head.double().T).softmax(-1)
    exact = upstream * slope.T @ hidden.double()
    atol = max(2.0**-9 * exact.abs().max().item() * 0.1, 2.0**-24)  # half of the least float16
    torch.testing.assert_close(leaf.grad.double(), exact, rtol=2.0**-9, atol=atol)


@with_kernel(fused_policy_loss)
def test_a_large_slope_with_a_small_weight_stays_finite(operator):
    """A component that is e^12.5 times too likely has a slope of 90,000, and its step a weight of 1 / 64."""
    rows, vocab, width = 64, 33, 16
    hidden, head = torch.randn(rows, width).half(), (torch.randn(vocab, width) / 4).half()
    ids = torch.stack([torch.randperm(vocab)[:3] for _ in range(rows)])
    log_probs = (hidden.double() @ head.double().T).log_softmax(-1)
    scores = (log_probs.gather(-1, ids) + 0.5).float()
    scores[0, 0] -= 13.0
    steps = torch.ones(1, rows)
    advantages = torch.full((1, rows), 1e-2)
    margins = scores.double() - log_probs.gather(-1, ids)
    old = (-margins - torch.exp(-margins)).mean(-1).float()[None]
    leaves = [x.clone().requires_grad_() for x in (hidden, head)]
    loss, _ = operator(leaves[0][None], leaves[1], ids[None], scores[None], old, advantages, steps)
    loss.backward()
    pulls = torch.zeros(rows, vocab, dtype=torch.float64).scatter_add(-1, ids, (1.0 - torch.exp(-margins)) / 3)
    slope = pulls - pulls.sum(-1, keepdim=True) * log_probs.exp()
    assert slope.abs().max() > LARGEST
    dlogits = -1e-2 / rows * slope
    for leaf, exact in zip(leaves, (dlogits @ head.double(), dlogits.T @ hidden.double()), strict=True):
        assert exact.abs().max() < LARGEST
        # A log-prob of -90,000 is known to 0.03 in float32, and so is the logarithm of its ratio.
        torch.testing.assert_close(leaf.grad.double(), exact, rtol=2.0**-4, atol=2.0**-8 * exact.abs().max().item())


@with_kernel(latent_logprob_from_logits)
def test_an_overflow_of_the_true_gradient_is_infinite(operator):
    logits = torch.randn(2, 40).half().requires_grad_()
    ids, scores = token_rows(2)
    (operator(logits, ids, scores).sum() * 131072.0).backward()
    assert torch.isposinf(logits.grad[:, 0]).all()
    assert logits.grad[:, 1:].isfinite().all()


@with_kernel(latent_logprob)
def test_an_overflow_of_the_heads_true_gradient_is_infinite(operator):
    head = torch.randn(40, 16).half().requires_grad_()
    (operator(torch.full((2, 16), 4.0).half(), head, *token_rows(2)).sum() * 131072.0).backward()
    assert torch.isinf(head.grad[0]).all()
