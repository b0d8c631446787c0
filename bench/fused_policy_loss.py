"""`fused_policy_loss`, forward and gradient in hidden, against PyTorch that holds [N, V]."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.common import Operator, Outputs, Parameters, Problem, Provider, Shape, compare, compiled, ours, tolerance
from bench.latent_logprob import (
    TEMPERATURE,
    Logprob,
    in_blocks,
    logprob_cost,
    make_trajectory,
    naive_shortage,
    one_softmax,
    reference,
)
from bench.latent_logprob import cases as logprob_cases
from latent_kernels import fused_policy_loss
from latent_kernels.reference import policy_loss_ref


def cases(shape: Shape, device: torch.device) -> list[Parameters]:
    """The steps of `latent_logprob` as responses of 128 steps (16 on the tiny shape)."""
    steps = 16 if shape.name == "tiny" else 128
    return [{**parameters, "response_steps": steps} for parameters in logprob_cases(shape, device)]


def build(parameters: Parameters, device: torch.device, dtype: torch.dtype, compile: bool) -> Problem:
    """Outputs: the loss, and dHidden [R, T, D]."""
    trajectory = make_trajectory(parameters, device, dtype)
    flat_hidden, lm_head, flat_ids, flat_scores, flat_old, flat_advantages = trajectory
    steps = parameters["response_steps"]
    hidden = flat_hidden.detach().unflatten(0, (-1, steps)).requires_grad_()
    ids, scores, old, advantages = (
        x.unflatten(0, (-1, steps)) for x in (flat_ids, flat_scores, flat_old, flat_advantages)
    )
    mask = torch.ones_like(old, dtype=torch.bool)
    shortage = naive_shortage(parameters, device)

    def with_gradient(loss: Tensor) -> Outputs:
        return loss.detach(), *torch.autograd.grad(loss, hidden)

    def naive(logprob: Logprob, name: str = "eager") -> Provider:
        def run() -> Outputs:
            out = logprob(hidden.flatten(0, 1), lm_head, flat_ids, flat_scores, flat_advantages)
            return with_gradient(policy_loss_ref(out.view_as(old), old, advantages, mask)[0])

        return Provider(name, run, unavailable=shortage)

    def make(impl: str) -> Provider:
        def run() -> Outputs:
            loss, _ = fused_policy_loss(
                hidden, lm_head, ids, scores, old, advantages, mask, temperature=TEMPERATURE, impl=impl
            )
            return with_gradient(loss)

        return Provider("ours", run)

    expected: list[Tensor] = []

    def check(outputs: Outputs) -> str | None:
        if not expected:
            expected.extend(_expected())
        return compare("loss", outputs[0], expected[0], tolerance(dtype)) or compare(
            "dHidden", outputs[1], expected[1], tolerance(dtype)
        )

    def _expected() -> tuple[Tensor, Tensor]:
        losses: list[Tensor] = []

        def upstream(logprob: Tensor) -> Tensor:
            logprob = logprob.view_as(old).requires_grad_()
            losses.append(policy_loss_ref(logprob, old, advantages, mask)[0])
            return torch.autograd.grad(losses[0], logprob)[0].flatten()

        gradient = in_blocks(trajectory, upstream)[1]
        return losses[0].detach(), gradient.view_as(hidden)

    return Problem(
        [
            naive(one_softmax),
            naive(reference, "reference"),
            *compiled(naive, one_softmax, compile),
            *ours("fused_policy_loss", make, device),
        ],
        check,
        *logprob_cost(parameters, dtype),
    )


FUSED_POLICY_LOSS = Operator("fused_policy_loss", cases, build, measure_memory=True)
