"""Inputs, gradients and error bounds of the log-probs of text and latent rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from support import oracle
from support import tolerances as tol

MARGIN_GRADIENTS = ("aligned", "released", "none")


def value_and_gradients(function: Callable[..., Tensor], *leaves: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    """Return the result and the gradients of `(result * upstream).sum()` in detached copies of the leaves."""
    leaves = tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)
    value = function(*leaves)
    gradients = torch.autograd.grad(value, leaves, upstream.to(value.dtype))
    return value.detach(), *gradients


def from_hidden(
    make_trajectory: Callable[..., Any], dtype: torch.dtype, shape: tuple[int, int, int, int], **options: Any
) -> tuple[Tensor, Tensor, Any]:
    """Return hidden [N, D] and lm_head [V, D] of `dtype`, and a trajectory over their exact logits.

    `shape` is N, V, K, D.
    """
    size, vocab, top_k, width = shape
    hidden, head = torch.randn(size, width).to(dtype), (2.0 * torch.randn(vocab, width) / width**0.5).to(dtype)
    logits = hidden.double() @ head.double().T
    return hidden, head, make_trajectory(size, vocab, top_k, logits=logits, **options)


def oracle_from_hidden(
    hidden: Tensor, head: Tensor, ids: Tensor, scores: Tensor, upstream: Tensor, dtype: torch.dtype, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the oracle's log-probs and their gradients in hidden and head, with matrix products in `dtype`.

    In float64 that is the exact result. In another dtype it is the least error of a composition of PyTorch operations:
    logits and their gradient are rounded to the dtype, and everything between them is exact.
    """
    hidden, head = hidden.to(dtype), head.to(dtype)
    scored = oracle.logprob(hidden @ head.T, ids, scores, **options)
    dlogits = (upstream.double().unsqueeze(-1) * scored.gradient).to(dtype)
    return scored.value, dlogits @ head, dlogits.T @ hidden


def assert_error_is_like_a_compositions(actual: Tensor, composed: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """The largest error is at most ERROR_FACTOR times that of the composition at `dtype`, plus the floor."""
    scale = max(1.0, exact.abs().max().item())
    error, allowed = ((x.double() - exact).abs().max().item() for x in (actual, composed))
    assert error <= tol.ERROR_FACTOR * allowed + tol.ERROR_FLOOR[dtype] * scale, (error, allowed, scale)
