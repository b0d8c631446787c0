"""What the logits of a model are besides the product with its LM head: a bias, a scale, a soft cap.

    logits = outer * (product + bias),                 outer = logit_scale
    logits = outer * tanh(inner * (product + bias)),   outer = softcap, inner = logit_scale / softcap

Kernels apply it to a product in registers, so it costs no pass over memory. V elements of the bias are read per row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from latent_kernels._types import HeadOptions


@triton.jit
def tanh(x):
    """Return tanh(x) of float32, by exponentials alone, with a relative error of at most 8 roundings (4.8e-7).

    (1 - e) / (1 + e) with e = exp(-2 |x|) loses the bits of a small x. There, five terms of the series are exact to
    8.5e-9.
    """
    decay = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - decay) / (1.0 + decay)
    square = x * x
    series = square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0 + square * (62.0 / 2835.0))))
    return tl.where(tl.abs(x) < 0.25, x + x * series, tl.where(x < 0.0, -large, large))


@triton.jit
def capped(product, bias_ptr, v, inside, inner, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """Return the logits of a product divided by `outer`. `v` and `inside` broadcast against the product."""
    if HAS_BIAS:
        product += tl.load(bias_ptr + v, mask=inside, other=0.0).to(tl.float32)
    if SOFTCAP:
        product = tanh(product * inner)
    return product


@triton.jit
def read_capped(
    row_ptr, bias_ptr, v, inside, inner, other, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Return the logits of elements of a row of products divided by `outer`, and `other` where not `inside`."""
    product = tl.load(row_ptr + v, mask=inside, other=other).to(tl.float32)
    product = capped(product, bias_ptr, v, inside, inner, HAS_BIAS, SOFTCAP)
    if SOFTCAP:
        product = tl.where(inside, product, other)  # the cap made a number of `other`
    return product


@triton.jit
def head_logits(
    product, bias_ptr, v, inside, inner, outer, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Return the logits of a product; `v` and `inside` broadcast against it."""
    logits = capped(product, bias_ptr, v, inside, inner, HAS_BIAS, SOFTCAP)
    if SCALED:
        logits = logits * outer
    return logits


def factor_arguments(head: HeadOptions) -> dict[str, float]:
    """Return the arguments `inner` and `outer` of a kernel."""
    if head.softcap is None:
        return {"inner": 1.0, "outer": float(head.logit_scale)}
    return {"inner": head.logit_scale / head.softcap, "outer": float(head.softcap)}


def bias_argument(head: HeadOptions, unused: Tensor) -> Tensor:
    """Return the bias as the kernels read it, or `unused` in its place."""
    return unused if head.bias is None else head.bias.contiguous()


def head_constants(head: HeadOptions) -> dict[str, bool]:
    """Return the constants of a kernel that applies `capped`."""
    return {"HAS_BIAS": head.bias is not None, "SOFTCAP": head.softcap is not None}


def logits_constants(head: HeadOptions) -> dict[str, bool]:
    """Return the constants of a kernel that applies `head_logits`."""
    return {**head_constants(head), "SCALED": factor_arguments(head)["outer"] != 1.0}
