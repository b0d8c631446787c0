"""`latent_step` from hidden states, against the released rule and against the LM head's product alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.harness.cases import (
    Operator,
    Outputs,
    Parameters,
    Problem,
    Provider,
    Shape,
    compare,
    compiled,
    ours,
    tolerance,
)
from bench.latent_step_from_logits import SEED, TOP_K, TOP_P, sorted_step, step_check
from latent_kernels import latent_step
from latent_kernels._linear import project
from latent_kernels._noise import exponential_draws
from latent_kernels.reference import latent_step_from_logits_ref

ROWS_ON_A_GPU = (1, 8, 32, 64, 128, 256, 1024)
SPREAD = 3.0  # standard deviation of the logits


def cases(shape: Shape, device: torch.device) -> list[Parameters]:
    """On a GPU every number of rows of interest; on a CPU 32 (4 on the tiny shape)."""
    on_cpu = (4,) if shape.name == "tiny" else (32,)
    counts = ROWS_ON_A_GPU if device.type == "cuda" else on_cpu
    return [{"rows": rows, "vocab": shape.vocab, "hidden": shape.hidden, "top_k": TOP_K} for rows in counts]


def build(parameters: Parameters, device: torch.device, dtype: torch.dtype, compile: bool) -> Problem:
    """hidden [B, D], tied lm_head and embedding [V, D]; float32 logits but for `matmul`, the bare product.

    Every call of eager draws fresh noise; the check uses one stream for all providers.
    """
    rows, vocab, width = parameters["rows"], parameters["vocab"], parameters["hidden"]
    hidden = torch.randn(rows, width, device=device).to(dtype)
    head = (torch.randn(vocab, width, device=device) * (SPREAD / width**0.5)).to(dtype)

    def fresh() -> Tensor:
        return torch.empty(rows, vocab, device=device).exponential_()

    def stream() -> Tensor:
        ids = torch.arange(vocab, device=device).expand(rows, vocab)
        return exponential_draws(ids, torch.arange(rows, device=device), SEED, 0)

    def released(hidden: Tensor, head: Tensor, exponential: Tensor) -> Outputs:
        return sorted_step(project(hidden, head), head, exponential)

    def plain(step: Callable[[Tensor, Tensor, Tensor], Outputs], name: str = "eager") -> Provider:
        return Provider(name, run=lambda: step(hidden, head, fresh()), checked=lambda: step(hidden, head, stream()))

    def reference() -> Outputs:
        step = latent_step_from_logits_ref(project(hidden, head), head, top_k=TOP_K, top_p=TOP_P, seed=SEED)
        return step.ids, step.scores, step.embedding

    def make(impl: str) -> Provider:
        def run() -> Outputs:
            step = latent_step(hidden, head, head, top_k=TOP_K, top_p=TOP_P, seed=SEED, impl=impl)
            return step.ids, step.scores, step.embedding

        return Provider("ours", run)

    def check_product(outputs: Outputs) -> str | None:
        return compare("logits", outputs[0], project(hidden, head), tolerance(dtype))

    return Problem(
        providers=[
            plain(released),
            *compiled(plain, released, compile),
            Provider("matmul", run=lambda: (hidden @ head.T,), check=check_product),
            *ours(make, device),
        ],
        check=step_check(reference, dtype),
        bytes_moved=(vocab * width + rows * width * (TOP_K + 2)) * dtype.itemsize,
        flops=2 * rows * vocab * width,
    )


LATENT_STEP = Operator("latent_step", cases, build, measure_memory=True)
