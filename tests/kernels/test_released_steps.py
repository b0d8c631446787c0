"""Latent steps equal those of the released samplers of Latent-GRPO, SofT-GRPO and Multiplex Thinking.

tests/support/released_steps.py has the inputs; tests/kernels/data has the outputs of the released samplers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import released_steps as released
from support import tolerances as tol
from support.kernels import DEVICE, precision, with_kernel
from support.latent_steps import WIDTH
from torch import Tensor

from latent_kernels import latent_step_from_logits
from latent_kernels.reference.latent_step import latent_step_from_logits_ref

METHODS = pytest.mark.parametrize("method", ["latent_grpo", "soft_grpo", "multiplex"])
pytestmark = pytest.mark.usefixtures("small_segments")


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tol.GOLDEN_VALUE)


def cases(operator: Any, method: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the cases with their numbers. Triton's interpreter, which takes a second per row, gets three."""
    stride = 119 if DEVICE == "cpu" and precision(operator) == torch.float32 else 1
    for index in range(0, released.CASES, stride):
        yield index, released.step_case(method, index)


@with_kernel(latent_step_from_logits, latent_step_from_logits_ref)
@METHODS
def test_steps_equal_those_of_the_released_samplers(operator, method):
    outputs = [released.expected(f"released_steps_{method}", name) for name in ("token", "ids", "scores", "weights")]
    table = torch.randn(released.VOCAB[method], WIDTH)
    for index, case in cases(operator, method):
        logits, latent, end, kept = case.pop("logits"), case["latent_mask"], case["end_token_id"], case["top_k"]
        step = operator(logits, table, **case)
        token, ids, scores, weights = (output[index] for output in outputs)
        ended = latent & (token.squeeze(-1) == end)
        assert torch.equal(step.is_latent, latent & ~ended), index
        assert (step.top_token[ended] == end).all()
        # The released sampler of Latent-GRPO returns noisy scores also where the highest logit ends the run.
        noisy = latent & ~ended if method == "latent_grpo" else latent
        assert torch.equal(step.ids[latent], ids[latent, :kept].long()), index
        assert_close(step.weights[latent], weights[latent, :kept])
        assert_close(step.scores[noisy], scores[noisy, :kept])
        assert_close(step.embedding[latent], (weights[latent, :kept, None] * table[ids[latent, :kept].long()]).sum(1))
        clean = latent_step_from_logits(logits, table, noise="none", top_k=kept)
        assert torch.equal(step.ids[~latent], clean.ids[~latent])
        assert_close(step.scores[~latent], clean.scores[~latent])
        assert_close(step.weights[~latent], clean.weights[~latent])


@METHODS
def test_the_cases_have_rows_of_every_kind(method):
    tokens, counts = (
        released.expected(f"released_steps_{method}", "token"),
        dict.fromkeys(("latent", "ended", "hard"), 0),
    )
    ended_by_noise = 0
    for index in range(released.CASES):
        case = released.step_case(method, index)
        latent, end = case["latent_mask"], case["end_token_id"]
        ended = latent & (tokens[index].squeeze(-1) == end)
        counts["latent"] += int((latent & ~ended).sum())
        counts["ended"] += int(ended.sum())
        counts["hard"] += int((~latent).sum())
        ended_by_noise += int((ended & (case["logits"].argmax(-1) != end)).sum())
    assert counts["latent"] > 500
    assert min(counts["ended"], counts["hard"]) > 10
    assert ended_by_noise > 1
