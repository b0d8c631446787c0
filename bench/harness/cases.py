"""What an operator's file gives: shapes, cases, providers, and the check of their outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from latent_kernels import _dispatch

BASELINE = "eager"  # the provider that ratios refer to


BARE = "matmul"  # the provider that is the matrix product alone


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


Parameters = dict[str, Any]  # of a case: JSON values only, since the memory measurement sends them to another process


Outputs = tuple[Tensor, ...]


Run = Callable[[], Outputs]


class CaseError(ValueError):
    """Rows that an operator's case cannot have; the message names the remedy."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a model: hidden width D and vocabulary V."""

    name: str
    hidden: int
    vocab: int
    description: str


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", 64, 1003, "seconds on a CPU"),
        Shape("smollm2", 576, 49152, "SmolLM2-135M"),
        Shape("wide-vocab", 576, 128256, "SmolLM2's width with Llama's vocabulary"),
        Shape("llama-1b", 2048, 128256, "Llama-3.2-1B"),
        Shape("qwen-7b", 3584, 152064, "Qwen2.5-7B"),
    )
}


@dataclass(frozen=True)
class Provider:
    """One implementation of an operator on the inputs of a case.

    `run` is what is timed. `check` replaces the problem's where it is a part of the work only, as the bare product is.
    `checked` gives the outputs for the check where `run`'s own are random; by default `run`.
    `unavailable` says why it cannot run here. `optional` marks one whose failure to run is a remark, not an error.
    """

    name: str
    run: Run
    checked: Run | None = None
    check: Callable[[Outputs], str | None] | None = None
    unavailable: str | None = None
    optional: bool = False


@dataclass(frozen=True)
class Problem:
    """A case with its inputs allocated.

    `check` returns what is wrong with a provider's outputs, or None. `bytes_moved` and `flops` are the least that the
    operator can do, for the roofline.
    """

    providers: list[Provider]
    check: Callable[[Outputs], str | None]
    bytes_moved: int
    flops: int = 0


@dataclass(frozen=True)
class Operator:
    """A benchmark: `cases(shape, device)` and `build(parameters, device, dtype, compile)`.

    `baseline` is the provider that ratios refer to.

    `measure_memory`: measure peak memory on a CPU too, where it takes a fresh process for every provider.
    """

    name: str
    cases: Callable[[Shape, torch.device], list[Parameters]]
    build: Callable[[Parameters, torch.device, torch.dtype, bool], Problem]
    measure_memory: bool = False
    baseline: str = BASELINE


def ours(make: Callable[[str], Provider], device: torch.device) -> list[Provider]:
    """Our implementations; `make(impl)` builds a provider, whose name is replaced."""
    triton = replace(make("triton"), name="ours-triton", unavailable=triton_unavailable(device))
    return [replace(make("eager"), name="ours-eager"), triton]


def triton_unavailable(device: torch.device) -> str | None:
    """Why `impl="triton"` cannot run on `device`, or None where it can."""
    if not _dispatch.triton_available():
        return "Triton is not installed"
    return None if device.type == "cuda" else "no CUDA device"


def compiled(
    make: Callable[[Callable[..., Any]], Provider], function: Callable[..., Any], wanted: bool
) -> list[Provider]:
    """`function` under torch.compile as a provider, compiled at its first call; none unless wanted."""
    if not wanted:
        return []
    return [replace(make(torch.compile(function, dynamic=False)), name="compile", optional=True)]


def compare(name: str, value: Tensor, expected: Tensor, tolerance: float) -> str | None:
    """What is wrong with a tensor whose error in norm, relative to `expected`, must be within `tolerance`; or None."""
    if value.shape != expected.shape:
        return f"{name} has shape {list(value.shape)}, expected {list(expected.shape)}"
    value, expected = value.detach().double(), expected.detach().double()
    error = (torch.linalg.vector_norm(value - expected) / torch.linalg.vector_norm(expected).clamp_min(1e-12)).item()
    return None if error <= tolerance else f"{name} is off by {error:.2g} in relative norm, more than {tolerance:g}"


def tolerance(dtype: torch.dtype) -> float:
    """Relative error in norm that a correct implementation stays within when inputs are stored in `dtype`."""
    return 1e-4 if dtype == torch.float32 else 5e-2


@dataclass(frozen=True)
class Settings:
    """How to run: device, storage dtype, rounds (None: as many as fit a case's time), rows of the inputs (None: each
    operator's own), names of providers (None: all), and what to include."""

    device: torch.device
    dtype: torch.dtype
    repeats: int | None = None
    rows: tuple[int, ...] | None = None
    providers: tuple[str, ...] | None = None
    compile: bool = False
    memory: bool = True
