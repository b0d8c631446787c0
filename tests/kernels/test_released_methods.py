"""Log-probs, losses and advantages equal those of the released code of Latent-GRPO, SofT-GRPO and Multiplex Thinking.

tests/support/released_losses.py has the inputs; tests/kernels/data has the outputs of the released functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import released_losses as released
from support import tolerances as tol
from support.kernels import DEVICE, narrowed, precision, with_kernel
from support.logprobs import value_and_gradients
from torch import Tensor

from latent_kernels import fused_policy_loss, group_advantages, latent_logprob_from_logits
from latent_kernels.reference.loss import group_advantages_ref, latent_logprob_from_logits_ref


def cases(operator: Any, make_case: Callable[[int], dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the cases with their numbers. Triton's interpreter takes one in eleven."""
    stride = 11 if DEVICE == "cpu" and precision(operator) == torch.float32 else 1
    for index in range(0, released.CASES, stride):
        yield index, narrowed(make_case(index), precision(operator))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=0, atol=tol.GOLDEN_VALUE, equal_nan=True)


@with_kernel(group_advantages, group_advantages_ref)
@pytest.mark.parametrize("invalid", ["exclude", "zero"])
def test_advantages_with_the_released_winner(operator, invalid):
    expected = released.expected("released_advantages", invalid)
    differences = 0
    for index, case in cases(operator, released.advantage_case):
        logprob, lengths = case.pop("logprob"), case.pop("lengths")
        mask = torch.arange(case["limit"]) < lengths.unsqueeze(-1)
        case |= dict(invalid_mask=lengths == case.pop("limit"), mean_logprob=(logprob * mask).sum(-1) / lengths)
        options = dict(invalid=invalid, first_token="best_of_group")
        result = operator(**case, **options, winner_from="all")
        rest = torch.where(lengths > 1, result.advantages, torch.nan)
        assert_same(torch.stack([result.first_step, rest], -1), expected[index])
        differences += not torch.equal(operator(**case, **options).first_step, result.first_step)
    assert bool(differences) == (invalid == "zero")


@with_kernel(group_advantages, group_advantages_ref)
def test_advantages_of_text_grpo(operator):
    expected = released.expected("released_advantages", "text")
    for index, case in cases(operator, released.advantage_case):
        inputs = {name: case[name] for name in ("rewards", "group_ids", "normalize_std")}
        result = operator(**inputs, first_token="all")
        assert_same(result.advantages, expected[index])
        assert_same(result.first_step, expected[index])


@with_kernel(latent_logprob_from_logits, latent_logprob_from_logits_ref)
def test_log_probs_of_soft_grpo(operator):
    values, products = (released.expected("released_soft_grpo", name) for name in ("logprob", "gradient"))
    for index, case in cases(operator, released.soft_grpo_case):
        value, gradient = value_and_gradients(
            lambda z, case=case: operator(z, case["ids"], case["scores"], method="soft_grpo"),
            case["logits"],
            upstream=case["upstream"],
        )
        assert_same(value, values[index])
        assert_same(gradient @ case["probes"], products[index])


@with_kernel(fused_policy_loss)
def test_losses_of_multiplex_thinking(operator):
    names = ("loss", "stats", "gradient", "logprob")
    losses, stats, products, logprobs = (released.expected("released_multiplex", name) for name in names)
    for index, case in cases(operator, released.multiplex_case):
        options, probes = case.pop("options"), case.pop("probes")
        hidden = case["hidden"].requires_grad_()
        loss, result = operator(**case, **options, method="multiplex", ratio="component")
        (gradient,) = torch.autograd.grad(loss, hidden)
        assert_same(loss.detach(), losses[index].squeeze())
        assert_same(torch.stack([result.clip_fraction, result.dual_clip_fraction, result.approx_kl]), stats[index][0])
        assert_same((gradient @ probes).flatten(0, 1), products[index])
        assert torch.isnan(result.margin_crossed)
        if precision(operator) == torch.float64:
            flat = (case[name].flatten(0, 1) for name in ("hidden", "ids", "scores"))
            assert_same(latent_logprob_from_logits(*flat, method="multiplex").detach(), logprobs[index])
