"""Log-probs of text and latent rows of logits, and their gradient in the logits (Eq. 15-17).

Inputs: logits [n, V] in float32 or a 16-bit dtype, or the product with an LM head from which they follow
(`latent_kernels._triton.head`); ids [n, K] int64; scores [n, K]; advantages [n] or None. All arithmetic is in float32.
p is the softmax of the row.

    text row    log p(token),  p = softmax(logits / T),   dlogits = (onehot(token) - p) / T
    latent row  f = mean_k(-d_k - exp(-d_k)),             dlogits = 1/K sum_k c_k (onehot(id_k) - p)
                d_k = score_k - log p(id_k),              c_k = 1 - exp(-d_k)

The method "multiplex" sums log p(id_k), so c_k = 1. "soft_grpo" depends on the K picked logits alone, see `soft_terms`.

Outputs: log-prob [n] (or [n, K], of components), log Z and entropy [n] float32; crossed margins [n] int32; dlogits
[n, V], the gradient of the log-prob (or of `upstream * logprob + bonus * entropy`) in the logits or the product. It may
overwrite them.

Over a product, a float16 gradient is stored relative to a power of two per row, which is an output [n]. float16 ends at
65,504, and the gradients that follow from a larger one may be small.

One program owns one row. It passes over the row once for the log-sum-exp and, for the gradient, once more from its end
to its start, so that what it read last is still in cache. The gradient of a row is a multiple of its softmax everywhere
except at its K components. These are stored last, each as one complete value. There are no atomics, so results repeat
bit for bit. V elements of a row are read for the log-probs, and V read and V written for the gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from latent_kernels._loss_types import LogprobSpec, RowForward, RowGradient, RowScores
from latent_kernels._operator import once_differentiable
from latent_kernels._triton.common import MAX_REGISTERS
from latent_kernels._triton.head import bias_argument, factor_arguments, head_constants, read_capped
from latent_kernels._triton.latent_logprob_terms import (
    MARGINS,
    METHODS,
    range_scale,
    row_components,
    row_log_z,
    row_log_z_and_entropy,
    row_scores,
    store_dlogits,
    store_scores,
    sum_of_coefficients,
)
from latent_kernels._types import PLAIN_HEAD, HeadOptions

BLOCK_V, NUM_WARPS = 8192, 16  # 16 elements per thread
WIDE = 32  # components of a row whose comparison needs many registers
REGISTERS = 65536  # per multiprocessor


# These pointers are read or written once per row, so their alignment is not worth another compiled variant.
@triton.jit(
    do_not_specialize_on_alignment=[
        "advantages_ptr", "upstream_ptr", "logprob_ptr", "log_z_ptr", "crossed_ptr", "entropy_ptr", "bonus_ptr",
        "scale_ptr",
    ]
)  # fmt: skip
def latent_logprob_kernel(
    logits_ptr, ids_ptr, scores_ptr, advantages_ptr, upstream_ptr, logprob_ptr, log_z_ptr, crossed_ptr, dlogits_ptr,
    entropy_ptr, bonus_ptr, scale_ptr, bias_ptr, logits_stride, dlogits_stride, V, inverse_temperature, inner, outer,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, MARGIN: tl.constexpr, FORWARD: tl.constexpr,
    DLOGITS: tl.constexpr, HAS_UPSTREAM: tl.constexpr, ENTROPY: tl.constexpr, METHOD: tl.constexpr,
    COMPONENTS: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, RELATIVE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # n * V may exceed 2^31
    row_ptr = logits_ptr + row * logits_stride
    ids, used, valid, hard, exist = row_components(ids_ptr, row, V, K, BLOCK_K)
    # The temperature is that of text rows only.
    inverse_temperature = tl.where(hard, inverse_temperature, 1.0) * outer
    slope = inverse_temperature * inner
    entropy, bonus = 0.0, 0.0
    if FORWARD:
        if ENTROPY:
            log_z, entropy = row_log_z_and_entropy(
                row_ptr, bias_ptr, V, inverse_temperature, inner, BLOCK_V, HAS_BIAS, SOFTCAP
            )
            tl.store(entropy_ptr + row, tl.where(hard, entropy, 0.0))
        else:
            log_z = row_log_z(row_ptr, bias_ptr, V, inverse_temperature, inner, BLOCK_V, HAS_BIAS, SOFTCAP)
        tl.store(log_z_ptr + row, log_z)
    else:
        log_z = tl.load(log_z_ptr + row)
        if ENTROPY:
            entropy = tl.load(entropy_ptr + row)
            bonus = tl.load(bonus_ptr + row) * slope

    picked = read_capped(row_ptr, bias_ptr, ids, valid, inner, float("nan"), HAS_BIAS, SOFTCAP)
    log_probs = picked * inverse_temperature - log_z
    latent, component_coefficients, margins = row_scores(
        scores_ptr, advantages_ptr, row, log_probs, used, K, BLOCK_K, MARGIN, METHOD
    )
    if FORWARD:
        store_scores(
            logprob_ptr, crossed_ptr, row, log_probs, latent, margins, used, valid, hard, exist, K, BLOCK_K, COMPONENTS
        )
    if DLOGITS:
        coefficients = tl.where(valid, tl.where(hard, 1.0, component_coefficients), 0.0)
        factor = slope
        if HAS_UPSTREAM and COMPONENTS:
            at = upstream_ptr + row * K + tl.arange(0, BLOCK_K)
            coefficients = tl.load(at, mask=valid, other=0.0)  # of log-probs that add up
        elif HAS_UPSTREAM:
            factor = slope * tl.load(upstream_ptr + row)
        total = sum_of_coefficients(coefficients, hard, METHOD)
        shrink = 1.0
        if RELATIVE:
            bound = tl.abs(factor) * (tl.sum(tl.abs(coefficients), 0) + tl.abs(total))
            scale = range_scale(bound + tl.abs(bonus) * (1.0 + entropy))
            tl.store(scale_ptr + row, scale)
            shrink = 1.0 / scale
        store_dlogits(
            row_ptr, bias_ptr, dlogits_ptr + row * dlogits_stride, V, ids, valid, picked, log_probs, coefficients,
            total, log_z, inverse_temperature, inner, factor, entropy, bonus, shrink, ENTROPY, BLOCK_V, HAS_BIAS,
            SOFTCAP, RELATIVE,
        )  # fmt: skip


def block_v(vocab: int, width: int, head: HeadOptions) -> int:
    """Return how many logits a program reads at a time.

    A K x K comparison and the bits of a soft cap leave room for half a tile, with as many elements per thread.
    """
    largest = BLOCK_V // 2 if width > WIDE and head.softcap is not None else BLOCK_V
    return min(largest, max(128, triton.next_power_of_2(vocab)))


def constants(
    vocab: int, width: int, margin_gradient: str, *, forward: bool, dlogits: bool, upstream: bool,
    entropy: bool = False, method: str = "latent_grpo", components: bool = False, head: HeadOptions = PLAIN_HEAD,
    relative: bool = False,
) -> dict[str, int | bool]:  # fmt: skip
    """Return the constants of the kernel."""
    return {
        "K": width, "BLOCK_K": triton.next_power_of_2(width), "BLOCK_V": block_v(vocab, width, head),
        "MARGIN": MARGINS[margin_gradient], "FORWARD": forward, "DLOGITS": dlogits, "HAS_UPSTREAM": upstream,
        "ENTROPY": entropy, "METHOD": METHODS[method], "COMPONENTS": components, "RELATIVE": relative,
        **head_constants(head),
    }  # fmt: skip


def launch_options(vocab: int, width: int, head: HeadOptions) -> dict[str, int]:
    """Return the number of warps, and the largest number of registers that so many threads can have.

    Without the limit, ptxas spills to stay under half of it.
    """
    warps = max(1, block_v(vocab, width, head) * NUM_WARPS // BLOCK_V)
    return {"num_warps": warps, "maxnreg": min(MAX_REGISTERS, REGISTERS // (32 * warps))}


class RowOutputs(NamedTuple):
    """What the forward pass writes for each row."""

    logprob: Tensor  # [n] float32, or [n, K] with one per component
    log_z: Tensor  # [n] float32
    crossed: Tensor  # [n] int32


def _row_outputs(logits: Tensor, spec: LogprobSpec) -> RowOutputs:
    """Allocate the outputs of the forward pass."""
    rows, device = len(logits), logits.device
    logprob = torch.empty(spec.ids.shape if spec.components else rows, dtype=torch.float32, device=device)
    log_z = torch.empty(rows, dtype=torch.float32, device=device)
    return RowOutputs(logprob, log_z, torch.empty(rows, dtype=torch.int32, device=device))


def _launch(
    logits: Tensor, spec: LogprobSpec, log_z: Tensor, *, outputs: RowOutputs | None = None,
    dlogits: Tensor | None = None, upstream: Tensor | None = None, entropy: Tensor | None = None,
    bonus: Tensor | None = None, scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Launch the kernel on logits [n, V].

    With `outputs` it writes them, with log_z and, if given, entropy [n]; without, it reads log_z and entropy. With
    `dlogits` [n, V] it writes the gradient, and with `scale` [n] what its rows are relative to.
    """
    rows, vocab = logits.shape
    if not rows:
        return
    margin = spec.margin_gradient if spec.advantages is not None and spec.method == "latent_grpo" else "none"
    unused = logits  # in the place of a tensor that the kernel neither reads nor writes
    chosen = constants(
        vocab,
        spec.ids.shape[1],
        margin,
        forward=outputs is not None,
        dlogits=dlogits is not None,
        upstream=upstream is not None,
        entropy=entropy is not None,
        method=spec.method,
        components=spec.components,
        head=spec.head,
        relative=scale is not None,
    )
    latent_logprob_kernel[(rows,)](
        logits_ptr=logits, ids_ptr=spec.ids.contiguous(), scores_ptr=spec.scores.contiguous(),
        advantages_ptr=unused if spec.advantages is None else spec.advantages.contiguous(),
        upstream_ptr=unused if upstream is None else upstream.contiguous(),
        logprob_ptr=unused if outputs is None else outputs.logprob, log_z_ptr=log_z,
        crossed_ptr=unused if outputs is None else outputs.crossed,
        dlogits_ptr=unused if dlogits is None else dlogits, entropy_ptr=unused if entropy is None else entropy,
        bonus_ptr=unused if bonus is None else bonus.contiguous(), scale_ptr=unused if scale is None else scale,
        bias_ptr=bias_argument(spec.head, unused), logits_stride=logits.stride(0),
        dlogits_stride=0 if dlogits is None else dlogits.stride(0), V=vocab,
        inverse_temperature=1.0 / spec.temperature, **factor_arguments(spec.head), **chosen,
        **launch_options(vocab, spec.ids.shape[1], spec.head),
    )  # fmt: skip


