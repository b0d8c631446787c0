"""`group_advantages` against the rule applied to one group at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.harness.cases import Operator, Outputs, Parameters, Problem, Provider, Shape, compare, compiled, ours
from latent_kernels import GroupAdvantages, group_advantages
from latent_kernels.reference import group_advantages_ref

GROUP_SIZE = 8
PROMPTS = {"tiny": 4, "qwen-7b": 32}  # of the recipes
DEFAULT_PROMPTS = 64


def cases(shape: Shape, device: torch.device) -> list[Parameters]:
    """A batch of prompts with eight responses each, one in eight invalid."""
    return [{"prompts": PROMPTS.get(shape.name, DEFAULT_PROMPTS), "group_size": GROUP_SIZE, "invalid": "exclude"}]


def build(parameters: Parameters, device: torch.device, dtype: torch.dtype, compile: bool) -> Problem:
    """rewards, group_ids, invalid_mask, mean_logprob [R] in shuffled order, in float32 whatever the storage dtype."""
    responses = parameters["prompts"] * parameters["group_size"]
    group_ids = torch.randperm(responses, device=device) % parameters["prompts"]
    rewards = torch.rand(responses, device=device).round()
    invalid_mask = torch.rand(responses, device=device) < 1 / 8
    mean_logprob = -torch.rand(responses, device=device)

    def provider(advantages: Callable[..., GroupAdvantages], name: str = "eager") -> Provider:
        def run() -> Outputs:
            return tuple(
                advantages(
                    rewards,
                    group_ids,
                    invalid_mask=invalid_mask,
                    invalid=parameters["invalid"],
                    mean_logprob=mean_logprob,
                )
            )

        return Provider(name, run)

    def make(impl: str) -> Provider:
        return provider(lambda *tensors, **options: group_advantages(*tensors, impl=impl, **options))

    expected: list[Tensor] = []

    def check(outputs: Outputs) -> str | None:
        if not expected:
            expected.extend(
                group_advantages_ref(
                    rewards.double(),
                    group_ids,
                    invalid_mask=invalid_mask,
                    invalid=parameters["invalid"],
                    mean_logprob=mean_logprob.double(),
                )
            )
        names = GroupAdvantages._fields
        faults = (compare(n, out, want, 1e-4) for n, out, want in zip(names, outputs, expected, strict=True))
        return next(filter(None, faults), None)

    return Problem(
        [
            provider(group_advantages_ref),
            *compiled(provider, group_advantages_ref, compile),
            *ours(make, device),
        ],
        check,
        bytes_moved=responses * (4 + 8 + 1 + 4 + 16),
    )


GROUP_ADVANTAGES = Operator("group_advantages", cases, build)
