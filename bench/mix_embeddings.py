"""`mix_embeddings` against the composition that gathers [N, K, D]."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.harness.cases import Operator, Parameters, Problem, Provider, Shape, compare, compiled, ours, tolerance
from bench.latent_logprob import make_ids
from latent_kernels import mix_embeddings
from latent_kernels.reference import mix_embeddings_ref, mixture_weights

TOP_K, LATENT_SHARE = 10, 0.5


def cases(shape: Shape, device: torch.device) -> list[Parameters]:
    """2048 steps (64 on the tiny shape), half of them latent."""
    rows = 64 if shape.name == "tiny" else 2048
    return [{"rows": rows, "vocab": shape.vocab, "hidden": shape.hidden, "top_k": TOP_K, "latent_share": LATENT_SHARE}]


def gathered_mixture(ids: Tensor, scores: Tensor, embedding: Tensor) -> Tensor:
    """All K rows at once, weighted and summed."""
    weights = mixture_weights(ids, scores, 1.0).unsqueeze(-1)
    return (weights * embedding[ids.clamp_min(0)].float()).sum(1).to(embedding.dtype)


def build(parameters: Parameters, device: torch.device, dtype: torch.dtype, compile: bool) -> Problem:
    """ids, scores [N, K], embedding [V, D]; forward only, since replayed inputs are detached."""
    rows, vocab, hidden = parameters["rows"], parameters["vocab"], parameters["hidden"]
    ids = make_ids(rows, vocab, parameters["latent_share"], device)
    scores = torch.randn(rows, TOP_K, device=device)
    embedding = torch.randn(vocab, hidden, device=device).to(dtype)

    def plain(mixture: Callable[[Tensor, Tensor, Tensor], Tensor], name: str = "eager") -> Provider:
        return Provider(name, lambda: (mixture(ids, scores, embedding),))

    def make(impl: str) -> Provider:
        return Provider("ours", lambda: (mix_embeddings(ids, scores, embedding, impl=impl),))

    def check(outputs: tuple[Tensor, ...]) -> str | None:
        return compare("embedding", outputs[0], mix_embeddings_ref(ids, scores, embedding), tolerance(dtype))

    gathers = int((ids >= 0).sum())
    traffic = (gathers + rows) * hidden * dtype.itemsize + ids.numel() * 12
    return Problem(
        [plain(gathered_mixture), *compiled(plain, gathered_mixture, compile), *ours(make, device)],
        check,
        traffic,
    )


MIX_EMBEDDINGS = Operator("mix_embeddings", cases, build)