def dlogits_view(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return where the gradient of float32 logits [n, V] goes: over them, or over the second half of each row's bytes.

    The second half is for a dtype narrower than float32. The rows of logits must be the starts of whole rows of their
    buffer, whose length is the stride of logits.
    """
    if dtype == logits.dtype:
        return logits
    (rows, vocab), stride = logits.shape, logits.stride(0)
    return logits.as_strided((rows, stride), (stride, 1)).view(dtype)[:, stride : stride + vocab]


def _gradient_over(logits: Tensor, dtype: torch.dtype) -> RowGradient:
    """Return where the gradient of float32 products [n, V] goes, and what its rows are relative to in float16."""
    scale = torch.empty(len(logits), dtype=torch.float32, device=logits.device) if dtype == torch.float16 else None
    return RowGradient(dlogits_view(logits, dtype), scale)


def logprob_rows_(
    logits: Tensor, spec: LogprobSpec, dtype: torch.dtype | None, upstream: Tensor | None = None
) -> RowScores:
    """Return the log-probs of float32 products [n, V], and overwrite the products with their gradient in `dtype`.

    If `dtype` is None, there is no gradient and the products stay. `upstream` has the shape of the log-probs and scales
    the gradient.
    """
    outputs = _row_outputs(logits, spec)
    if dtype is None:
        _launch(logits, spec, outputs.log_z, outputs=outputs)
        return RowScores(outputs.logprob, outputs.crossed, None)
    gradient = _gradient_over(logits, dtype)
    _launch(
        logits, spec, outputs.log_z, outputs=outputs, dlogits=gradient.dlogits, scale=gradient.scale, upstream=upstream
    )  # fmt: skip
    return RowScores(outputs.logprob, outputs.crossed, gradient)


def forward_rows(logits: Tensor, spec: LogprobSpec, *, entropy: bool) -> RowForward:
    """Return the log-probs of float32 products [n, V] and, if wanted, the entropies of text rows. The products stay."""
    outputs = _row_outputs(logits, spec)
    nats = torch.empty_like(outputs.log_z) if entropy else None
    _launch(logits, spec, outputs.log_z, outputs=outputs, entropy=nats)
    return RowForward(outputs.logprob, outputs.crossed, outputs.log_z, nats)


def backward_rows_(
    logits: Tensor, spec: LogprobSpec, scored: RowForward, dtype: torch.dtype, upstream: Tensor, bonus: Tensor | None
) -> RowGradient:
    """Overwrite products [n, V] with the gradient, in `dtype`, of `upstream * logprob + bonus * entropy`.

    `upstream` has the shape of the log-probs. `bonus` [n] is 0 on latent rows. It is None without entropies.
    """
    gradient = _gradient_over(logits, dtype)
    _launch(
        logits, spec, scored.log_z, dlogits=gradient.dlogits, scale=gradient.scale, upstream=upstream,
        entropy=scored.entropy, bonus=bonus,
    )  # fmt: skip
    return gradient


class FromLogits(torch.autograd.Function):
    """Log-probs of logits. Saves the logits [n, V] and log Z [n]; the backward pass reads the logits once."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, spec: LogprobSpec) -> Tensor:
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        outputs = _row_outputs(logits, spec)
        _launch(logits, spec, outputs.log_z, outputs=outputs)
        ctx.spec = spec
        ctx.save_for_backward(logits, outputs.log_z, *spec.rows)
        return outputs.logprob

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, log_z, *rows = ctx.saved_tensors
        dlogits = torch.empty_like(logits)
        _launch(logits, ctx.spec.with_rows(*rows), log_z, dlogits=dlogits, upstream=grad)
        return dlogits, None
