"""`latent_step` from hidden states, against the released rule and against only the product with the LM head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.harness.cases import (
    Operator,
    Outputs,
    Parameters,
    Problem,
    Provider,
    Shape,
    capped,
    compare,
    compiled_provider,
    our_providers,
    tolerance,
)
from bench.latent_step_from_logits import (
    SEED,
    TOP_K,
    TOP_P,
    check_against,
    draws_of_seed,
    fresh_draws,
    sorted_step,
    step_outputs,
)
from latent_kernels import latent_step
from latent_kernels._linear import project
from latent_kernels.reference.latent_step import latent_step_from_logits_ref

ROWS_ON_A_GPU = (1, 8, 32, 64, 128, 256, 1024)
SPREAD = 3.0  # standard deviation of the logits before a cap
CAP_FLOPS = 16  # of a soft cap, per logit


def cases(shape: Shape, device: torch.device) -> list[Parameters]:
    """Return one case per number of rows of a rollout on a GPU; on a CPU one of 32 rows (4 on the tiny shape)."""
    on_cpu = (4,) if shape.name == "tiny" else (32,)
    counts = ROWS_ON_A_GPU if device.type == "cuda" else on_cpu
    return [{"rows": rows, **shape.head, "top_k": TOP_K} for rows in counts]


def build(parameters: Parameters, device: torch.device, dtype: torch.dtype, compile: bool) -> Problem:
    """Build a case: hidden [B, D], tied lm_head and embedding [V, D].

    Logits are float32, except those of `matmul`, the bare product. Every timed call of eager PyTorch draws fresh noise.
    The check gives one set of draws to all providers.
    """
    rows, vocab, width = parameters["rows"], parameters["vocab"], parameters["hidden"]
    softcap = parameters.get("softcap")
    hidden = torch.randn(rows, width, device=device).to(dtype)
    head = (torch.randn(vocab, width, device=device) * (SPREAD / width**0.5)).to(dtype)
    options: dict[str, Any] = {"top_k": TOP_K, "top_p": TOP_P, "seed": SEED}

    def released(hidden: Tensor, head: Tensor, exponential: Tensor) -> Outputs:
        return sorted_step(capped(project(hidden, head), softcap), head, exponential)

    def plain(step: Callable[[Tensor, Tensor, Tensor], Outputs], name: str = "eager") -> Provider:
        return Provider(
            name,
            run=lambda: step(hidden, head, fresh_draws(rows, vocab, device)),
            checked=lambda: step(hidden, head, draws_of_seed(rows, vocab, device)),
        )

    def reference() -> Outputs:
        return step_outputs(latent_step_from_logits_ref(capped(project(hidden, head), softcap), head, **options))

    def make(impl: str) -> Provider:
        return Provider(
            "ours", lambda: step_outputs(latent_step(hidden, head, head, softcap=softcap, impl=impl, **options))
        )

    def check_product(outputs: Outputs) -> str | None:
        return compare("logits", outputs[0], project(hidden, head), tolerance(dtype))

    return Problem(
        providers=[
            plain(released),
            *compiled_provider(plain, released, compile),
            Provider("matmul", run=lambda: (hidden @ head.T,), check=check_product),
            *our_providers(make, device),
        ],
        check=check_against(reference, dtype),
        # The head once, hidden, the K embeddings of a row and their mixture.
        bytes_moved=(vocab * width + rows * width * (TOP_K + 2)) * dtype.itemsize,
        flops=rows * vocab * (2 * width + (0 if softcap is None else CAP_FLOPS)),
    )


LATENT_STEP = Operator("latent_step", cases, build, measure_memory=True)
