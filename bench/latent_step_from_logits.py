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
    compiled,
    ours,
    tolerance,
)
from latent_kernels import latent_step_from_logits
from latent_kernels._noise import exponential_draws, gumbel_noise
from latent_kernels.reference import latent_step_from_logits_ref, nucleus_mask

TOP_K, TOP_P, SEED = 10, 0.95, 1234
SCORE_TOLERANCE = 1e-4
TIES = 0.02  # share of the ids that may differ because scores differ by less than the tolerance


def cases(shape: Shape, device: torch.device) -> list[Parameters]:
    """32 rows (4 on the tiny shape) of peaked and of nearly uniform logits, in float32 as an LM head gives them."""
    rows = 4 if shape.name == "tiny" else 32
    return [
        {"rows": rows, "vocab": shape.vocab, "hidden": shape.hidden, "top_k": TOP_K, "logits": logits}
        for logits in ("realistic", "near-uniform")
    ]


def make_logits(kind: str, rows: int, vocab: int, device: torch.device) -> Tensor:
    """[B, V] float32: a bulk with forty ids a row far above it, or nearly uniform ones."""
    logits = torch.randn(rows, vocab, device=device)
    if kind == "near-uniform":
        return logits * 0.01
    peaks = torch.randint(vocab, (rows, 40), device=device)
    return (2.0 * logits).scatter_(1, peaks, 8.0 + 8.0 * torch.rand(rows, 40, device=device))


def sorted_step(logits: Tensor, embedding: Tensor, exponential: Tensor) -> Outputs:
    """The rule as the released sampler follows it: one full sort, noise on [B, V], top-k, mixture."""
    log_probs = logits.log_softmax(-1)
    ordered, order = log_probs.sort(dim=-1, descending=True, stable=True)
    noise = gumbel_noise(exponential, "one_sided").gather(-1, order)
    scores, place = torch.where(nucleus_mask(ordered, TOP_P, TOP_K), ordered + noise, -torch.inf).topk(TOP_K)
    ids, weights = order.gather(-1, place), scores.softmax(-1)
    mixture = (weights.unsqueeze(-1) * embedding[ids].float()).sum(1).to(embedding.dtype)
    return ids, scores, mixture


def step_check(reference: Run, dtype: torch.dtype) -> Callable[[Outputs], str | None]:
    """Whether ids, scores and embedding are those of the reference, which runs once; a few ids may differ by ties."""
    expected: list[Tensor] = []

    def check(outputs: Outputs) -> str | None:
        if not expected:
            expected.extend(reference())
        ids, scores, mixture = outputs
        shapes = [list(x.shape) for x in (ids, scores)]
        if shapes != [list(expected[0].shape)] * 2:
            return f"ids and scores have shapes {shapes[0]} and {shapes[1]}, expected {list(expected[0].shape)}"
        gap = (scores - expected[1]).abs().max().item()
        if not gap <= SCORE_TOLERANCE:
            return f"scores are off by {gap:.2g}, more than {SCORE_TOLERANCE:g}"
        same = ids == expected[0]
        if (~same).float().mean().item() > TIES:
            return f"{int((~same).sum())} of {ids.numel()} ids differ"
        agreed = same.all(-1)
        return compare("embedding", mixture[agreed], expected[2][agreed], tolerance(dtype))

    return check


def build(parameters: Parameters, device: torch.device, dtype: torch.dtype, compile: bool) -> Problem:
    """Logits [B, V], embedding [V, D]; every call draws fresh noise, the check uses one stream for all providers."""
    rows, vocab, hidden = parameters["rows"], parameters["vocab"], parameters["hidden"]
    logits = make_logits(parameters["logits"], rows, vocab, device)
    embedding = torch.randn(vocab, hidden, device=device).to(dtype)

    def fresh() -> Tensor:
        return torch.empty(rows, vocab, device=device).exponential_()

    def stream() -> Tensor:
        ids = torch.arange(vocab, device=device).expand(rows, vocab)
        return exponential_draws(ids, torch.arange(rows, device=device), SEED, 0)

    def plain(step: Callable[[Tensor, Tensor, Tensor], Outputs], name: str = "eager") -> Provider:
        return Provider(
            name, run=lambda: step(logits, embedding, fresh()), checked=lambda: step(logits, embedding, stream())
        )

    def reference(logits: Tensor, embedding: Tensor, exponential: Tensor) -> Outputs:
        found = latent_step_from_logits_ref(logits, embedding, top_k=TOP_K, top_p=TOP_P, exponential=exponential)
        return found.ids, found.scores, found.embedding

    def make(impl: str) -> Provider:
        def run() -> Outputs:
            found = latent_step_from_logits(logits, embedding, top_k=TOP_K, top_p=TOP_P, seed=SEED, impl=impl)
            return found.ids, found.scores, found.embedding

        return Provider("ours", run)

    traffic = logits.numel() * 4 + rows * (TOP_K + 1) * hidden * dtype.itemsize
    return Problem(
        providers=[
            plain(sorted_step),
            plain(reference, "reference"),
            *compiled(plain, sorted_step, compile),
            *ours(make, device),
        ],
        check=step_check(lambda: reference(logits, embedding, stream()), dtype),
        bytes_moved=traffic,
    )


LATENT_STEP_FROM_LOGITS = Operator("latent_step_from_logits", cases, build, measure_memory=True)
