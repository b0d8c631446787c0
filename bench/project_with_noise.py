"""`project_with_noise` against a linear layer plus noise drawn by PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness.cases import (
    Operator,
    Outputs,
    Parameters,
    Problem,
    Provider,
    Shape,
    compare,
    compiled_provider,
    our_providers,
    tolerance,
)
from latent_kernels import project_with_noise
from latent_kernels._noise import exponential_draws, gumbel_noise
from latent_kernels.reference.latent_step import project_with_noise_ref

SEED = 1234


def cases(shape: Shape, device: torch.device) -> list[Parameters]:
    """Return a square projection with a bias of 256 rows (16 on the tiny shape), and on a GPU also of 8,192 rows."""
    sizes = [16] if shape.name == "tiny" else [256, 8192] if device.type == "cuda" else [256]
    return [{"rows": rows, "hidden": shape.hidden, "noise": "one_sided"} for rows in sizes]


def noisy_linear(hidden: Tensor, weight: Tensor, bias: Tensor, exponential: Tensor) -> Tensor:
    """Return a linear layer's output [B, D] plus clamped Gumbel noise from Exp(1) draws [B, D]."""
    return (F.linear(hidden, weight, bias).float() + gumbel_noise(exponential, "one_sided")).to(hidden.dtype)


def build(parameters: Parameters, device: torch.device, dtype: torch.dtype, compile: bool) -> Problem:
    """Build a case: hidden [B, D], weight [D, D], bias [D]. Only the forward pass is timed.

    Every timed call of eager PyTorch draws fresh noise. The check gives one set of draws to all providers.
    """
    rows, width = parameters["rows"], parameters["hidden"]
    hidden = torch.randn(rows, width, device=device).to(dtype)
    weight = (torch.randn(width, width, device=device) / width**0.5).to(dtype)
    bias = torch.randn(width, device=device).to(dtype)

    def fresh_draws() -> Tensor:
        return torch.empty(rows, width, device=device).exponential_()

    def draws_of_seed() -> Tensor:
        units = torch.arange(width, device=device).expand(rows, width)
        return exponential_draws(units, torch.arange(rows, device=device), SEED, 0)

    def plain(layer: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], name: str = "eager") -> Provider:
        return Provider(
            name,
            run=lambda: (layer(hidden, weight, bias, fresh_draws()),),
            checked=lambda: (layer(hidden, weight, bias, draws_of_seed()),),
        )

    def make(impl: str) -> Provider:
        return Provider("ours", lambda: (project_with_noise(hidden, weight, bias, seed=SEED, impl=impl),))

    def check(outputs: Outputs) -> str | None:
        expected = project_with_noise_ref(hidden.float(), weight.float(), bias.float(), seed=SEED)
        return compare("output", outputs[0], expected, tolerance(dtype))

    traffic = (2 * hidden.numel() + weight.numel() + bias.numel()) * dtype.itemsize
    return Problem(
        [plain(noisy_linear), *compiled_provider(plain, noisy_linear, compile), *our_providers(make, device)],
        check,
        traffic,
        flops=2 * rows * width * width,
    )


PROJECT_WITH_NOISE = Operator("project_with_noise", cases, build)
