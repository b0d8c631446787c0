"""The log-probs of a chunk of rows, and their gradient, straight from the product with the LM head (Eq. 15-17).

Inputs: hidden [n, D] and lm_head [V, D] of one dtype, accumulated in float32; ids and scores [n, K] as in
`latent_logprob`. z is what the head's `capped` gives, `rate` per row turns it into logits / T in units of log 2.

    picked   [n, K] float32, z of the components: K products of a row of hidden and a row of the head
    E        [n, V] in the dtype of the head: 2^(rate z - k - s), times the slope of a soft cap, 1 - z^2
    k        [n] whole numbers: the largest `rate z` of the components. It is known before the product
    s, sums  [n, G] float32 for G tiles of a row: by how much a tile would exceed 2^40 (else 0); sums of 2^(...)

bfloat16 has the exponents of float32. So E keeps all its bits for tokens from 2^-126 to 2^40 times as likely as the
likeliest component, and needs no maximum over the row. The logits are never stored. The gradient in the product is E
times one factor per row, except at the components, where it is stored over E; so the products that follow are plain
ones. If a tile did exceed 2^40, its row is read and written once more.

Bytes: 2 n V written, 2 V D of the head read once per chunk, 2 n K D for the picked logits. FLOPs: 2 n V D, and n V
exponentials. There are no atomics, so results repeat bit for bit.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from latent_kernels._chunks import multiprocessors
from latent_kernels._loss_types import LogprobSpec, RowGradient, RowScores
from latent_kernels._triton.common import MAX_REGISTERS
from latent_kernels._triton.head import bias_argument, capped, factor_arguments, head_constants
from latent_kernels._triton.latent_logprob_terms import (
    MARGINS,
    METHODS,
    UNUSED_ID,
    over_equal_ids,
    row_components,
    row_scores,
    store_scores,
    sum_of_coefficients,
)
from latent_kernels._triton.lm_head import dot_dtype, triton_dtype
from latent_kernels._types import PLAIN_HEAD, HeadOptions

LOG2_E, LOG_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
LARGEST = tl.constexpr(40.0)  # exponent of E. The reciprocal of a row's sum stays far above the smallest float32
CANCELLED = tl.constexpr(2.0**-30)  # below the roundings of a sum of float32 numbers
UNKNOWN = tl.constexpr(-(2.0**20))  # reference of a row whose components say nothing of it, below any logit
PICK_SLOTS, PICK_D, PICK_WARPS, PICK_STAGES = 64, 64, 4, 3
ROW_WARPS = 4


class ExpConfig(NamedTuple):
    """A tile of the product: BLOCK_N rows, BLOCK_V ids, and BLOCK_D elements of the width at a time."""

    block_n: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int


# The tiles for heads without and with a bias or soft cap, by major compute capability: predicted from bytes, FLOPs and
# SASS, not measured. Other devices keep the library's product. Ampere has no bulk loads. On Blackwell our products
# are predicted to fall behind the library's by more than a pass over the logits costs.
TABLE = {
    9: (
        ExpConfig(block_n=128, block_v=256, block_d=64, num_warps=8, num_stages=3),
        ExpConfig(block_n=128, block_v=128, block_d=64, num_warps=8, num_stages=3),  # a wider one spills
    )
}
MIN_VOCAB = 8192  # the three launches of a smaller head take longer than its product


def fits(hidden: Tensor, lm_head: Tensor) -> bool:
    """Tell whether these inputs can be taken: bfloat16, rows that bulk loads can read, a vocabulary worth it.

    float16 has too few exponents for E, and float32 heads are multiplied in float32 by the library.
    """
    aligned = all(x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 for x in (hidden, lm_head))
    (vocab, width), narrow = lm_head.shape, hidden.dtype == lm_head.dtype == torch.bfloat16
    return narrow and aligned and width > 0 and width % 8 == 0 and vocab >= MIN_VOCAB


def choose(hidden: Tensor, lm_head: Tensor, head: HeadOptions = PLAIN_HEAD) -> ExpConfig | None:
    """Return the tile of `scaled_exp_rows` for these inputs, or None where the path with logits is to run.

    With `LATENT_KERNELS_SCALED_EXP=0` that is everywhere.
    """
    if not hidden.is_cuda or not fits(hidden, lm_head) or os.environ.get("LATENT_KERNELS_SCALED_EXP", "1") == "0":
        return None
    without, with_options = TABLE.get(torch.cuda.get_device_capability(hidden.device)[0], (None, None))
    return without if head.bias is None and head.softcap is None else with_options


@triton.jit(do_not_specialize=["N"])
def picked_logits_kernel(
    hidden_ptr, weight_ptr, bias_ptr, ids_ptr, picked_ptr, rate_ptr, reference_ptr, inverse_temperature, inner, outer,
    hidden_stride, weight_stride, N, V, D,
    K: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr,
    DOT_TYPE: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One program multiplies the K rows of the head that each of ROWS rows picked with all of them.

    Only one column of a product is kept, but it comes from the instruction and the order of `scaled_exp_kernel`. So a
    picked logit and its share of the row's sum have the same rounding, and cancel where a probability is close to 1.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    real = (row < N)[:, None] & (k < K)[None, :]
    at = row.to(tl.int64)[:, None] * K + k[None, :]
    ids = tl.load(ids_ptr + at, mask=real, other=0)
    hard = tl.sum(((ids == UNUSED_ID) & (k > 0)[None, :]).to(tl.int32), 1) > 0
    used = real & (k[None, :] < tl.where(hard, 1, K)[:, None]) & (ids >= 0) & (ids < V)
    ids = tl.where(used, ids, 0)

    slot, column, d = tl.arange(0, ROWS * BLOCK_K), tl.arange(0, COLUMNS), tl.arange(0, BLOCK_D)
    taken = tl.reshape(used.to(tl.int32), [ROWS * BLOCK_K]) != 0
    weights = weight_ptr + tl.reshape(ids, [ROWS * BLOCK_K])[:, None] * weight_stride + d[None, :]
    states = tl.minimum(tl.program_id(0) * ROWS + column, N - 1).to(tl.int64)
    hiddens = hidden_ptr + states[None, :] * hidden_stride + d[:, None]
    products = tl.zeros([ROWS * BLOCK_K, COLUMNS], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        inside = start + d < D
        weight = tl.load(weights + start, mask=taken[:, None] & inside[None, :], other=0.0)
        hidden = tl.load(hiddens + start, mask=inside[:, None], other=0.0)
        products = tl.dot(weight.to(DOT_TYPE), hidden.to(DOT_TYPE), products, input_precision="ieee")
    own = (slot // BLOCK_K)[:, None] == column[None, :]
    product = tl.reshape(tl.sum(tl.where(own, products, 0.0), 1), [ROWS, BLOCK_K])

    z = capped(product, bias_ptr, ids, used, inner, HAS_BIAS, SOFTCAP)
    rate = tl.where(hard, inverse_temperature, 1.0) * outer * LOG2_E  # the temperature is that of text rows only
    highest = tl.max(tl.where(used, z * rate[:, None], -float("inf")), 1)
    # Where all components are masked or do not exist, every tile shifts. From 0, low logits would vanish.
    reference = tl.where(tl.abs(highest) < float("inf"), tl.floor(highest + 0.5), UNKNOWN)
    tl.store(picked_ptr + at, z, mask=real)
    tl.store(rate_ptr + row, rate, mask=row < N)
    tl.store(reference_ptr + row, reference, mask=row < N)


@triton.jit(do_not_specialize=["N"])
def scaled_exp_kernel(
    hidden_desc, weight_desc, bias_ptr, rate_ptr, reference_ptr, exps_ptr, sums_ptr, shifts_ptr, inner, exps_stride,
    N, V, D, G,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, DOT_TYPE: tl.constexpr, STORE: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One program per multiprocessor computes every so many tiles, and loads ahead from one tile into the next."""
    # Programs of one tile of the head follow each other, so that all except the first find it in L2.
    blocks = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), blocks * G, tl.num_programs(0), flatten=True):
        group = tile // blocks
        first_row, first_v = (tile % blocks) * BLOCK_N, group * BLOCK_V
        product = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
        for start in range(0, D, BLOCK_D):
            hidden, weight = hidden_desc.load([first_row, start]), weight_desc.load([first_v, start])
            product = tl.dot(hidden.to(DOT_TYPE), weight.to(DOT_TYPE).T, product, input_precision="ieee")
        row, v = first_row + tl.arange(0, BLOCK_N), first_v + tl.arange(0, BLOCK_V)
        rate = tl.load(rate_ptr + row, mask=row < N, other=1.0)
        reference = tl.load(reference_ptr + row, mask=row < N, other=0.0)
        inside = (v < V)[None, :]
        z = capped(product, bias_ptr, v[None, :], inside, inner, HAS_BIAS, SOFTCAP)
        z = tl.where(inside, z, -float("inf"))
        shift = tl.maximum(tl.ceil(tl.max(z, 1) * rate - reference) - LARGEST, 0.0)
        exps = tl.exp2(z * rate[:, None] - (reference + shift)[:, None])
        row = row.to(tl.int64)  # n * V may exceed 2^31
        tl.store(sums_ptr + row * G + group, tl.sum(exps, 1), mask=row < N)
        tl.store(shifts_ptr + row * G + group, shift, mask=row < N)
        if STORE:
            if SOFTCAP:
                exps = exps * (1.0 - z * z)
            # A row has room for G * BLOCK_V, so the vocabulary's tail, which nobody reads, needs no mask.
            at = exps_ptr + row[:, None] * exps_stride + v[None, :]
            tl.store(at, exps.to(exps_ptr.dtype.element_ty), mask=(row < N)[:, None])


