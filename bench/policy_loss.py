"""`policy_loss`: forward pass and gradient, against a plain composition of PyTorch."""

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
    compare,
    compiled_provider,
    our_providers,
)
from latent_kernels import policy_loss
from latent_kernels.reference.loss import policy_loss_ref

CLIP, DUAL_CLIP = 0.2, 3.0
SIZES = {"tiny": (8, 16), "qwen-7b": (256, 4096)}  # responses and steps of the recipes
DEFAULT_SIZE = (512, 128)


def cases(shape: Shape, device: torch.device) -> list[Parameters]:
    """Return one case: a batch of responses. Half of the steps are masked."""
    responses, steps = SIZES.get(shape.name, DEFAULT_SIZE)
    return [{"responses": responses, "steps": steps, "active_share": 0.5}]


def plain_loss(logprob: Tensor, old_logprob: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Return the token mean of the clipped, dual-clipped surrogate, without statistics."""
    ratio = (logprob - old_logprob).clamp(-20.0, 20.0).exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1.0 - CLIP, 1.0 + CLIP))
    loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * DUAL_CLIP), loss)
    return (loss * mask).sum() / mask.sum()


def build(parameters: Parameters, device: torch.device, dtype: torch.dtype, compile: bool) -> Problem:
    """Build a case: logprob and the other inputs [R, T]. Outputs: the loss and dlogprob [R, T].

    The inputs are float32 for every storage dtype, as in the trainer.
    """
    size = parameters["responses"], parameters["steps"]
    old_logprob = -3.0 * torch.rand(size, device=device)
    logprob = (old_logprob + 0.3 * torch.randn(size, device=device)).requires_grad_()
    advantages = torch.randn(size[0], 1, device=device).expand(size).contiguous()
    mask = torch.rand(size, device=device) < parameters["active_share"]

    def provider(loss: Callable[[Tensor, Tensor, Tensor, Tensor], Any], name: str = "eager") -> Provider:
        def run() -> Outputs:
            result = loss(logprob, old_logprob, advantages, mask)
            value: Tensor = result[0] if isinstance(result, tuple) else result  # ours returns statistics too
            return value.detach(), *torch.autograd.grad(value, logprob)

        return Provider(name, run)

    def make(impl: str) -> Provider:
        return provider(lambda *tensors: policy_loss(*tensors, impl=impl))

    def check(outputs: Outputs) -> str | None:
        value, _ = policy_loss_ref(logprob.double(), old_logprob.double(), advantages.double(), mask)
        (gradient,) = torch.autograd.grad(value, logprob)
        return compare("loss", outputs[0], value, 1e-4) or compare("dlogprob", outputs[1], gradient, 1e-4)

    traffic = logprob.numel() * (4 * 4 + 1)  # three inputs and dlogprob in float32, the mask
    return Problem(
        [provider(plain_loss), *compiled_provider(provider, plain_loss, compile), *our_providers(make, device)],
        check,
        traffic,
    )


POLICY_LOSS = Operator("policy_loss", cases, build)
