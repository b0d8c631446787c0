"""Replay of input embeddings in one pass: K table rows are gathered and mixed in float32 (Eq. 1).

Inputs: ids [N, K] int64, scores [N, K], tau 0-d or [N], the embedding table [V, D] in float32 or a 16-bit dtype.

    forward    w = softmax(scores / tau),  out = sum_k w_k E[id_k]   [N, D] in the table's dtype
               a text row (-100 in ids[1:]) is E[id_0], whatever its scores are
               a row with another id outside the table is NaN, and has no gradient
    backward   dscores_k = w_k (<g, E[id_k]> - sum_j w_j <g, E[id_j]>) / tau,  0 on text rows
               dE[id] = sum of w_k g over all places that hold the id

Saved for the backward pass: the inputs. The forward pass and dscores have no atomics and repeat bit for bit. dE is a
sum by PyTorch's `index_add_`.

Bytes are the least possible: per trajectory row, K rows of D are read and one is written, each once. A program owns one
row and one tile of D. It issues its K gathers together, so that the loads overlap.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from latent_kernels._operator import once_differentiable
from latent_kernels.reference import latent_step as steps

UNUSED_ID = tl.constexpr(steps.UNUSED_ID)
TILE = 4096  # gathered elements per program, 32 per thread: more would spill on sm_100
NUM_WARPS = 4


@triton.jit
def row_weights(
    ids_ptr, scores_ptr, tau_ptr, row, V, K: tl.constexpr, BLOCK_K: tl.constexpr, TAU_PER_ROW: tl.constexpr
):  # fmt: skip
    """Return ids, weights and used flags [BLOCK_K] of a row, whether it is latent, whether its ids exist, and its tau.

    The ids are inside the table in any case.
    """
    k = tl.arange(0, BLOCK_K)
    ids = tl.load(ids_ptr + row * K + k, mask=k < K, other=0)
    hard = tl.sum(((ids == UNUSED_ID) & (k > 0)).to(tl.int32), 0) > 0
    scores = tl.load(scores_ptr + row * K + k, mask=k < K, other=-float("inf")).to(tl.float32)
    tau = tl.load(tau_ptr + row).to(tl.float32) if TAU_PER_ROW else tl.load(tau_ptr).to(tl.float32)
    # The scores of a text row may hold anything, NaN included, so they are replaced.
    scores = tl.where(hard, tl.where(k == 0, 0.0, -float("inf")), scores)
    scores = tl.where((k < K) & (scores != -float("inf")), tl.where(hard, scores, scores / tau), -float("inf"))
    weights = tl.exp(scores - tl.max(scores, 0))
    used = tl.where(hard, k == 0, k < K)
    exist = tl.sum((used & ((ids < 0) | (ids >= V))).to(tl.int32), 0) == 0
    ids = tl.minimum(tl.maximum(ids, 0), V - 1)
    return ids, weights / tl.sum(weights, 0), used, hard == 0, exist, tau


@triton.jit
def mix_embeddings_kernel(
    ids_ptr, scores_ptr, tau_ptr, table_ptr, out_ptr, table_stride, V, D,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, TAU_PER_ROW: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    ids, weights, used, _, exist, _ = row_weights(ids_ptr, scores_ptr, tau_ptr, row, V, K, BLOCK_K, TAU_PER_ROW)
    table = tl.load(
        table_ptr + ids[:, None] * table_stride + d[None, :], mask=used[:, None] & (d < D)[None, :], other=0.0
    ).to(tl.float32)
    # On a text row, a weight of zero times an infinite table entry would be NaN. So unused rows are not loaded.
    mixed = tl.where(exist, tl.sum(weights[:, None] * table, 0), float("nan"))
    tl.store(out_ptr + row * D + d, mixed.to(out_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def mix_embeddings_backward_kernel(
    ids_ptr, scores_ptr, tau_ptr, table_ptr, grad_ptr, out_ptr, table_stride, V, D,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, TAU_PER_ROW: tl.constexpr,
):  # fmt: skip
    """Store dscores_k = w_k (<grad, E_k> - sum_j w_j <grad, E_j>) / tau, and 0 on text rows and without ids."""
    row = tl.program_id(0).to(tl.int64)
    ids, weights, used, latent, exist, tau = row_weights(ids_ptr, scores_ptr, tau_ptr, row, V, K, BLOCK_K, TAU_PER_ROW)
    dots = tl.zeros([BLOCK_K], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        grad = tl.load(grad_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        table = tl.load(
            table_ptr + ids[:, None] * table_stride + d[None, :], mask=used[:, None] & (d < D)[None, :], other=0.0
        ).to(tl.float32)
        dots += tl.sum(table * grad[None, :], 1)
    k = tl.arange(0, BLOCK_K)
    result = tl.where(latent & exist, weights * (dots - tl.sum(weights * dots, 0)) / tau, 0.0)
    tl.store(out_ptr + row * K + k, result.to(out_ptr.dtype.element_ty), mask=k < K)


class _MixEmbeddings(torch.autograd.Function):
    """The mixtures. Saves ids, scores, table and tau."""

    @staticmethod
    def forward(ctx, ids: Tensor, scores: Tensor, embedding: Tensor, tau: Tensor) -> Tensor:
        ids, scores = ids.contiguous(), scores.contiguous()
        table = embedding if embedding.stride(1) == 1 else embedding.contiguous()
        (rows, width), dim = ids.shape, table.shape[1]
        out = torch.empty(rows, dim, dtype=table.dtype, device=table.device)
        if rows and dim:
            chosen = constants(width, per_row=tau.ndim == 1)
            mix_embeddings_kernel[(rows, triton.cdiv(dim, chosen["BLOCK_D"]))](
                ids_ptr=ids, scores_ptr=scores, tau_ptr=tau, table_ptr=table, out_ptr=out,
                table_stride=table.stride(0), V=len(table), D=dim, **chosen, num_warps=NUM_WARPS,
            )  # fmt: skip
        ctx.save_for_backward(ids, scores, table, tau)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor | None, Tensor | None, None]:
        ids, scores, table, tau = ctx.saved_tensors
        grad, (rows, width) = grad.contiguous(), ids.shape
        grad_scores = grad_table = None
        if ctx.needs_input_grad[1]:
            grad_scores = torch.empty_like(scores)
            if rows:
                mix_embeddings_backward_kernel[(rows,)](
                    ids_ptr=ids, scores_ptr=scores, tau_ptr=tau, table_ptr=table, grad_ptr=grad,
                    out_ptr=grad_scores, table_stride=table.stride(0), V=len(table), D=table.shape[1],
                    **constants(width, per_row=tau.ndim == 1), num_warps=NUM_WARPS,
                )  # fmt: skip
        if ctx.needs_input_grad[2]:
            grad_table = _table_gradient(ids, scores, tau, table, grad)
        return None, grad_scores, grad_table, None


def constants(width: int, *, per_row: bool) -> dict[str, int | bool]:
    """Return the constants of both kernels for mixtures of `width` components; tau is one number or one per row."""
    block = triton.next_power_of_2(width)
    return {"K": width, "BLOCK_K": block, "BLOCK_D": min(256, TILE // block), "TAU_PER_ROW": per_row}


def _table_gradient(ids: Tensor, scores: Tensor, tau: Tensor, table: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of the table [V, D]: w_k grad, added up over the rows that hold a token, in float32.

    One component at a time bounds the memory to [N, D]. PyTorch's `index_add_` adds up, and so follows
    `torch.use_deterministic_algorithms`.
    """
    weights = steps.mixture_weights(ids, scores.float(), tau.float())
    exist = steps.has_valid_ids(ids, len(table)).unsqueeze(-1)
    total = torch.zeros(table.shape, dtype=torch.float32, device=table.device)
    for k in range(ids.shape[1]):
        share = torch.where(exist, weights[:, k : k + 1] * grad.float(), 0.0)
        total.index_add_(0, ids[:, k].clamp(0, len(table) - 1), share)
    return total.to(table.dtype)


def mix_embeddings_triton(ids: Tensor, scores: Tensor, embedding: Tensor, tau: float | Tensor) -> Tensor:
    """Compute `latent_kernels.mix_embeddings` on checked arguments."""
    if not isinstance(tau, Tensor):  # filled on the device, because a copy from the host would wait for the device
        tau = torch.full((), tau, dtype=torch.float32, device=embedding.device)
    return _MixEmbeddings.apply(ids, scores, embedding, tau.contiguous())
