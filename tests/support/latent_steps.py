"""Inputs of latent steps and their comparison."""

from __future__ import annotations

import torch
from torch import Tensor

from latent_kernels import LatentStep
from support import tolerances as tol
from support.oracle import Step

WIDTH = 12  # of the embedding table


def assert_same_step(
    actual: LatentStep | Step, expected: LatentStep | Step, *, scores: float = tol.STEP_SCORES
) -> None:
    """Ids and flags are equal; values agree to their tolerance, with scores of -inf at the same places."""
    assert torch.equal(actual.top_token, expected.top_token)
    assert torch.equal(actual.is_latent, expected.is_latent)
    assert torch.equal(actual.ids, expected.ids)
    torch.testing.assert_close(actual.scores, expected.scores, rtol=0, atol=scores)
    torch.testing.assert_close(actual.weights, expected.weights, rtol=0, atol=tol.STEP_WEIGHTS)
    assert actual.embedding.dtype == expected.embedding.dtype
    scale = max(1.0, expected.embedding.abs().max().item()) if expected.embedding.numel() else 1.0
    atol = tol.EMBEDDING[expected.embedding.dtype] * scale
    torch.testing.assert_close(actual.embedding, expected.embedding, rtol=0, atol=atol)


def make_logits(kind: str, rows: int, vocab: int) -> Tensor:
    """Return logits [rows, vocab] of a named shape."""
    logits = torch.randn(rows, vocab)
    if kind == "normal":
        return 3.0 * logits
    if kind == "near-uniform":
        return 1e-3 * logits
    if kind == "all-equal":
        return torch.full((rows, vocab), 0.7)
    if kind == "quantised":
        return (2.0 * logits).round() / 2.0
    if kind == "bf16-rounded":
        return (4.0 * logits).bfloat16().float()
    if kind == "mostly-masked":
        masked = (3.0 * logits).masked_fill(torch.rand(rows, vocab) < 0.8, -torch.inf)
        return masked.index_fill(1, torch.tensor([vocab - 1]), 0.5)
    if kind == "three-finite":
        kept = torch.tensor([vocab - 1, 3, vocab // 2])
        return torch.full((rows, vocab), -torch.inf).index_copy(1, kept, logits[:, :3])
    if kind == "one-finite":
        return torch.full((rows, vocab), -torch.inf).index_fill(1, torch.tensor([5]), 0.0)
    if kind == "peaked":  # as rows of a trained model: a Zipf-like head over a low floor
        rank = torch.stack([torch.randperm(vocab) for _ in range(rows)]) + 1
        sharpness = torch.linspace(1.0, 3.0, rows).unsqueeze(-1)
        return 12.0 - sharpness * rank.log() + 0.3 * logits
    raise ValueError(kind)
