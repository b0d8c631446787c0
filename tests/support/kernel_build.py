"""What one build of a kernel is, and the heads that kernels are built for."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from latent_kernels._types import PLAIN_HEAD, HeadOptions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Build(NamedTuple):
    """A kernel with the types of its arguments, its constants, and the options of its launch."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    aligned: tuple[str, ...] = ()  # sizes and strides that are multiples of 16, as pointers always are
    major: int | None = None  # the only major compute capability on which it is launched; None is any


HEADS = {
    PLAIN_HEAD: "",
    HeadOptions(logit_scale=0.5): " scale",
    HeadOptions(torch.zeros(1), 0.5, 30.0): " bias and cap",
}


def head_types(dtype: str) -> dict[str, str]:
    """Return types of the arguments of a head whose bias is of a dtype."""
    return {"bias_ptr": f"*{dtype}", "inner": "fp32", "outer": "fp32"}
