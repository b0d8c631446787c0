"""Log-probabilities of trajectories that mix text and latent steps.

Text row:    log_softmax(logits / T)[token]
Latent row:  f = mean_k(-d_k - exp(-d_k)),  d_k = score_k - log_softmax(logits)[id_k]

Gradient:    dlogits = (1/K) sum_k c_k (onehot(id_k) - softmax(logits)),  c_k = 1 - exp(-d_k) (Eq. 15-17), and
             (onehot(token) - softmax(logits / T)) / T on a text row.

From hidden states the logits live one chunk of rows at a time. The gradient with respect to `hidden` of a log-prob is
taken in the forward pass, [N, D], while the chunk is alive, so that a frozen head costs two products and not three; the
head's own gradient, where asked for, needs the upstream gradient and recomputes the chunks in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from latent_kernels._chunks import chunk_buffer, dlogits_dtype, row_chunks
from latent_kernels._dispatch import components_limit, on_input_device, resolve
from latent_kernels._eager.latent_logprob import logprob_rows_, score_rows
from latent_kernels._linear import add_outer_, back_project, project
from latent_kernels._loss_types import LogprobSpec, RowScores
from latent_kernels._validate import check_choice, check_components, check_range, check_tensor
from latent_kernels.reference import compute_dtype

MARGIN_GRADIENTS = ("aligned", "released", "none")

ScoreRows = Callable[..., RowScores]  # `logprob_rows_` of one of the implementations


def _score_from_logits(logits: Tensor, spec: LogprobSpec) -> Tensor:
    """The log-probs alone."""
    dtype = compute_dtype(logits)
    parts = row_chunks(len(logits), logits.shape[1], dtype, logits.device)
    found = [score_rows(logits[part].to(dtype), spec.rows(part)) for part in parts]
    return found[0] if len(found) == 1 else torch.cat([logits.new_empty(0, dtype=dtype), *found])


class _FromLogits(torch.autograd.Function):
    """Saves the logits; the backward pass recomputes their exponentials chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, spec: LogprobSpec) -> Tensor:
        ctx.spec = spec
        ctx.save_for_backward(logits)
        return _score_from_logits(logits, spec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        for part in row_chunks(len(logits), logits.shape[1], grad.dtype, logits.device):
            chunk = logits[part].to(grad.dtype, copy=True)
            slope = logprob_rows_(chunk, ctx.spec.rows(part), grad.dtype, grad[part]).slope
            assert slope is not None
            out[part] = slope
        return out, None


class _FromHidden(torch.autograd.Function):
    """Saves d logprob / d hidden [N, D], and hidden and head only where the head wants a gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, lm_head: Tensor, spec: LogprobSpec, rows: ScoreRows) -> Tensor:
        dtype = compute_dtype(hidden, lm_head)
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        gradient = torch.empty(hidden.shape, dtype=dtype, device=hidden.device) if wants_hidden else None
        out = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        chunks = row_chunks(len(hidden), len(lm_head), dtype, hidden.device)
        buffer = chunk_buffer(chunks, len(lm_head), dtype, hidden.device)
        for part in chunks:
            logits = project(hidden[part], lm_head, buffer[: part.stop - part.start])
            found = rows(logits, spec.rows(part), dlogits_dtype(hidden, lm_head, dtype) if wants_hidden else None)
            out[part] = found.logprob
            if gradient is not None and found.slope is not None:
                gradient[part] = back_project(found.slope, lm_head)
        ctx.spec, ctx.rows, ctx.hidden_dtype = spec, rows, hidden.dtype
        ctx.save_for_backward(gradient, *((hidden, lm_head) if wants_head else ()))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        gradient, *saved = ctx.saved_tensors
        hidden_grad = None if gradient is None else (gradient * grad.unsqueeze(-1)).to(ctx.hidden_dtype)
        head_grad = None
        if saved:
            hidden, lm_head = saved
            head_grad = torch.zeros(lm_head.shape, dtype=grad.dtype, device=lm_head.device)
            stored = dlogits_dtype(hidden, lm_head, grad.dtype)
            chunks = row_chunks(len(hidden), len(lm_head), grad.dtype, hidden.device)
            buffer = chunk_buffer(chunks, len(lm_head), grad.dtype, hidden.device)
            for part in chunks:
                logits = project(hidden[part], lm_head, buffer[: part.stop - part.start])
                slope = ctx.rows(logits, ctx.spec.rows(part), stored, grad[part]).slope
                add_outer_(head_grad, slope, hidden[part])
            head_grad = head_grad.to(lm_head.dtype)
        return hidden_grad, head_grad, None, None


def check_logprob_options(
    ids: Tensor,
    scores: Tensor,
    rows: int,
    like: Tensor,
    temperature: float,
    advantages: Tensor | None,
    margin_gradient: str,
) -> None:
    """The arguments that every log-prob operator shares."""
    check_components(ids, scores, rows, like)
    check_range("temperature", temperature, 0.0, open_low=True)
    check_choice("margin_gradient", margin_gradient, MARGIN_GRADIENTS)
    if advantages is not None:
        check_tensor("advantages", advantages, [rows], like=like)


@on_input_device
def latent_logprob_from_logits(
    logits: Tensor,  # [N, V]
    ids: Tensor,  # [N, K] int64
    scores: Tensor,  # [N, K]
    *,
    temperature: float = 1.0,
    advantages: Tensor | None = None,  # [N]
    margin_gradient: str = "aligned",
    impl: str = "auto",
) -> Tensor:
    """Log-probs [N] of text and latent rows from logits; differentiable in `logits` (SPEC 4; Eq. 15-17).

    Args:
        logits: [N, V], any float dtype; computed in float32 (float64 for float64).
        ids: [N, K] int64. -100 in `ids[:, 1:]` marks a text row, whose token is `ids[:, 0]`.
        scores: [N, K], the sampled scores of a latent row's components; not read on text rows.
        temperature: sampling temperature of text rows; latent rows are always at 1.
        advantages: [N] or None; only their sign is read, by `margin_gradient`.
        margin_gradient: backward coefficient of a component whose margin is negative on a row whose advantage is not
            positive: "aligned" (1 - exp(-|d|), the paper), "released" (exp(d) - 1), "none" (1 - exp(-d)).

    The exponent of exp(-d) is held at 40. Returns float32 (float64 for float64 logits).
    Raises ValueError or TypeError naming the argument; RuntimeError where `impl="triton"` cannot run.
    """
    check_tensor("logits", logits, [None, None])
    check_logprob_options(ids, scores, len(logits), logits, temperature, advantages, margin_gradient)
    spec = LogprobSpec(ids, scores, advantages, temperature, margin_gradient)
    out: Tensor
    if resolve("latent_logprob_from_logits", impl, logits, unsupported=components_limit(ids.shape[1])) == "triton":
        from latent_kernels._triton import latent_logprob as kernel

        out = kernel.FromLogits.apply(logits, spec)
    elif not (torch.is_grad_enabled() and logits.requires_grad):
        out = _score_from_logits(logits, spec)
    else:
        out = _FromLogits.apply(logits, spec)
    return out


@on_input_device
def latent_logprob(
    hidden: Tensor,  # [N, D]
    lm_head: Tensor,  # [V, D]
    ids: Tensor,  # [N, K] int64
    scores: Tensor,  # [N, K]
    *,
    temperature: float = 1.0,
    advantages: Tensor | None = None,  # [N]
    margin_gradient: str = "aligned",
    impl: str = "auto",
) -> Tensor:
    """`latent_logprob_from_logits(hidden @ lm_head.T, ...)` [N] without ever holding [N, V] (SPEC 4; Eq. 15-17).

    Differentiable in `hidden` [N, D] and `lm_head` [V, D], which may differ in dtype; products are accumulated in
    float32. Everything else as in `latent_logprob_from_logits`.
    """
    check_tensor("hidden", hidden, [None, None])
    check_tensor("lm_head", lm_head, [None, hidden.shape[1]], like=hidden)
    check_logprob_options(ids, scores, len(hidden), hidden, temperature, advantages, margin_gradient)
    rows: ScoreRows = logprob_rows_
    if resolve("latent_logprob", impl, hidden, lm_head, unsupported=components_limit(ids.shape[1])) == "triton":
        from latent_kernels._triton.latent_logprob import logprob_rows_ as rows
    if not torch.is_grad_enabled():  # else the forward pass takes gradients that no backward pass will ask for
        hidden, lm_head = hidden.detach(), lm_head.detach()
    spec = LogprobSpec(ids, scores, advantages, temperature, margin_gradient)
    out: Tensor = _FromHidden.apply(hidden, lm_head, spec, rows)
    return out
