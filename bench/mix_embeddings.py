"""`mix_embeddings` against the composition that gathers [N, K, D]."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.harness.cases import (
    Operator,
    Parameters,
    Problem,
    Provider,
    Shape,
    compare,
    compiled_provider,
    our_providers,
    tolerance,
)
from bench.latent_logprob import make_ids
from latent_kernels import mix_embeddings
from latent_kernels.reference.latent_step import mix_embeddings_ref, mixture_weights

TOP_K, LATENT_SHARE = 10, 0.5


def cases(shape: Shape, device: torch.device) -> list[Parameters]:
    """Return one case of 2048 steps (64 on the tiny shape). Half of them are latent."""
    rows = 64 if shape.name == "tiny" else 2048
    return [{"rows": rows, "vocab": shape.vocab, "hidden": shape.hidden, "top_k": TOP_K, "latent_share": LATENT_SHARE}]


def gathered_mixture(ids: Tensor, scores: Tensor, embedding: Tensor) -> Tensor:
    """Return the mixtures [N, D] by gathering all [N, K, D] embeddings, weighting them and summing."""
    weights = mixture_weights(ids, scores, 1.0).unsqueeze(-1)
    return (weights * embedding[ids.clamp_min(0)].float()).sum(1).to(embedding.dtype)


def build(parameters: Parameters, device: torch.device, dtype: torch.dtype, compile: bool) -> Problem:
    """Build a case: ids and scores [N, K], embedding [V, D].

    Only the forward pass is timed, because the trainer detaches replayed inputs.
    """
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

    # Embeddings read and mixtures written, and ids (8 bytes) with their scores (4 bytes). Text rows read one embedding.
    traffic = (int((ids >= 0).sum()) + rows) * hidden * dtype.itemsize + ids.numel() * 12
    return Problem(
        [plain(gathered_mixture), *compiled_provider(plain, gathered_mixture, compile), *our_providers(make, device)],
        check,
        traffic,
    )


MIX_EMBEDDINGS = Operator("mix_embeddings", cases, build)
