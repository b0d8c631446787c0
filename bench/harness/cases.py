"""The types that every benchmark of an operator uses: cases, providers and the check of their outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from latent_kernels import _dispatch

BASELINE = "eager"  # the provider that ratios refer to, unless the operator names another
BARE_PRODUCT = "matmul"  # the provider that computes only the matrix products
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Parameters = dict[str, Any]  # of a case: JSON values only, because the memory measurement sends them to a process
Outputs = tuple[Tensor, ...]
Run = Callable[[], Outputs]


class CaseError(ValueError):
    """A benchmark's case does not support the requested number of rows. The message names the remedy."""


@dataclass(frozen=True)
class Operator:
    """A benchmark.

    cases: `cases(shape, device)` returns the parameters of every case.
    build: `build(parameters, device, dtype, compile)` allocates the inputs of a case.
    measure_memory: also measure peak memory on a CPU, which takes a fresh process per provider.
    baseline: name of the provider that ratios refer to.
    """

    name: str
    cases: Callable[[Shape, torch.device], list[Parameters]]
    build: Callable[[Parameters, torch.device, torch.dtype, bool], Problem]
    measure_memory: bool = False
    baseline: str = BASELINE


@dataclass(frozen=True)
class Problem:
    """A case with its inputs allocated.

    check: returns what is wrong with the outputs of a provider, or None.
    bytes_moved, flops: the least that any implementation must move and compute, for the roofline.
    """

    providers: list[Provider]
    check: Callable[[Outputs], str | None]
    bytes_moved: int
    flops: int = 0


@dataclass(frozen=True)
class Provider:
    """One implementation of an operator on the inputs of a case.

    run: the call that is timed.
    checked: returns the outputs to check if those of `run` are random. Default: `run`.
    check: replaces the check of the problem for a provider that does only part of the work, such as the bare product.
    unavailable: why the provider cannot run here.
    optional: a failure to run gives a remark in the report instead of an error.
    """

    name: str
    run: Run
    checked: Run | None = None
    check: Callable[[Outputs], str | None] | None = None
    unavailable: str | None = None
    optional: bool = False


@dataclass(frozen=True)
class Shape:
    """The sizes of a model: hidden width D and vocabulary V; and the soft cap of its logits, if it has one."""

    name: str
    hidden: int
    vocab: int
    description: str
    softcap: float | None = None

    @property
    def head(self) -> Parameters:
        """Return the parameters of its LM head: vocab, hidden and, where there is one, softcap."""
        sizes: Parameters = {"vocab": self.vocab, "hidden": self.hidden}
        return sizes if self.softcap is None else {**sizes, "softcap": self.softcap}


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", 64, 1003, "seconds on a CPU"),
        Shape("smollm2", 576, 49152, "SmolLM2-135M"),
        Shape("wide-vocab", 576, 128256, "SmolLM2's width with Llama's vocabulary"),
        Shape("llama-1b", 2048, 128256, "Llama-3.2-1B"),
        Shape("qwen-7b", 3584, 152064, "Qwen2.5-7B"),
        Shape("gemma-2-2b", 2304, 256000, "Gemma-2-2B: logits with a soft cap of 30", softcap=30.0),
    )
}


def our_providers(make: Callable[[str], Provider], device: torch.device) -> list[Provider]:
    """Return the providers of latent_kernels. `make(impl)` builds one; its name is replaced."""
    triton = replace(make("triton"), name="ours-triton", unavailable=triton_unavailable(device))
    return [replace(make("eager"), name="ours-eager"), triton]


def triton_unavailable(device: torch.device) -> str | None:
    """Return why `impl="triton"` cannot run on `device`, or None if it can."""
    if not _dispatch.triton_available():
        return "Triton is not installed"
    # Triton's interpreter runs on a CPU, but its times say nothing about the kernels.
    return None if device.type == "cuda" else "no CUDA device"


def compiled_provider(
    make: Callable[[Callable[..., Any]], Provider], function: Callable[..., Any], compile: bool
) -> list[Provider]:
    """Return a provider of `function` under torch.compile, or no provider if `compile` is False.

    torch.compile compiles at the first call, which is the check. It is therefore not timed.
    """
    if not compile:
        return []
    return [replace(make(torch.compile(function, dynamic=False)), name="compile", optional=True)]


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Return logits, of any shape, under a soft cap, in float32; None is no cap and changes nothing."""
    return logits if softcap is None else softcap * torch.tanh(logits.float() / softcap)


def compare(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> str | None:
    """Return what is wrong with a tensor, or None.

    The norm of the error, relative to the norm of `expected`, must be within `tolerance`.
    """
    if actual.shape != expected.shape:
        return f"{name} has shape {list(actual.shape)}, expected {list(expected.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    error = (torch.linalg.vector_norm(actual - expected) / torch.linalg.vector_norm(expected).clamp_min(1e-12)).item()
    # Written so that a NaN fails: every comparison with NaN is False.
    return None if error <= tolerance else f"{name} is off by {error:.2g} in relative norm, more than {tolerance:g}"


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative error in norm that a correct implementation stays within for inputs stored in `dtype`."""
    return 1e-4 if dtype == torch.float32 else 5e-2


def dtype_name(dtype: torch.dtype) -> str:
    """Return `float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")
