"""One step of latent decoding: hidden state to the next input embedding (SPEC 2; Eq. 1, 12-14)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latent_kernels._backend import resolve
from latent_kernels._eager.latent_step import NoiseSpec, latent_step_from_logits_eager
from latent_kernels._eager.linear import project
from latent_kernels._noise import draw_seed
from latent_kernels._types import LatentStep
from latent_kernels._validate import check_noise, check_row_range, check_tensor
from latent_kernels.reference import compute_dtype


@torch.no_grad()
def latent_step_from_logits(
    logits: Tensor,  # [B, V]
    embedding: Tensor,  # [V, D']
    *,
    top_k: int = 10,
    top_p: float | Tensor = 0.95,
    tau: float | Tensor = 1.0,
    noise: str = "one_sided",
    noise_scale: float | Tensor = 1.0,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    row_ids: Tensor | None = None,
    exponential: Tensor | None = None,
    latent_mask: Tensor | None = None,
    end_token_id: int | None = None,
    impl: str = "auto",
) -> LatentStep:
    """Candidates by nucleus, clamped Gumbel noise on them, the top_k best, their mixture of embeddings (Eq. 1, 12-14).

    Args:
        logits: [B, V], any float dtype; computed in float32 (float64 for float64). -inf masks a token. Each row needs
        at
            least one finite logit.
        embedding: [V, D'], the input embedding table.
        top_k: K, mixture components, 1 to V.
        top_p: nucleus mass, a float or [B]; the first top_k tokens are always candidates, 1 keeps every token.
        tau: Gumbel-softmax temperature of the weights, a float or [B].
        noise: "one_sided" ([0, 4.5], the paper), "two_sided" ([-1.5, 3], SofT-GRPO) or "none" (deterministic; tau is
            not applied).
        noise_scale: factor on the noise, a float or [B].
        seed, step, row_ids: the noise of a token is a function of (seed, step, row_ids[b], token id) alone, whatever
            the batch, the order, the dtype and the implementation; int or 0-d int64 tensor, and [B] int64 (default
            arange). seed None draws a fresh one from torch's generator.
        exponential: [B, V] Exp(1) draws in place of a seed.
        latent_mask: [B] bool, rows still in their latent run (default all).
        end_token_id: a row whose highest raw logit is this token ends: it gets no noise and is_latent False.

    Not differentiable. Raises ValueError or TypeError naming the argument; RuntimeError where `impl="triton"` cannot
    run."""
    check_tensor("logits", logits, [None, None])
    rows, vocab = logits.shape
    check_tensor("embedding", embedding, [vocab, None], like=logits)
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        raise TypeError(f"top_k must be an int, got {type(top_k).__name__}")
    if not 1 <= top_k <= vocab:
        raise ValueError(f"top_k must be between 1 and the vocabulary size {vocab}, got {top_k}")
    check_row_range("top_p", top_p, rows, logits, 0.0, 1.0)
    check_row_range("tau", tau, rows, logits, 0.0, open_low=True)
    check_noise(rows, vocab, logits, noise, noise_scale, seed, step, row_ids, exponential)
    if latent_mask is not None:
        check_tensor("latent_mask", latent_mask, [rows], (torch.bool,), like=logits)
    if end_token_id is not None and (isinstance(end_token_id, bool) or not isinstance(end_token_id, int)):
        raise TypeError(f"end_token_id must be an int, got {type(end_token_id).__name__}")
    if end_token_id is not None and not 0 <= end_token_id < vocab:
        raise ValueError(f"end_token_id must be between 0 and {vocab - 1}, got {end_token_id}")
    resolve("latent_step", impl, logits)

    logits = logits.to(compute_dtype(logits))
    if seed is None and exponential is None and noise != "none":
        seed = draw_seed()
    spec = NoiseSpec(
        kind=noise,
        scale=_column(noise_scale, logits),
        seed=seed,
        step=step,
        row_ids=torch.arange(rows, device=logits.device) if row_ids is None else row_ids,
        exponential=exponential,
    )
    return latent_step_from_logits_eager(
        logits, embedding, top_k=top_k, top_p=top_p, tau=tau, noise=spec, latent_mask=latent_mask,
        end_token_id=end_token_id,
    )  # fmt: skip


@torch.no_grad()
def latent_step(
    hidden: Tensor,  # [B, D]
    lm_head: Tensor,  # [V, D]
    embedding: Tensor,  # [V, D']
    *,
    top_k: int = 10,
    top_p: float | Tensor = 0.95,
    tau: float | Tensor = 1.0,
    noise: str = "one_sided",
    noise_scale: float | Tensor = 1.0,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    row_ids: Tensor | None = None,
    exponential: Tensor | None = None,
    latent_mask: Tensor | None = None,
    end_token_id: int | None = None,
    impl: str = "auto",
) -> LatentStep:
    """`latent_step_from_logits(hidden @ lm_head.T, ...)`: one hidden state a row to the next input embedding (Eq. 1,
    12-14).

    hidden [B, D] and lm_head [V, D] of any float dtype; logits are accumulated in float32. All else as in
    `latent_step_from_logits`.
    """
    check_tensor("hidden", hidden, [None, None])
    check_tensor("lm_head", lm_head, [None, hidden.shape[1]], like=hidden)
    resolve("latent_step", impl, hidden)
    options: dict[str, Any] = dict(
        top_k=top_k, top_p=top_p, tau=tau, noise=noise, noise_scale=noise_scale, seed=seed, step=step, row_ids=row_ids,
        exponential=exponential, latent_mask=latent_mask, end_token_id=end_token_id, impl=impl,
    )  # fmt: skip
    return latent_step_from_logits(project(hidden, lm_head), embedding, **options)


def _column(value: float | Tensor, like: Tensor) -> Tensor:
    """A float or [B] tensor as 0-d or [B, 1] in `like`'s dtype."""
    value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return value.unsqueeze(-1) if value.ndim else value
