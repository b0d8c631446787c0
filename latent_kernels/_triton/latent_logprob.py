"""Log-probs of text and latent rows of logits, and their gradient in the logits (SPEC 4; Eq. 15-17).

One program owns one row and passes over it once for the log-sum-exp and, where the gradient is wanted, once more from
its end to its start, so that what it read last is still in cache. The gradient of a row is a multiple of its softmax
everywhere but at its K components: these are stored last, each as one complete value, with no atomics.

Bytes a row: V read for the log-probs; V read and V written for the gradient where log Z is known, and twice V read
(the second time mostly from cache) where it is not.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from latent_kernels import reference
from latent_kernels._loss_types import LogprobSpec, RowEntropies, RowScores
from latent_kernels._triton.common import MAX_REGISTERS

UNUSED_ID = tl.constexpr(reference.UNUSED_ID)
EXPONENT_MAX = tl.constexpr(reference.EXPONENT_MAX)
MARGIN_MAX = tl.constexpr(reference.MARGIN_MAX)  # exp(-MARGIN_MAX) is 0
FLOAT16_MAX = tl.constexpr(65504.0)
LOWEST = tl.constexpr(-3.0e38)  # below any logit that matters, and finite: differences from it are numbers
BLOCK_V, NUM_WARPS = 8192, 16  # 16 elements a thread
REGISTERS = 65536  # of a multiprocessor
MARGINS = {"none": 0, "aligned": 1, "released": 2}


@triton.jit
def row_log_z(row_ptr, V, inverse_temperature, BLOCK_V: tl.constexpr):
    """log sum exp(logits / T) of a row in one pass: every lane keeps a maximum and a sum, merged at the end."""
    v = tl.arange(0, BLOCK_V)
    highest = tl.full([BLOCK_V], LOWEST, dtype=tl.float32)
    total = tl.zeros([BLOCK_V], dtype=tl.float32)
    for start in range(0, V, BLOCK_V):
        z = tl.load(row_ptr + start + v, mask=start + v < V, other=-float("inf")).to(tl.float32) * inverse_temperature
        # One of the two exponentials of an online log-sum-exp is always that of 0.
        smaller = tl.exp(-tl.abs(z - highest))
        total = tl.where(z > highest, total * smaller + 1.0, total + smaller)
        highest = tl.maximum(highest, z)
    peak = tl.max(highest, 0)
    return peak + tl.log(tl.sum(total * tl.exp(highest - peak), 0))


@triton.jit
def row_log_z_and_entropy(row_ptr, V, inverse_temperature, BLOCK_V: tl.constexpr):
    """log sum exp(logits / T) of a row and the entropy of its softmax, in one pass.

    Every lane keeps a maximum, a sum of exponentials, and that sum weighted by the distances below the maximum, whose
    range ends where exponentials are 0: 0 * -inf is not a number.
    """
    v = tl.arange(0, BLOCK_V)
    highest = tl.full([BLOCK_V], LOWEST, dtype=tl.float32)
    total = tl.zeros([BLOCK_V], dtype=tl.float32)
    spread = tl.zeros([BLOCK_V], dtype=tl.float32)
    for start in range(0, V, BLOCK_V):
        z = tl.load(row_ptr + start + v, mask=start + v < V, other=-float("inf")).to(tl.float32) * inverse_temperature
        below = -tl.abs(z - highest)
        below = tl.where(below < -MARGIN_MAX, -MARGIN_MAX, below)
        smaller = tl.exp(below)
        spread = tl.where(z > highest, (spread + below * total) * smaller, spread + below * smaller)
        total = tl.where(z > highest, total * smaller + 1.0, total + smaller)
        highest = tl.maximum(highest, z)
    peak = tl.max(highest, 0)
    below = highest - peak
    below = tl.where(below < -MARGIN_MAX, -MARGIN_MAX, below)
    smaller = tl.exp(below)
    mass = tl.sum(total * smaller, 0)
    return peak + tl.log(mass), tl.log(mass) - tl.sum((spread + below * total) * smaller, 0) / mass


@triton.jit
def component_terms(log_probs, scores, replaced, MARGIN: tl.constexpr):
    """Terms of the surrogate, their slopes c_k, and the margins, of a row's components (Eq. 15-17).

    Slopes of margins below `replaced`, 0 or -inf, are replaced. Comparisons rather than minima hold the margins in
    their range: those would drop a NaN.
    """
    margin = scores - log_probs
    margin = tl.where(scores == -float("inf"), 0.0, tl.where(margin > MARGIN_MAX, MARGIN_MAX, margin))
    pull = tl.exp(tl.where(margin < -EXPONENT_MAX, EXPONENT_MAX, -margin))
    slope = 1.0 - pull
    if MARGIN > 0:
        flipped = 1.0 - tl.exp(-tl.abs(margin))
        slope = tl.where(margin < replaced, flipped if MARGIN == 1 else -flipped, slope)
    return -margin - pull, slope, margin


@triton.jit
def as_stored(value, DTYPE: tl.constexpr):
    """In the dtype of the slope; float16 ends at 65,504, and an infinite slope times no gradient is not a number."""
    if DTYPE.is_fp16():
        value = tl.where(value > FLOAT16_MAX, FLOAT16_MAX, tl.where(value < -FLOAT16_MAX, -FLOAT16_MAX, value))
    return value.to(DTYPE)


@triton.jit
def store_slope(
    row_ptr, slope_ptr, V, ids, found, log_probs, coefficients, log_z, inverse_temperature, factor, entropy, bonus,
    ENTROPY: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """factor * sum_k c_k (onehot(id_k) - softmax) of a row, which may overwrite the logits it is made from.

    With ENTROPY also bonus * -p (log p + entropy), the slope of bonus times the softmax's entropy.
    Where the slope is half as wide as the logits and lies in the second half of their bytes, a tile is written over
    itself and over tiles above it: hence from the end to the start, each tile read by all threads before it is written.
    """
    v = tl.arange(0, BLOCK_V)
    total = tl.sum(coefficients, 0)
    tiles = tl.cdiv(V, BLOCK_V)
    for tile in range(0, tiles):
        at = (tiles - 1 - tile) * BLOCK_V + v
        z = tl.load(row_ptr + at, mask=at < V, other=0.0).to(tl.float32) * inverse_temperature
        tl.debug_barrier()
        value = -factor * total * tl.exp(z - log_z)
        if ENTROPY:
            log_p = tl.where(z - log_z < -MARGIN_MAX, -MARGIN_MAX, z - log_z)
            value -= bonus * tl.exp(log_p) * (log_p + entropy)
        tl.store(slope_ptr + at, as_stored(value, slope_ptr.dtype.element_ty), mask=at < V)
    # Duplicates of an id all store the same value: what all of them contribute.
    shared = tl.sum(tl.where(ids[:, None] == ids[None, :], coefficients[None, :], 0.0), 1)
    value = factor * (shared - total * tl.exp(log_probs))
    if ENTROPY:
        log_p = tl.where(log_probs < -MARGIN_MAX, -MARGIN_MAX, log_probs)
        value -= bonus * tl.exp(log_p) * (log_p + entropy)
    tl.debug_barrier()
    tl.store(slope_ptr + ids, as_stored(value, slope_ptr.dtype.element_ty), mask=found)


# One value a row is read or written at these: their alignment is not worth another kernel.
@triton.jit(
    do_not_specialize_on_alignment=[
        "advantages_ptr", "upstream_ptr", "logprob_ptr", "log_z_ptr", "crossed_ptr", "entropy_ptr", "bonus_ptr"
    ]
)  # fmt: skip
def logprob_kernel(
    logits_ptr, ids_ptr, scores_ptr, advantages_ptr, upstream_ptr, logprob_ptr, log_z_ptr, crossed_ptr, slope_ptr,
    entropy_ptr, bonus_ptr, logits_stride, slope_stride, V, inverse_temperature,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, MARGIN: tl.constexpr, FORWARD: tl.constexpr,
    SLOPE: tl.constexpr, HAS_UPSTREAM: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    k = tl.arange(0, BLOCK_K)
    ids = tl.load(ids_ptr + row * K + k, mask=k < K, other=0)
    hard = tl.sum(((ids == UNUSED_ID) & (k > 0)).to(tl.int32), 0) > 0
    used = k < tl.where(hard, 1, K)
    ids = tl.maximum(ids, 0)
    temperature = tl.where(hard, inverse_temperature, 1.0)
    entropy, bonus = 0.0, 0.0
    if FORWARD:
        if ENTROPY:
            log_z, entropy = row_log_z_and_entropy(row_ptr, V, temperature, BLOCK_V)
            tl.store(entropy_ptr + row, tl.where(hard, entropy, 0.0))
        else:
            log_z = row_log_z(row_ptr, V, temperature, BLOCK_V)
        tl.store(log_z_ptr + row, log_z)
    else:
        log_z = tl.load(log_z_ptr + row)
        if ENTROPY:
            entropy = tl.load(entropy_ptr + row)
            bonus = tl.load(bonus_ptr + row) * temperature

    # An id outside the vocabulary makes the row NaN: there is no other way to tell without waiting for the device.
    found = used & (ids < V)
    picked = tl.load(row_ptr + ids, mask=found, other=float("nan")).to(tl.float32)
    log_probs = picked * temperature - log_z
    scores = tl.load(scores_ptr + row * K + k, mask=used, other=0.0).to(tl.float32)
    replaced = -float("inf")
    if MARGIN > 0:
        replaced = tl.where(tl.load(advantages_ptr + row) <= 0, 0.0, -float("inf"))
    terms, slopes, margins = component_terms(log_probs, scores, replaced, MARGIN)
    if FORWARD:
        latent = tl.sum(tl.where(used, terms, 0.0), 0) / K
        text = tl.sum(tl.where(k == 0, log_probs, 0.0), 0)
        tl.store(logprob_ptr + row, tl.where(hard, text, latent))
        tl.store(crossed_ptr + row, tl.where(hard, 0, tl.sum((used & (margins < 0)).to(tl.int32), 0)))
    if SLOPE:
        coefficients = tl.where(used, tl.where(hard, 1.0, slopes / K), 0.0)
        factor = temperature
        if HAS_UPSTREAM:
            factor = temperature * tl.load(upstream_ptr + row)
        store_slope(
            row_ptr, slope_ptr + row * slope_stride, V, ids, found, log_probs, coefficients, log_z, temperature,
            factor, entropy, bonus, ENTROPY, BLOCK_V,
        )  # fmt: skip


def block_v(vocab: int) -> int:
    """Logits that a program reads at a time."""
    return min(BLOCK_V, max(128, triton.next_power_of_2(vocab)))


def constants(
    vocab: int, width: int, margin_gradient: str, *, forward: bool, slope: bool, upstream: bool, entropy: bool = False
) -> dict[str, int | bool]:
    """Constants of the kernel."""
    return {
        "K": width, "BLOCK_K": triton.next_power_of_2(width), "BLOCK_V": block_v(vocab),
        "MARGIN": MARGINS[margin_gradient], "FORWARD": forward, "SLOPE": slope, "HAS_UPSTREAM": upstream,
        "ENTROPY": entropy,
    }  # fmt: skip


def launch_options(vocab: int) -> dict[str, int]:
    """Warps, and the registers that so many threads can have: without the limit ptxas spills to stay under half."""
    warps = max(1, block_v(vocab) * NUM_WARPS // BLOCK_V)
    return {"num_warps": warps, "maxnreg": min(MAX_REGISTERS, REGISTERS // (32 * warps))}


def _launch(
    logits: Tensor, spec: LogprobSpec, logprob: Tensor, log_z: Tensor, crossed: Tensor, slope: Tensor | None,
    upstream: Tensor | None, *, forward: bool, entropy: Tensor | None = None, bonus: Tensor | None = None,
) -> None:  # fmt: skip
    rows, vocab = logits.shape
    if not rows:
        return
    margin = "none" if spec.advantages is None else spec.margin_gradient
    chosen = constants(
        vocab, spec.ids.shape[1], margin, forward=forward, slope=slope is not None, upstream=upstream is not None,
        entropy=entropy is not None,
    )  # fmt: skip
    # Arguments that are not used are some tensor of the right device.
    logprob_kernel[(rows,)](
        logits, spec.ids.contiguous(), spec.scores.contiguous(),
        logits if spec.advantages is None else spec.advantages.contiguous(),
        logits if upstream is None else upstream.contiguous(), logprob, log_z, crossed,
        logits if slope is None else slope, logits if entropy is None else entropy,
        logits if bonus is None else bonus.contiguous(), logits.stride(0), 0 if slope is None else slope.stride(0),
        vocab, 1.0 / spec.temperature, **chosen, **launch_options(vocab),
    )  # fmt: skip


def _outputs(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for log-probs, log Z and counts of crossed margins of rows."""
    logprob, log_z = torch.empty(2, len(logits), dtype=torch.float32, device=logits.device)
    return logprob, log_z, torch.empty(len(logits), dtype=torch.int32, device=logits.device)


