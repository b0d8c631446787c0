"""A projection with noise in one launch; the noise is drawn in the epilogue of the product (Eq. 12-13 for the noise).

    forward    out = hidden @ weight.T + bias + scale * g     [B, D'] in the dtype of hidden
    backward   dhidden = grad @ weight,  dweight = grad.T @ hidden,  dbias = sum of grad over the rows

hidden is [B, D], weight [D', D], bias [D'], in float32 or a 16-bit dtype. Sums and noise are in float32. The gradients
do not depend on the noise: they are PyTorch's products. Saved: hidden and weight. The noise is a function of (seed,
step, row id, output unit), and the kernel has no atomics, so the output repeats bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from latent_kernels._triton.common import (
    MAX_REGISTERS,
    counter_option,
    dot_dtype,
    exponential_draws,
    gumbel_noise,
    product_tile,
    row_option,
    triton_dtype,
)
from latent_kernels._types import NoiseSpec

BLOCK_V, BLOCK_B, BLOCK_D = 64, 32, 32  # in a larger tile, the draws spill
BUILD_OPTIONS = {"num_warps": 4, "num_stages": 3, "maxnreg": MAX_REGISTERS}


# Batch sizes and counters change from call to call. Without specialisation, no value of them compiles a variant.
@triton.jit(do_not_specialize=["B", "seed", "step"])
def project_with_noise_kernel(
    weight_ptr, hidden_ptr, bias_ptr, draws_ptr, row_ids_ptr, out_ptr, scale, delta, seed, step,
    weight_stride, hidden_stride, draws_stride, B, V, D,
    NOISE: tl.constexpr, ONE_SIDED: tl.constexpr, INJECTED: tl.constexpr, HAS_ROW_IDS: tl.constexpr,
    HAS_BIAS: tl.constexpr, SCALE_PER_ROW: tl.constexpr, SEED_TENSOR: tl.constexpr, STEP_TENSOR: tl.constexpr,
    DOT_TYPE: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    out = product_tile(
        weight_ptr, hidden_ptr, weight_stride, hidden_stride, v, b, V, B, D, BLOCK_V, BLOCK_B, BLOCK_D, False, DOT_TYPE
    )
    row = b.to(tl.int64)[None, :]
    inside = (v < V)[:, None] & (b < B)[None, :]
    if HAS_BIAS:
        out += tl.load(bias_ptr + v, mask=v < V, other=0.0).to(tl.float32)[:, None]
    if NOISE:
        if INJECTED:
            draws = tl.load(draws_ptr + row * draws_stride + v[:, None], mask=inside, other=1.0).to(tl.float32)
        else:
            noise_row = row
            if HAS_ROW_IDS:
                noise_row = tl.load(row_ids_ptr + b, mask=b < B, other=0)[None, :]
            seed, step = counter_option(seed, SEED_TENSOR), counter_option(step, STEP_TENSOR)
            draws = exponential_draws(v[:, None], noise_row, seed, step)
        row_scale = row_option(scale, tl.minimum(b, B - 1)[None, :], SCALE_PER_ROW)
        out += gumbel_noise(draws, delta, ONE_SIDED) * row_scale
    tl.store(out_ptr + row * V + v[:, None], out.to(out_ptr.dtype.element_ty), mask=inside)


def constants(noise: NoiseSpec, dtype: torch.dtype, *, has_bias: bool) -> dict[str, object]:
    """Return the constants of the kernel, which multiplies in `dtype`."""
    return {
        "NOISE": noise.kind != "none", "ONE_SIDED": noise.kind == "one_sided",
        "INJECTED": noise.exponential is not None, "HAS_ROW_IDS": noise.row_ids is not None, "HAS_BIAS": has_bias,
        "SCALE_PER_ROW": isinstance(noise.scale, Tensor), "SEED_TENSOR": isinstance(noise.seed, Tensor),
        "STEP_TENSOR": isinstance(noise.step, Tensor), "DOT_TYPE": triton_dtype(dtype), "BLOCK_V": BLOCK_V,
        "BLOCK_B": BLOCK_B, "BLOCK_D": BLOCK_D,
    }  # fmt: skip


class _ProjectWithNoise(torch.autograd.Function):
    """The projection. Saves hidden and weight."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, noise: NoiseSpec) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        # The kernel addresses rows by their stride, and assumes that the elements of a row are adjacent.
        hidden, weight = (x if x.stride(1) == 1 else x.contiguous() for x in (hidden, weight))
        (rows, width), outputs = hidden.shape, len(weight)
        out = torch.empty(rows, outputs, dtype=hidden.dtype, device=hidden.device)
        unused = hidden  # in the place of a tensor that the kernel does not read
        draws = unused if noise.exponential is None else noise.exponential
        draws = draws if draws.stride(1) == 1 else draws.contiguous()
        if rows and outputs:
            project_with_noise_kernel[(triton.cdiv(outputs, BLOCK_V), triton.cdiv(rows, BLOCK_B))](
                weight_ptr=weight, hidden_ptr=hidden, bias_ptr=unused if bias is None else bias.contiguous(),
                draws_ptr=draws, row_ids_ptr=unused if noise.row_ids is None else noise.row_ids.contiguous(),
                out_ptr=out, scale=noise.scale, delta=float(noise.delta),
                seed=0 if noise.seed is None else noise.seed, step=noise.step,
                weight_stride=weight.stride(0), hidden_stride=hidden.stride(0), draws_stride=draws.stride(0),
                B=rows, V=outputs, D=width,
                **constants(noise, dot_dtype(hidden, weight), has_bias=bias is not None), **BUILD_OPTIONS,
            )  # fmt: skip
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        hidden, weight = ctx.saved_tensors
        common = torch.promote_types(hidden.dtype, weight.dtype)  # a product needs operands of one dtype
        grad_hidden = grad_weight = grad_bias = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_hidden = (grad.to(common) @ weight.to(common)).to(hidden.dtype)
            if ctx.needs_input_grad[1]:
                grad_weight = (grad.to(common).T @ hidden.to(common)).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_hidden, grad_weight, grad_bias, None


def project_with_noise_triton(hidden: Tensor, weight: Tensor, bias: Tensor | None, noise: NoiseSpec) -> Tensor:
    """Compute `latent_kernels.project_with_noise` on checked arguments."""
    if isinstance(noise.scale, Tensor):
        noise = noise._replace(scale=noise.scale.expand(len(hidden)).contiguous())
    else:
        noise = noise._replace(scale=float(noise.scale))
    return _ProjectWithNoise.apply(hidden, weight, bias, noise)
