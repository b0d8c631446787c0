"""A projection with noise: PyTorch's product, then one elementwise kernel (Eq. 12-13 for the noise).

    forward    out = hidden @ weight.T + bias + scale * g     [B, D'] in the dtype of hidden
    backward   dhidden = grad @ weight,  dweight = grad.T @ hidden,  dbias = sum of grad over the rows

hidden is [B, D], weight [D', D], bias [D'], in float32 or a 16-bit dtype. The product is float32 [B, D']; the kernel
adds bias and noise in float32 and rounds once. The gradients do not depend on the noise: they are PyTorch's products.
Saved: hidden and weight. The noise is a function of (seed, step, row id, output unit), and there are no atomics, so the
output repeats bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from latent_kernels._linear import project
from latent_kernels._operator import once_differentiable
from latent_kernels._triton.common import counter_option, exponential_draws, gumbel_noise, row_option
from latent_kernels._types import NoiseSpec

BLOCK = 1024  # output units of a row per program: 8 draws per thread
BUILD_OPTIONS = {"num_warps": 4}


# Batch sizes and counters change from call to call. Without specialisation, no value of them compiles a variant.
@triton.jit(do_not_specialize=["seed", "step"])
def add_noise_kernel(
    product_ptr, bias_ptr, draws_ptr, row_ids_ptr, out_ptr, scale, delta, seed, step, draws_stride, V,
    NOISE: tl.constexpr, ONE_SIDED: tl.constexpr, INJECTED: tl.constexpr, HAS_ROW_IDS: tl.constexpr,
    HAS_BIAS: tl.constexpr, SCALE_PER_ROW: tl.constexpr, SEED_TENSOR: tl.constexpr, STEP_TENSOR: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = v < V
    out = tl.load(product_ptr + row * V + v, mask=inside, other=0.0)
    if HAS_BIAS:
        out += tl.load(bias_ptr + v, mask=inside, other=0.0).to(tl.float32)
    if NOISE:
        if INJECTED:
            draws = tl.load(draws_ptr + row * draws_stride + v, mask=inside, other=1.0).to(tl.float32)
        else:
            noise_row = row
            if HAS_ROW_IDS:
                noise_row = tl.load(row_ids_ptr + row)
            draws = exponential_draws(
                v, noise_row, counter_option(seed, SEED_TENSOR), counter_option(step, STEP_TENSOR)
            )
        out += gumbel_noise(draws, delta, ONE_SIDED) * row_option(scale, row, SCALE_PER_ROW)
    tl.store(out_ptr + row * V + v, out.to(out_ptr.dtype.element_ty), mask=inside)


def constants(noise: NoiseSpec, *, has_bias: bool) -> dict[str, object]:
    """Return the constants of the kernel."""
    return {
        "NOISE": noise.kind != "none", "ONE_SIDED": noise.kind == "one_sided",
        "INJECTED": noise.exponential is not None, "HAS_ROW_IDS": noise.row_ids is not None, "HAS_BIAS": has_bias,
        "SCALE_PER_ROW": isinstance(noise.scale, Tensor), "SEED_TENSOR": isinstance(noise.seed, Tensor),
        "STEP_TENSOR": isinstance(noise.step, Tensor), "BLOCK": BLOCK,
    }  # fmt: skip


class _ProjectWithNoise(torch.autograd.Function):
    """The projection. Saves hidden and weight."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, noise: NoiseSpec) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        product = project(hidden, weight)
        rows, outputs = product.shape
        # In place where nothing is rounded: an element is read by the program that writes it.
        out = product if hidden.dtype == product.dtype else torch.empty_like(product, dtype=hidden.dtype)
        unused = product  # in the place of a tensor that the kernel does not read
        draws = unused if noise.exponential is None else noise.exponential
        draws = draws if draws.stride(1) == 1 else draws.contiguous()
        if rows and outputs:
            add_noise_kernel[(rows, triton.cdiv(outputs, BLOCK))](
                product_ptr=product, bias_ptr=unused if bias is None else bias.contiguous(), draws_ptr=draws,
                row_ids_ptr=unused if noise.row_ids is None else noise.row_ids.contiguous(), out_ptr=out,
                scale=noise.scale, delta=float(noise.delta), seed=0 if noise.seed is None else noise.seed,
                step=noise.step, draws_stride=draws.stride(0), V=outputs,
                **constants(noise, has_bias=bias is not None), **BUILD_OPTIONS,
            )  # fmt: skip
        return out

    @staticmethod
    @once_differentiable
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