def slope_view(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Where the slope of float32 logits [n, V] goes: over them, a narrower one into the second half of each row.

    Rows of logits must be the starts of whole rows of their buffer, whose stride they tell.
    """
    if dtype == logits.dtype:
        return logits
    (rows, vocab), stride = logits.shape, logits.stride(0)
    return logits.as_strided((rows, stride), (stride, 1)).view(dtype)[:, stride : stride + vocab]


def logprob_rows_(
    logits: Tensor, spec: LogprobSpec, slope: torch.dtype | None, upstream: Tensor | None = None
) -> RowScores:
    """Log-probs of the rows of float32 logits [n, V], overwritten by their slope in dtype `slope` unless it is None.

    `upstream` [n] scales it.
    """
    outputs = _outputs(logits)
    room = None if slope is None else slope_view(logits, slope)
    _launch(logits, spec, *outputs, room, upstream, forward=True)
    return RowScores(outputs[0], outputs[2], room)


def entropy_rows(logits: Tensor, spec: LogprobSpec) -> RowEntropies:
    """Log-probs of the rows of float32 logits [n, V], and entropies of its text rows. Logits stay."""
    logprob, log_z, crossed = _outputs(logits)
    entropy = torch.empty_like(log_z)
    _launch(logits, spec, logprob, log_z, crossed, None, None, forward=True, entropy=entropy)
    return RowEntropies(logprob, crossed, log_z, entropy)


def entropy_slope_(
    logits: Tensor, spec: LogprobSpec, found: RowEntropies, slope: torch.dtype, upstream: Tensor, bonus: Tensor
) -> Tensor:
    """Slope in dtype `slope` of `upstream * logprob + bonus * entropy` over the rows' logits [n, V].

    `bonus` [n] is 0 on latent rows.
    """
    room, (_, crossed, log_z, entropy) = slope_view(logits, slope), found
    # Log-probs and counts are not written again.
    _launch(
        logits, spec, log_z, log_z, crossed, room, upstream, forward=False, entropy=entropy, bonus=bonus
    )  # fmt: skip
    return room


class FromLogits(torch.autograd.Function):
    """Saves the logits and each row's log Z; the backward pass reads them once."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, spec: LogprobSpec) -> Tensor:
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        logprob, log_z, crossed = _outputs(logits)
        _launch(logits, spec, logprob, log_z, crossed, None, None, forward=True)
        ctx.spec = spec
        ctx.save_for_backward(logits, log_z)
        return logprob

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, log_z = ctx.saved_tensors
        slope = torch.empty_like(logits)
        # Log-probs and counts are not written again.
        _launch(logits, ctx.spec, log_z, log_z, log_z, slope, grad, forward=False)
        return slope, None
