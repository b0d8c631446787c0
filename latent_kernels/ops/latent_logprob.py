"""Log-probabilities of trajectories that mix text and latent steps (Eq. 15-17).

Text row:    log_softmax(logits / T)[token]
Latent row:  f = mean_k(-d_k - exp(-d_k)),  d_k = score_k - log_softmax(logits)[id_k]

Gradient:    dlogits = (1/K) sum_k c_k (onehot(id_k) - softmax(logits)),  c_k = 1 - exp(-d_k), on a latent row, and
             (onehot(token) - softmax(logits / T)) / T on a text row.

These are the rows of Latent-GRPO. Two other methods have other latent rows (see `latent_logprob_from_logits`):

SofT-GRPO:   f over the K components alone, with clamped margins
Multiplex:   sum_k log_softmax(logits)[id_k], exact; dlogits = sum_k (onehot(id_k) - softmax(logits))

Logits are those of `latent_kernels._types.HeadOptions`: the gradient in the product with the head is dlogits times the
scale, and times 1 - (z / softcap)^2 under a soft cap. The bias has the sum of it over the rows.

`latent_logprob` makes the logits of one chunk of rows at a time. The gradient of a log-prob in `hidden`, [N, D], is
computed in the forward pass while its chunk is alive. So a frozen head costs two products instead of three. The
gradient in the head, if wanted, needs the upstream gradient. The backward pass recomputes the chunks for it, and for
every gradient of log-probs of components, which are K numbers per row.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from latent_kernels._chunks import chunk_buffer, dlogits_dtype, row_chunks
from latent_kernels._dispatch import components_limit, on_input_device, resolve
from latent_kernels._eager.latent_logprob import logprob_rows_, score_rows
from latent_kernels._eager.streamed_logprob import streamed_chunks, streamed_logprob
from latent_kernels._linear import add_outer_, add_rows_, back_project, project
from latent_kernels._loss_types import LogprobSpec, RowScores
from latent_kernels._operator import once_differentiable, operator, single
from latent_kernels._scored_chunks import plan_chunks
from latent_kernels._types import METHODS, HeadOptions
from latent_kernels._validate import (
    FLOAT32_MAX,
    check_choice,
    check_components,
    check_flag,
    check_head,
    check_range,
    check_tensor,
)
from latent_kernels.reference.latent_step import compute_dtype

MARGIN_GRADIENTS = ("aligned", "released", "none")

LogprobRowsFn = Callable[..., RowScores]  # `logprob_rows_` of one of the implementations


def _score_from_logits(logits: Tensor, spec: LogprobSpec) -> Tensor:
    """Return the log-probs [N], or [N, K] of components, without a gradient."""
    dtype = compute_dtype(logits)
    chunks = row_chunks(len(logits), logits.shape[1], dtype, logits.device)
    scored = [score_rows(logits[chunk].to(dtype), spec.select(chunk)) for chunk in chunks]
    return scored[0] if len(scored) == 1 else torch.cat([logits.new_empty(_shape(0, spec), dtype=dtype), *scored])


def _shape(rows: int, spec: LogprobSpec) -> list[int]:
    """Return the shape of the log-probs of `rows` rows."""
    return [rows, spec.ids.shape[1]] if spec.components else [rows]


class _FromLogits(torch.autograd.Function):
    """Log-probs of logits. Saves the logits; the backward pass recomputes their exponentials chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, spec: LogprobSpec) -> Tensor:
        ctx.spec = spec
        ctx.save_for_backward(logits, *spec.rows)
        return _score_from_logits(logits, spec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, *rows = ctx.saved_tensors
        spec = ctx.spec.with_rows(*rows)
        grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        for chunk in row_chunks(len(logits), logits.shape[1], grad.dtype, logits.device):
            # `logprob_rows_` overwrites its input, and the logits belong to the caller.
            overwritten = logits[chunk].to(grad.dtype, copy=True)
            gradient = logprob_rows_(overwritten, spec.select(chunk), grad.dtype, grad[chunk]).gradient
            assert gradient is not None
            grad_logits[chunk] = gradient.dlogits
        return grad_logits, None


class _FromHidden(torch.autograd.Function):
    """Log-probs of hidden states.

    Saves d logprob / d hidden [N, D], and the inputs only if head or bias want a gradient. With log-probs of components
    it saves the inputs alone. The options of the head are in the spec, except the bias.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        lm_head: Tensor,
        bias: Tensor | None,
        spec: LogprobSpec,
        logprob_rows_fn: LogprobRowsFn,
        scaled_exp: ModuleType | None,
    ) -> Tensor:
        dtype = compute_dtype(hidden, lm_head)
        wants_hidden, wants_head, wants_bias = ctx.needs_input_grad[:3]
        at_once = wants_hidden and not spec.components
        dhidden = torch.empty(hidden.shape, dtype=dtype, device=hidden.device) if at_once else None
        logprob = torch.empty(_shape(len(hidden), spec), dtype=dtype, device=hidden.device)
        given = with_bias(spec, bias)
        if logprob_rows_fn is logprob_rows_ and hidden.device.type == "cpu" and not spec.components:
            for chunk in streamed_chunks(len(hidden)):
                scores = streamed_logprob(hidden[chunk], lm_head, given.select(chunk), wants_gradient=at_once)
                logprob[chunk] = scores.logprob
                if dhidden is not None and scores.dhidden is not None:
                    dhidden[chunk] = scores.dhidden
        else:
            stored_dtype = dlogits_dtype(hidden, lm_head, dtype) if at_once else None
            chunks = plan_chunks(len(hidden), hidden, lm_head, stored_dtype, logprob_rows_fn, scaled_exp, given.head)
            for chunk in chunks.slices:
                scored = chunks.score(hidden[chunk], lm_head, given.select(chunk))
                logprob[chunk] = scored.logprob
                if dhidden is not None and scored.gradient is not None:
                    dhidden[chunk] = back_project(scored.gradient.dlogits, lm_head, scored.gradient.scale)
        ctx.spec, ctx.logprob_rows_fn, ctx.hidden_dtype = spec, logprob_rows_fn, hidden.dtype
        recomputes = wants_head or wants_bias or spec.components
        ctx.save_for_backward(dhidden, *((hidden, lm_head, bias, *spec.rows) if recomputes else ()))
        return logprob

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, *saved = ctx.saved_tensors
        grad_hidden = None if dhidden is None else (dhidden * grad.unsqueeze(-1)).to(ctx.hidden_dtype)
        grad_head = grad_bias = None
        if saved:
            recomputed, grad_head, grad_bias = _recomputed_gradients(ctx, grad, *saved)
            grad_hidden = recomputed if grad_hidden is None else grad_hidden
        return grad_hidden, grad_head, grad_bias, None, None, None


def with_bias(spec: LogprobSpec, bias: Tensor | None) -> LogprobSpec:
    """Return the spec with the bias of its head."""
    return spec if bias is None else spec._replace(head=spec.head._replace(bias=bias))


def _recomputed_gradients(
    ctx: Any, grad: Tensor, hidden: Tensor, lm_head: Tensor, bias: Tensor | None, *rows: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return the gradients in hidden, head and bias, from chunks of logits that are computed again.

    The gradient in hidden is None if the forward pass has computed it.
    """
    wants_hidden, wants_head, wants_bias = ctx.needs_input_grad[:3]
    spec, device = with_bias(ctx.spec.with_rows(*rows), bias), hidden.device
    grad_hidden = torch.empty_like(hidden) if wants_hidden and spec.components else None
    grad_head = torch.zeros(lm_head.shape, dtype=grad.dtype, device=device) if wants_head else None
    grad_bias = torch.zeros(len(lm_head), dtype=grad.dtype, device=device) if wants_bias else None
    stored_dtype = dlogits_dtype(hidden, lm_head, grad.dtype)
    chunks = row_chunks(len(hidden), len(lm_head), grad.dtype, device)
    buffer = chunk_buffer(chunks, len(lm_head), grad.dtype, device)
    for chunk in chunks:
        product = project(hidden[chunk], lm_head, buffer[: chunk.stop - chunk.start])
        dlogits, scale = ctx.logprob_rows_fn(product, spec.select(chunk), stored_dtype, grad[chunk]).gradient
        if grad_hidden is not None:
            grad_hidden[chunk] = back_project(dlogits, lm_head, scale).to(hidden.dtype)
        if grad_head is not None:
            add_outer_(grad_head, dlogits, hidden[chunk], scale)
        if grad_bias is not None:
            add_rows_(grad_bias, dlogits, scale)
    grad_head = None if grad_head is None else grad_head.to(lm_head.dtype)
    return grad_hidden, grad_head, None if bias is None or grad_bias is None else grad_bias.to(bias.dtype)


def check_logprob_options(
    ids: Tensor,
    scores: Tensor,
    num_rows: int,
    like: Tensor,
    temperature: float,
    advantages: Tensor | None,
    margin_gradient: str,
    method: str,
    components: bool,
) -> None:
    """Check the arguments that every log-prob operator shares."""
    check_components(ids, scores, num_rows, like)
    check_range("temperature", temperature, 0.0, FLOAT32_MAX, open_low=True)
    check_choice("margin_gradient", margin_gradient, MARGIN_GRADIENTS)
    check_choice("method", method, METHODS)
    check_flag("components", components)
    if components and method != "multiplex":
        raise ValueError(f"method is {method!r}: a step has one log-prob per component only with 'multiplex'")
    if advantages is not None:
        check_tensor("advantages", advantages, [num_rows], like=like)


def _shapes_from_logits(logits: Tensor, ids: Tensor, components: bool = False, **_: Any) -> list[Tensor]:
    return [logits.new_empty(ids.shape if components else ids.shape[:1], dtype=compute_dtype(logits))]


def _shapes_from_hidden(
    hidden: Tensor, lm_head: Tensor, ids: Tensor, components: bool = False, **_: Any
) -> list[Tensor]:
    return [hidden.new_empty(ids.shape if components else ids.shape[:1], dtype=compute_dtype(hidden, lm_head))]


@operator(differentiable=("logits",), shapes=_shapes_from_logits, result=single)
@on_input_device
def latent_logprob_from_logits(
    logits: Tensor,  # [N, V]
    ids: Tensor,  # [N, K] int64
    scores: Tensor,  # [N, K]
    *,
    temperature: float = 1.0,
    advantages: Tensor | None = None,  # [N]
    margin_gradient: str = "aligned",
    method: str = "latent_grpo",
    components: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Return the log-probs [N] of text and latent rows from logits; differentiable in `logits` (Eq. 15-17).

    Args:
        logits: [N, V], any float dtype; computed in float32 (float64 for float64).
        ids: [N, K] int64. -100 in `ids[:, 1:]` marks a text row, whose token is `ids[:, 0]`. The log-prob of a row with
            any other id outside the vocabulary, also of a token of -100, is NaN, and has no gradient.
        scores: [N, K], the sampled scores of a latent row's components; not read on text rows.
        temperature: sampling temperature of text rows; latent rows are always at 1.
        advantages: [N] or None. Only their sign is read, for `margin_gradient`.
        margin_gradient: the coefficient c_k, in the backward pass, of a component with a negative margin d on a row
            whose advantage is not positive: "aligned" (1 - exp(-|d|), the paper), "released" (exp(d) - 1, the released
            code) or "none" (1 - exp(-d), as for other components). Only the method "latent_grpo" reads it.
        method: what the log-prob of a latent row is; a text row is the same in all:
            - "latent_grpo": the mean of -d_k - exp(-d_k), with d_k = score_k - log p(id_k).
            - "soft_grpo" (arXiv 2511.06411, as released): the same with d_k = score_k - log(q_k + 1e-6), q the softmax
              over the K components alone, d_k clamped to [-1.5, 3], and the mean over the components with
              log(q_k + 1e-6) > -3 (0 if there is none). A clamped d_k has no gradient. The released code also divides
              latent rows by the temperature, which is 1 there.
            - "multiplex" (arXiv 2601.08808): the sum of log p(id_k), exact; scores are not read, repeated ids add up.
        components: return the summands of "multiplex" one by one, [N, K]; 0 behind the token of a text row.

    The exponent of exp(-d) is at most 40. Returns float32 (float64 for float64 logits).
    Raises ValueError or TypeError naming the argument, and RuntimeError if `impl="triton"` cannot run.
    """
    check_tensor("logits", logits, [None, None])
    check_logprob_options(
        ids, scores, len(logits), logits, temperature, advantages, margin_gradient, method, components
    )
    spec = LogprobSpec(ids, scores, advantages, temperature, margin_gradient, method, components)
    logprob: Tensor
    if resolve("latent_logprob_from_logits", impl, logits, unsupported=components_limit(ids.shape[1])) == "triton":
        from latent_kernels._triton import latent_logprob as kernel

        logprob = kernel.FromLogits.apply(logits, spec)
    elif not (torch.is_grad_enabled() and logits.requires_grad):
        logprob = _score_from_logits(logits, spec)
    else:
        logprob = _FromLogits.apply(logits, spec)
    return logprob


@operator(differentiable=("hidden", "lm_head", "bias"), shapes=_shapes_from_hidden, result=single)
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
    method: str = "latent_grpo",
    components: bool = False,
    bias: Tensor | None = None,  # [V]
    logit_scale: float = 1.0,
    softcap: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Return the log-probs of `latent_logprob_from_logits` from hidden states, without ever holding [N, V] (Eq. 15-17).

    Args:
        bias: [V] or None, any float dtype.
        logit_scale: positive factor on the logits.
        softcap: positive bound of the logits, or None.

    The logits are z = logit_scale * (hidden @ lm_head.T + bias), and softcap * tanh(z / softcap) with a soft cap. The
    temperature divides them afterwards.

    Differentiable in `hidden` [N, D], `lm_head` [V, D] and `bias` [V], which may differ in dtype. Products are
    accumulated in float32. The other arguments are those of `latent_logprob_from_logits`.
    """
    head = HeadOptions(bias, logit_scale, softcap)
    check_tensor("hidden", hidden, [None, None])
    check_tensor("lm_head", lm_head, [None, hidden.shape[1]], like=hidden)
    check_head(head, len(lm_head), hidden)
    check_logprob_options(
        ids, scores, len(hidden), hidden, temperature, advantages, margin_gradient, method, components
    )
    logprob_rows_fn: LogprobRowsFn = logprob_rows_
    scaled_exp: ModuleType | None = None
    if resolve("latent_logprob", impl, hidden, lm_head, unsupported=components_limit(ids.shape[1])) == "triton":
        from latent_kernels._triton import scaled_exp
        from latent_kernels._triton.latent_logprob import logprob_rows_ as logprob_rows_fn
    # Under no_grad, inputs that require a gradient would still make the forward pass compute it.
    if not torch.is_grad_enabled():
        hidden, lm_head, bias = hidden.detach(), lm_head.detach(), None if bias is None else bias.detach()
    spec = LogprobSpec(
        ids, scores, advantages, temperature, margin_gradient, method, components, head._replace(bias=None)
    )
    logprob: Tensor = _FromHidden.apply(hidden, lm_head, bias, spec, logprob_rows_fn, scaled_exp)
    return logprob
