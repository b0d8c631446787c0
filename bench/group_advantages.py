"""`group_advantages` against the rule applied to one group at a time."""

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
    compiled_provider,
    our_providers,
)
from latent_kernels import GroupAdvantages, group_advantages
from latent_kernels.reference.loss import group_advantages_ref

GROUP_SIZE = 8
PROMPTS = {"tiny": 4, "qwen-7b": 32}  # of the recipes
DEFAULT_PROMPTS = 64
BYTES_PER_RESPONSE = 4 + 8 + 1 + 4 + 16  # reward, group id, invalid mask, mean log-prob; the four outputs


def cases(shape: Shape, device: torch.device) -> list[Parameters]:
    """Return one case: a batch of prompts with eight responses each. One response in eight is invalid."""
    return [{"prompts": PROMPTS.get(shape.name, DEFAULT_PROMPTS), "group_size": GROUP_SIZE, "invalid": "exclude"}]


def build(parameters: Parameters, device: torch.device, dtype: torch.dtype, compile: bool) -> Problem:
    """Build a case: rewards, group_ids, invalid_mask and mean_logprob [R] in shuffled order.

    The inputs are float32 for every storage dtype, as in the trainer.
    """
    responses = parameters["prompts"] * parameters["group_size"]
    group_ids = torch.randperm(responses, device=device) % parameters["prompts"]
    rewards = torch.rand(responses, device=device).round()
    invalid_mask = torch.rand(responses, device=device) < 1 / 8
    mean_logprob = -torch.rand(responses, device=device)
    options = {"invalid_mask": invalid_mask, "invalid": parameters["invalid"]}

    def provider(advantages: Callable[..., GroupAdvantages], name: str = "eager") -> Provider:
        def run() -> Outputs:
            return tuple(advantages(rewards, group_ids, mean_logprob=mean_logprob, **options))

        return Provider(name, run)

    def make(impl: str) -> Provider:
        return provider(lambda *tensors, **options: group_advantages(*tensors, impl=impl, **options))

    expected: list[Tensor] = []

    def check(outputs: Outputs) -> str | None:
        if not expected:
            mean = mean_logprob.double()
            expected.extend(group_advantages_ref(rewards.double(), group_ids, mean_logprob=mean, **options))
        names = GroupAdvantages._fields
        faults = (compare(*field, 1e-4) for field in zip(names, outputs, expected, strict=True))
        return next(filter(None, faults), None)

    return Problem(
        [
            provider(group_advantages_ref),
            *compiled_provider(provider, group_advantages_ref, compile),
            *our_providers(make, device),
        ],
        check,
        bytes_moved=responses * BYTES_PER_RESPONSE,
    )


GROUP_ADVANTAGES = Operator("group_advantages", cases, build)
