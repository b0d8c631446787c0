"""One step of latent decoding: hidden state to the next input embedding (SPEC 2; Eq. 1, 12-14)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latent_kernels._dispatch import MAX_TOP_K, on_its_device, resolve
from latent_kernels._eager.latent_step import latent_step_from_logits_eager
from latent_kernels._linear import project
from latent_kernels._noise import NoiseSpec, draw_seed
from latent_kernels._types import LatentStep
from latent_kernels._validate import check_noise, check_row_range, check_tensor
from latent_kernels.reference import compute_dtype

if TYPE_CHECKING:
    from latent_kernels._triton.lm_head import Sidecar


@torch.no_grad()
@on_its_device
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
        logits: [B, V], any float dtype; computed in float32 (float64 for float64). -inf masks a token; each row needs
            at least one finite logit.
        embedding: [V, D'], the input embedding table.
        top_k: K, mixture components, 1 to V.
        top_p: nucleus mass, a float or [B]; the first top_k tokens are always candidates, 1 keeps every token.
        tau: Gumbel-softmax temperature of the weights, a float or [B].
        noise: "one_sided" ([0, 4.5], the paper), "two_sided" ([-1.5, 3], SofT-GRPO) or "none" (deterministic; tau is
            not applied).
        noise_scale: factor on the noise, a float or [B].
        seed, step, row_ids: the noise of a token is a function of (seed, step, row_ids[b], token id) alone, whatever
            the batch, the order, the dtype and the implementation; int or 0-d int64 tensor (step also [B]), and [B]
            int64 (default arange). seed None draws a fresh one from torch's generator.
        exponential: [B, V] Exp(1) draws in place of a seed.
        latent_mask: [B] bool, rows still in their latent run (default all).
        end_token_id: a row whose highest raw logit is this token ends: it gets no noise and is_latent False.

    Not differentiable. Raises ValueError or TypeError naming the argument; RuntimeError where `impl="triton"` cannot
    run."""
    check_tensor("logits", logits, [None, None])
    options = _checked(
        len(logits), logits, logits.shape[1], embedding, top_k=top_k, top_p=top_p, tau=tau, noise=noise,
        noise_scale=noise_scale, seed=seed, step=step, row_ids=row_ids, exponential=exponential,
        latent_mask=latent_mask, end_token_id=end_token_id,
    )  # fmt: skip
    if resolve("latent_step", impl, logits, beyond=_beyond_kernel(top_k)) == "triton":
        from latent_kernels._triton.latent_step import select
        from latent_kernels._triton.lm_head import logits_sidecar

        return select(logits_sidecar(logits), embedding, **options)
    return latent_step_from_logits_eager(logits.to(compute_dtype(logits)), embedding, **options)


@torch.no_grad()
@on_its_device
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
    found, _ = latent_step_with_logits(
        hidden, lm_head, embedding, top_k=top_k, top_p=top_p, tau=tau, noise=noise, noise_scale=noise_scale, seed=seed,
        step=step, row_ids=row_ids, exponential=exponential, latent_mask=latent_mask, end_token_id=end_token_id,
        impl=impl,
    )  # fmt: skip
    return found


@torch.no_grad()
@on_its_device
def latent_step_with_logits(
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
) -> tuple[LatentStep, Tensor]:
    """`latent_step`, and the logits [B, V] that it made on the way, for the text rows of a batch.

    Logits are float32, or float64 for float64 inputs. All else as in `latent_step`.
    """
    check_tensor("hidden", hidden, [None, None])
    check_tensor("lm_head", lm_head, [None, hidden.shape[1]], like=hidden)
    options = _checked(
        len(hidden), hidden, len(lm_head), embedding, top_k=top_k, top_p=top_p, tau=tau, noise=noise,
        noise_scale=noise_scale, seed=seed, step=step, row_ids=row_ids, exponential=exponential,
        latent_mask=latent_mask, end_token_id=end_token_id,
    )  # fmt: skip
    if resolve("latent_step", impl, hidden, lm_head, beyond=_beyond_kernel(top_k)) == "triton":
        from latent_kernels._triton.latent_step import select

        sidecar = _sidecar(hidden, lm_head)
        return select(sidecar, embedding, **options), sidecar.logits[:, : len(lm_head)]
    logits = project(hidden, lm_head)
    return latent_step_from_logits_eager(logits, embedding, **options), logits


def _sidecar(hidden: Tensor, lm_head: Tensor) -> Sidecar:
    """Logits of the LM head and what the selection needs to know of them, by the route for this shape."""
    from latent_kernels._triton.lm_head import lm_head_sidecar, logits_sidecar
    from latent_kernels._triton.lm_head_routes import Route, choose

    def run(route: Route) -> Sidecar:
        if route is None:
            return logits_sidecar(project(hidden, lm_head))
        return lm_head_sidecar(hidden, lm_head, route)

    return run(choose(hidden, lm_head, run))


def _beyond_kernel(top_k: int) -> str | None:
    return f"takes a top_k of at most {MAX_TOP_K}, got {top_k}" if top_k > MAX_TOP_K else None


def _checked(
    rows: int, like: Tensor, vocab: int, embedding: Tensor, *, top_k: int, top_p: float | Tensor, tau: float | Tensor,
    noise: str, noise_scale: float | Tensor, seed: int | Tensor | None, step: int | Tensor, row_ids: Tensor | None,
    exponential: Tensor | None, latent_mask: Tensor | None, end_token_id: int | None,
) -> dict[str, Any]:  # fmt: skip
    """Checks the arguments that both operators share; returns those of either implementation."""
    check_tensor("embedding", embedding, [vocab, None], like=like)
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        raise TypeError(f"top_k must be an int, got {type(top_k).__name__}")
    if not 1 <= top_k <= vocab:
        raise ValueError(f"top_k must be between 1 and the vocabulary size {vocab}, got {top_k}")
    check_row_range("top_p", top_p, rows, like, 0.0, 1.0)
    check_row_range("tau", tau, rows, like, 0.0, open_low=True)
    check_noise(rows, vocab, like, noise, noise_scale, seed, step, row_ids, exponential, step_a_row=True)
    if latent_mask is not None:
        check_tensor("latent_mask", latent_mask, [rows], (torch.bool,), like=like)
    if end_token_id is not None and (isinstance(end_token_id, bool) or not isinstance(end_token_id, int)):
        raise TypeError(f"end_token_id must be an int, got {type(end_token_id).__name__}")
    if end_token_id is not None and not 0 <= end_token_id < vocab:
        raise ValueError(f"end_token_id must be between 0 and {vocab - 1}, got {end_token_id}")
    if seed is None and exponential is None and noise != "none":
        seed = draw_seed()
    spec = NoiseSpec(noise, noise_scale, seed, step, row_ids, exponential)
    return {
        "top_k": top_k, "top_p": top_p, "tau": tau, "noise": spec, "latent_mask": latent_mask,
        "end_token_id": end_token_id,
    }  # fmt: skip