@triton.jit(do_not_specialize_on_alignment=["advantages_ptr", "logprob_ptr", "crossed_ptr", "factor_ptr"])
def scaled_rows_kernel(
    exps_ptr, sums_ptr, shifts_ptr, picked_ptr, rate_ptr, reference_ptr, ids_ptr, scores_ptr, advantages_ptr,
    logprob_ptr, crossed_ptr, factor_ptr, inner, exps_stride, V, G,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_V: tl.constexpr, MARGIN: tl.constexpr,
    METHOD: tl.constexpr, COMPONENTS: tl.constexpr, DLOGITS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One program owns one row: it merges the sums of the tiles and stores the gradient of the components over E."""
    row = tl.program_id(0).to(tl.int64)
    ids, used, valid, hard, exist = row_components(ids_ptr, row, V, K, BLOCK_K)
    k, g = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_G)
    shifts = tl.load(shifts_ptr + row * G + g, mask=g < G, other=0.0)
    sums = tl.load(sums_ptr + row * G + g, mask=g < G, other=0.0)
    shift = tl.max(shifts, 0)
    total = tl.sum(sums * tl.exp2(shifts - shift), 0)
    picked = tl.load(picked_ptr + row * K + k, mask=valid, other=float("nan"))
    rate = tl.load(rate_ptr + row)
    log_probs = (picked * rate - (tl.load(reference_ptr + row) + shift) - tl.log2(total)) * LOG_2
    latent, component_coefficients, margins = row_scores(
        scores_ptr, advantages_ptr, row, log_probs, used, K, BLOCK_K, MARGIN, METHOD
    )
    store_scores(
        logprob_ptr, crossed_ptr, row, log_probs, latent, margins, used, valid, hard, exist, K, BLOCK_K, COMPONENTS
    )
    if DLOGITS:
        coefficients = tl.where(valid, tl.where(hard, 1.0, component_coefficients), 0.0)
        whole, size = sum_of_coefficients(coefficients, hard, METHOD), tl.sum(tl.abs(coefficients), 0)
        # The components are stored relative to the factor of the row. Where the coefficients cancel, a factor below the
        # roundings takes the place of 0.
        share = tl.where(tl.abs(whole) < size * CANCELLED, size * CANCELLED, whole)
        value = whole * tl.exp(log_probs) - over_equal_ids(ids, coefficients)
        value *= total / tl.where(share == 0.0, 1.0, share)  # it is 0 only where all coefficients are
        if SOFTCAP:
            value *= 1.0 - picked * picked
        # The factor of the row absorbs the rounding of the largest component, which most of the gradient comes from.
        # What it adds to the softmax is as small relatively, and spread over many tokens.
        largest = tl.max(tl.where(valid, tl.abs(value), 0.0), 0)
        stored = largest.to(exps_ptr.dtype.element_ty).to(tl.float32)
        rounding = tl.where(stored > 0.0, largest / tl.where(stored > 0.0, stored, 1.0), 1.0)
        value /= rounding
        tl.store(factor_ptr + row, -rate * LOG_2 * inner * share / total * rounding)
        row_ptr = exps_ptr + row * exps_stride
        if shift > 0.0:
            for group in range(0, G):
                scale = tl.exp2(tl.load(shifts_ptr + row * G + group) - shift)
                at = row_ptr + group * BLOCK_V + tl.arange(0, BLOCK_V)
                tl.store(at, (tl.load(at).to(tl.float32) * scale).to(exps_ptr.dtype.element_ty))
        tl.debug_barrier()
        tl.store(row_ptr + ids, value.to(exps_ptr.dtype.element_ty), mask=valid)


def pick_constants(width: int, dtype: torch.dtype, head: HeadOptions = PLAIN_HEAD) -> dict[str, object]:
    """Return the constants of `picked_logits_kernel`, which multiplies in `dtype`."""
    block = triton.next_power_of_2(width)
    rows = max(1, PICK_SLOTS // block)
    return {
        "K": width, "BLOCK_K": block, "ROWS": rows, "COLUMNS": max(16, rows), "BLOCK_D": PICK_D,
        "DOT_TYPE": triton_dtype(dtype), **head_constants(head),
    }  # fmt: skip


def product_constants(
    config: ExpConfig, dtype: torch.dtype, head: HeadOptions = PLAIN_HEAD, *, store: bool
) -> dict[str, object]:
    """Return the constants of `scaled_exp_kernel`, which multiplies in `dtype`."""
    return {
        "BLOCK_N": config.block_n, "BLOCK_V": config.block_v, "BLOCK_D": config.block_d,
        "DOT_TYPE": triton_dtype(dtype), "STORE": store, **head_constants(head),
    }  # fmt: skip


def product_options(config: ExpConfig) -> dict[str, int]:
    """Return the launch options of `scaled_exp_kernel`."""
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, "maxnreg": MAX_REGISTERS}


def row_constants(
    width: int, groups: int, config: ExpConfig, margin_gradient: str, method: str, *, components: bool, dlogits: bool,
    softcap: bool,
) -> dict[str, int | bool]:  # fmt: skip
    """Return the constants of `scaled_rows_kernel`."""
    return {
        "K": width, "BLOCK_K": triton.next_power_of_2(width), "BLOCK_G": triton.next_power_of_2(groups),
        "BLOCK_V": config.block_v, "MARGIN": MARGINS[margin_gradient], "METHOD": METHODS[method],
        "COMPONENTS": components, "DLOGITS": dlogits, "SOFTCAP": softcap,
    }  # fmt: skip


def exps_buffer(rows: int, lm_head: Tensor, config: ExpConfig) -> Tensor:
    """Allocate E for chunks of up to `rows` rows, with room for whole tiles."""
    columns = triton.cdiv(len(lm_head), config.block_v) * config.block_v
    return torch.empty(rows, columns, dtype=lm_head.dtype, device=lm_head.device)


def scaled_exp_rows(
    hidden: Tensor, lm_head: Tensor, spec: LogprobSpec, config: ExpConfig, buffer: Tensor | None
) -> RowScores:  # fmt: skip
    """Return the log-probs of n hidden states [n, D] and, if a buffer is given, their gradient in the product with the
    head [V, D], which lies in the first n rows of the buffer.

    The inputs are those of which `choose` makes a tile.
    """
    (rows, width), vocab, device = hidden.shape, len(lm_head), hidden.device
    groups, top_k = triton.cdiv(vocab, config.block_v), spec.ids.shape[1]
    picked, sums, shifts = (
        torch.empty(rows, columns, dtype=torch.float32, device=device) for columns in (top_k, groups, groups)
    )
    rate, reference, factor = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(3))
    logprob = torch.empty(spec.ids.shape if spec.components else rows, dtype=torch.float32, device=device)
    crossed = torch.empty(rows, dtype=torch.int32, device=device)
    ids, dtype, bias = spec.ids.contiguous(), dot_dtype(hidden, lm_head), bias_argument(spec.head, picked)
    factors = factor_arguments(spec.head)
    chosen = pick_constants(top_k, dtype, spec.head)
    picked_logits_kernel[(triton.cdiv(rows, int(str(chosen["ROWS"]))),)](
        hidden_ptr=hidden, weight_ptr=lm_head, bias_ptr=bias, ids_ptr=ids, picked_ptr=picked, rate_ptr=rate,
        reference_ptr=reference, inverse_temperature=1.0 / spec.temperature, **factors,
        hidden_stride=hidden.stride(0), weight_stride=lm_head.stride(0), N=rows, V=vocab, D=width, **chosen,
        num_warps=PICK_WARPS, num_stages=PICK_STAGES,
    )  # fmt: skip
    store, exps = buffer is not None, picked if buffer is None else buffer
    programs = min(multiprocessors(device), groups * triton.cdiv(rows, config.block_n))
    scaled_exp_kernel[(programs,)](
        hidden_desc=TensorDescriptor.from_tensor(hidden, [config.block_n, config.block_d]),
        weight_desc=TensorDescriptor.from_tensor(lm_head, [config.block_v, config.block_d]),
        bias_ptr=bias, rate_ptr=rate, reference_ptr=reference, exps_ptr=exps, sums_ptr=sums, shifts_ptr=shifts,
        inner=factors["inner"], exps_stride=exps.stride(0), N=rows, V=vocab, D=width, G=groups,
        **product_constants(config, dtype, spec.head, store=store), **product_options(config),
    )  # fmt: skip
    margin = spec.margin_gradient if spec.advantages is not None and spec.method == "latent_grpo" else "none"
    scaled_rows_kernel[(rows,)](
        exps_ptr=exps, sums_ptr=sums, shifts_ptr=shifts, picked_ptr=picked, rate_ptr=rate, reference_ptr=reference,
        ids_ptr=ids, scores_ptr=spec.scores.contiguous(),
        advantages_ptr=picked if spec.advantages is None else spec.advantages.contiguous(),
        logprob_ptr=logprob, crossed_ptr=crossed, factor_ptr=factor, inner=factors["inner"],
        exps_stride=exps.stride(0), V=vocab, G=groups,
        **row_constants(
            top_k, groups, config, margin, spec.method, components=spec.components, dlogits=store,
            softcap=spec.head.softcap is not None,
        ),
        num_warps=ROW_WARPS,
    )  # fmt: skip
    return RowScores(logprob, crossed, None if buffer is None else RowGradient(buffer[:rows, :vocab], factor))
