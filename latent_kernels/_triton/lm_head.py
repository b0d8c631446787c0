"""Logits with a sidecar: for each group of 32 ids, the largest logit and the sum of exponentials.

    logits = hidden @ lm_head.T   [B, V] float32, from operands of one 16-bit dtype, accumulated in float32
    maxima_g = max of the logits of group g,  sums_g = sum of exp(logit - maxima_g)   both [B, ceil(V / 32)] float32

The sidecar, V / 4 bytes per row, tells the selection which few groups can matter and gives log Z. It comes from the
epilogue of the LM-head product (`lm_head_sidecar`), where lm_head [V, D] is read once for every BLOCK_B rows, or from
one pass over existing logits (`logits_sidecar`). Bias, scale and soft cap of a head are applied in that epilogue, or in
that pass, which then writes the logits back over the product. There is no backward pass, and results repeat bit for
bit.

Bytes of the product: 2 V D of lm_head, once for B <= 128 and from L2 beyond, and 4.25 B V written: float32 logits and
the sidecar.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from latent_kernels._triton.common import MAX_REGISTERS
from latent_kernels._triton.head import bias_argument, factor_arguments, head_logits, logits_constants
from latent_kernels._types import PLAIN_HEAD, HeadOptions

GROUP = 32  # ids per group
TILE = 128  # ids of a tile of the product, on the M axis of the matrix instruction
GROUPS_PER_PROGRAM = 64  # in the pass over existing logits: 2,048 logits, 16 per thread
SIDECAR_OPTIONS = {"num_warps": 4, "maxnreg": MAX_REGISTERS}


class Sidecar(NamedTuple):
    """Logits [B, >= V] with an inner stride of 1, and the summary of their groups."""

    logits: Tensor
    maxima: Tensor  # [B, G] float32, G = ceil(V / GROUP)
    sums: Tensor  # [B, G] float32, sums of exp(logit - maximum)


class ProductConfig(NamedTuple):
    """A tile of the product: BLOCK_B rows of hidden, and BLOCK_D elements of the width at a time."""

    block_b: int
    block_d: int
    num_warps: int
    num_stages: int


def dot_dtype(*operands: Tensor) -> torch.dtype:
    """Return the dtype to which a product's operands are converted: their own, or float32 if they differ.

    The interpreter, which runs on CPU tensors, has no bfloat16 product. float32 holds the same products exactly.
    """
    first, *others = operands
    same = first.is_cuda and all(other.dtype == first.dtype for other in others)
    return first.dtype if same else torch.float32


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return Triton's name of a float dtype."""
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]


@triton.jit
def max_and_sum(logits, inverse, AXIS: tl.constexpr):
    """Return the maximum along an axis and the sum of exp((logit - maximum) * inverse), or (-inf, 0)."""
    top = tl.max(logits, AXIS)
    base = tl.where(top == -float("inf"), 0.0, top)
    return top, tl.sum(tl.exp((logits - tl.expand_dims(base, AXIS)) * inverse), AXIS)


@triton.jit
def inverse_temperature(latent_ptr, row, inverse):
    """Return 1 on latent rows and 1 / T, which is `inverse`, on text rows."""
    return tl.where(tl.load(latent_ptr + row) != 0, 1.0, inverse)


