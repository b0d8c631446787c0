"""`latent_step_from_logits` against a sampler that sorts the vocabulary and draws noise for all of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.harness.cases import (
    Operator,
    Outputs,
    Parameters,
    Problem,
    Provider,
    Run,
    Shape,
    compare,
    compiled_provider,
    our_providers,
    tolerance,
)
from latent_kernels import LatentStep, latent_step_from_logits
from latent_kernels._noise import exponential_draws, gumbel_noise
from latent_kernels.reference.latent_step import latent_step_from_logits_ref, nucleus_mask

TOP_K, TOP_P, SEED = 10, 0.95, 1234
SCORE_TOLERANCE = 1e-4
TIES = 0.02  # share of the ids that may differ because their scores differ by less than the tolerance


def cases(shape: Shape, device: torch.device) -> list[Parameters]:
    """Return a case of peaked and one of nearly uniform logits, each with 32 rows (4 on the tiny shape).

    Logits are float32, as an LM head gives them.
    """
    rows = 4 if shape.name == "tiny" else 32
    return [
        {"rows": rows, "vocab": shape.vocab, "hidden": shape.hidden, "top_k": TOP_K, "logits": logits}
        for logits in ("realistic", "near-uniform")
    ]


def build(parameters: Parameters, device: torch.device, dtype: torch.dtype, compile: bool) -> Problem:
    """Build a case: logits [B, V], embedding [V, D].

    Every timed call of eager PyTorch draws fresh noise. The check gives one set of draws to all providers.
    """
    rows, vocab, hidden = parameters["rows"], parameters["vocab"], parameters["hidden"]
    logits = make_logits(parameters["logits"], rows, vocab, device)
    embedding = torch.randn(vocab, hidden, device=device).to(dtype)

    def plain(step: Callable[[Tensor, Tensor, Tensor], Outputs], name: str = "eager") -> Provider:
        return Provider(
            name,
            run=lambda: step(logits, embedding, fresh_draws(rows, vocab, device)),
            checked=lambda: step(logits, embedding, draws_of_seed(rows, vocab, device)),
        )

    def reference(logits: Tensor, embedding: Tensor, exponential: Tensor) -> Outputs:
        return step_outputs(
            latent_step_from_logits_ref(logits, embedding, top_k=TOP_K, top_p=TOP_P, exponential=exponential)
        )

    def make(impl: str) -> Provider:
        def run() -> Outputs:
            return step_outputs(
                latent_step_from_logits(logits, embedding, top_k=TOP_K, top_p=TOP_P, seed=SEED, impl=impl)
            )

        return Provider("ours", run)

    return Problem(
        providers=[
            plain(sorted_step),
            plain(reference, "reference"),
            *compiled_provider(plain, sorted_step, compile),
            *our_providers(make, device),
        ],
        check=check_against(lambda: reference(logits, embedding, draws_of_seed(rows, vocab, device)), dtype),
        # The logits once, the K embeddings of a row and their mixture.
        bytes_moved=logits.numel() * 4 + rows * (TOP_K + 1) * hidden * dtype.itemsize,
    )


def make_logits(kind: str, rows: int, vocab: int, device: torch.device) -> Tensor:
    """Return logits [B, V] in float32: forty ids per row far above the rest, or all nearly uniform."""
    logits = torch.randn(rows, vocab, device=device)
    if kind == "near-uniform":
        return logits * 0.01
    peaks = torch.randint(vocab, (rows, 40), device=device)
    return (2.0 * logits).scatter_(1, peaks, 8.0 + 8.0 * torch.rand(rows, 40, device=device))


def fresh_draws(rows: int, vocab: int, device: torch.device) -> Tensor:
    """Draw Exp(1) noise [B, V] with PyTorch's generator."""
    return torch.empty(rows, vocab, device=device).exponential_()


def draws_of_seed(rows: int, vocab: int, device: torch.device) -> Tensor:
    """Return the Exp(1) noise [B, V] that the fused operators draw at SEED and step 0."""
    ids = torch.arange(vocab, device=device).expand(rows, vocab)
    return exponential_draws(ids, torch.arange(rows, device=device), SEED, 0)


def sorted_step(logits: Tensor, embedding: Tensor, exponential: Tensor) -> Outputs:
    """Apply the rule as the released sampler does: one full sort, noise on [B, V], top-k, mixture."""
    log_probs = logits.log_softmax(-1)
    ordered, order = log_probs.sort(dim=-1, descending=True, stable=True)
    noise = gumbel_noise(exponential, "one_sided").gather(-1, order)
    scores, index = torch.where(nucleus_mask(ordered, TOP_P, TOP_K), ordered + noise, -torch.inf).topk(TOP_K)
    ids, weights = order.gather(-1, index), scores.softmax(-1)
    mixture = (weights.unsqueeze(-1) * embedding[ids].float()).sum(1).to(embedding.dtype)
    return ids, scores, mixture


def step_outputs(step: LatentStep) -> Outputs:
    """Return the outputs that the check compares: ids [B, K], scores [B, K], embedding [B, D]."""
    return step.ids, step.scores, step.embedding


def check_against(reference: Run, dtype: torch.dtype) -> Callable[[Outputs], str | None]:
    """Return a check of ids, scores and embedding. The reference runs once, at the first check."""
    expected: list[Tensor] = []

    def check(outputs: Outputs) -> str | None:
        if not expected:
            expected.extend(reference())
        ids, scores, mixture = outputs
        shapes = [list(x.shape) for x in (ids, scores)]
        if shapes != [list(expected[0].shape)] * 2:
            return f"ids and scores have shapes {shapes[0]} and {shapes[1]}, expected {list(expected[0].shape)}"
        gap = (scores - expected[1]).abs().max().item()
        if not gap <= SCORE_TOLERANCE:  # also true for NaN
            return f"scores are off by {gap:.2g}, more than {SCORE_TOLERANCE:g}"
        same = ids == expected[0]
        if (~same).float().mean().item() > TIES:
            return f"{int((~same).sum())} of {ids.numel()} ids differ"
        # A tie may swap two ids at the end of the mixture. Compare the embeddings of the other rows.
        rows = same.all(-1)
        return compare("embedding", mixture[rows], expected[2][rows], tolerance(dtype))

    return check


LATENT_STEP_FROM_LOGITS = Operator("latent_step_from_logits", cases, build, measure_memory=True)