@triton.jit
def product_tile(
    weight_ptr, hidden_ptr, weight_stride, hidden_stride, v, b, V, B, D, BLOCK_V: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr, DOT_TYPE: tl.constexpr,
):  # fmt: skip
    """Return `weight[v] @ hidden[b].T` [BLOCK_V, BLOCK_B] in float32. Entries outside V and B hold any finite value.

    The vocabulary is on the M axis of the matrix instruction, whose tile size is fixed. The batch is on the N axis,
    which can be small. Row indices are clamped rather than masked. Addresses are int64, because V x D may exceed 2^31.
    D is a multiple of BLOCK_D.
    """
    d = tl.arange(0, BLOCK_D)
    weights = weight_ptr + tl.minimum(v, V - 1).to(tl.int64)[:, None] * weight_stride + d[None, :]
    hiddens = hidden_ptr + tl.minimum(b, B - 1).to(tl.int64)[None, :] * hidden_stride + d[:, None]
    total = tl.zeros([BLOCK_V, BLOCK_B], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        weight, hidden = tl.load(weights + start), tl.load(hiddens + start)
        # "ieee" concerns float32 operands: TF32 would keep only ten bits of their mantissas.
        total = tl.dot(weight.to(DOT_TYPE), hidden.to(DOT_TYPE), total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=["latent_ptr"])
def lm_head_kernel(
    weight_ptr, hidden_ptr, bias_ptr, latent_ptr, logits_ptr, maxima_ptr, sums_ptr, inner, outer, inverse_text,
    weight_stride, hidden_stride, logits_stride, B, V, D, G,
    GROUP: tl.constexpr, TILE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, DOT_TYPE: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, SCALED: tl.constexpr, TEMPERED: tl.constexpr,
):  # fmt: skip
    # Programs of one tile of the head follow each other, so that all except the first find it in L2.
    blocks = tl.cdiv(B, BLOCK_B)
    tile = tl.program_id(0) // blocks
    v = tile * TILE + tl.arange(0, TILE)
    b = (tl.program_id(0) % blocks) * BLOCK_B + tl.arange(0, BLOCK_B)
    inverse = 1.0
    if TEMPERED:  # loaded here, where few registers are in use
        inverse = inverse_temperature(latent_ptr, tl.minimum(b, B - 1), inverse_text)[None, None, :]
    logits = product_tile(
        weight_ptr, hidden_ptr, weight_stride, hidden_stride, v, b, V, B, D, TILE, BLOCK_B, BLOCK_D, DOT_TYPE
    )
    inside = (v < V)[:, None]
    logits = head_logits(logits, bias_ptr, v[:, None], inside, inner, outer, HAS_BIAS, SOFTCAP, SCALED)
    logits = tl.where(inside, logits, -float("inf"))
    row = b.to(tl.int64)[None, :]
    # A row of the logits has room for whole tiles, so the vocabulary's tail needs no mask.
    tl.store(logits_ptr + row * logits_stride + v[:, None], logits, mask=(b < B)[None, :])
    top, total = max_and_sum(tl.reshape(logits, [TILE // GROUP, GROUP, BLOCK_B]), inverse, 1)
    group = (tile * (TILE // GROUP) + tl.arange(0, TILE // GROUP))[:, None]
    inside = (b < B)[None, :] & (group < G)
    tl.store(maxima_ptr + row * G + group, top, mask=inside)
    tl.store(sums_ptr + row * G + group, total, mask=inside)


@triton.jit(do_not_specialize_on_alignment=["latent_ptr"])
def sidecar_kernel(
    logits_ptr, bias_ptr, latent_ptr, maxima_ptr, sums_ptr, inner, outer, inverse_text, logits_stride, V, G,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, SCALED: tl.constexpr,
    TEMPERED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    v = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    logits = tl.load(logits_ptr + row * logits_stride + v, mask=v < V, other=-float("inf")).to(tl.float32)
    if HAS_BIAS or SOFTCAP or SCALED:  # the logits are float32 products, and no other program reads these
        logits = head_logits(logits, bias_ptr, v, v < V, inner, outer, HAS_BIAS, SOFTCAP, SCALED)
        tl.store(logits_ptr + row * logits_stride + v, logits, mask=v < V)
        logits = tl.where(v < V, logits, -float("inf"))
    inverse = 1.0
    if TEMPERED:
        inverse = inverse_temperature(latent_ptr, row, inverse_text)
    top, total = max_and_sum(logits, inverse, 1)
    tl.store(maxima_ptr + row * G + group, top, mask=group < G)
    tl.store(sums_ptr + row * G + group, total, mask=group < G)


def product_constants(
    config: ProductConfig, dtype: torch.dtype, head: HeadOptions = PLAIN_HEAD, *, tempered: bool = False
) -> dict[str, object]:  # fmt: skip
    """Return the constants of `lm_head_kernel`, which multiplies in `dtype`."""
    return {
        "GROUP": GROUP, "TILE": TILE, "BLOCK_B": config.block_b, "BLOCK_D": config.block_d,
        "DOT_TYPE": triton_dtype(dtype), **logits_constants(head), "TEMPERED": tempered,
    }  # fmt: skip


def product_options(config: ProductConfig) -> dict[str, int]:
    """Return the launch options of `lm_head_kernel`."""
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, "maxnreg": MAX_REGISTERS}


def sidecar_constants(head: HeadOptions = PLAIN_HEAD, *, tempered: bool = False) -> dict[str, int | bool]:
    """Return the constants of `sidecar_kernel`."""
    return {"GROUP": GROUP, "GROUPS": GROUPS_PER_PROGRAM, **logits_constants(head), "TEMPERED": tempered}


class RowTemperatures(NamedTuple):
    """By what the sums of a sidecar are tempered: text rows, which `latent` [B] bool is not, by T."""

    latent: Tensor
    temperature: float


def temperature_arguments(tempered: RowTemperatures | None, unused: Tensor) -> dict[str, object]:
    """Return the arguments of a kernel that say how sums are tempered."""
    if tempered is None:
        return {"latent_ptr": unused, "inverse_text": 1.0}
    return {"latent_ptr": tempered.latent.contiguous().view(torch.int8), "inverse_text": 1.0 / tempered.temperature}


def _empty_sidecar(rows: int, vocab: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Allocate maxima and sums [B, G].

    Two allocations, because halves of one could be less aligned, and each alignment compiles another variant.
    """
    shape = (rows, triton.cdiv(vocab, GROUP))
    maxima, sums = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
    return maxima, sums


def lm_head_sidecar(
    hidden: Tensor, lm_head: Tensor, config: ProductConfig, head: HeadOptions = PLAIN_HEAD,
    tempered: RowTemperatures | None = None,
) -> Sidecar:  # fmt: skip
    """Return the logits of `hidden @ lm_head.T` in float32 with their sidecar, in one launch.

    The inputs are those that `routes.fits` accepts.
    """
    (rows, width), vocab = hidden.shape, len(lm_head)
    tiles = triton.cdiv(vocab, TILE)
    logits = torch.empty(rows, tiles * TILE, dtype=torch.float32, device=hidden.device)
    maxima, sums = _empty_sidecar(rows, vocab, hidden.device)
    lm_head_kernel[(tiles * triton.cdiv(rows, config.block_b),)](
        weight_ptr=lm_head, hidden_ptr=hidden, bias_ptr=bias_argument(head, logits), logits_ptr=logits,
        maxima_ptr=maxima, sums_ptr=sums, **factor_arguments(head), **temperature_arguments(tempered, logits),
        weight_stride=lm_head.stride(0), hidden_stride=hidden.stride(0), logits_stride=logits.stride(0), B=rows,
        V=vocab, D=width, G=maxima.shape[1], **product_options(config),
        **product_constants(config, dot_dtype(hidden, lm_head), head, tempered=tempered is not None),
    )  # fmt: skip
    return Sidecar(logits, maxima, sums)


def logits_sidecar(
    logits: Tensor, head: HeadOptions = PLAIN_HEAD, tempered: RowTemperatures | None = None
) -> Sidecar:  # fmt: skip
    """Return logits [B, V], in float32 or a 16-bit dtype, with their sidecar.

    With options of a head, `logits` is a float32 product with an inner stride of 1, and becomes its logits in place.
    """
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    rows, vocab = logits.shape
    maxima, sums = _empty_sidecar(rows, vocab, logits.device)
    if rows:
        groups = maxima.shape[1]
        sidecar_kernel[(rows, triton.cdiv(groups, GROUPS_PER_PROGRAM))](
            logits_ptr=logits, bias_ptr=bias_argument(head, logits), maxima_ptr=maxima, sums_ptr=sums,
            **factor_arguments(head), **temperature_arguments(tempered, logits), logits_stride=logits.stride(0),
            V=vocab, G=groups, **sidecar_constants(head, tempered=tempered is not None), **SIDECAR_OPTIONS,
        )  # fmt: skip
    return Sidecar(logits, maxima, sums)
