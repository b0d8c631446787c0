"""A training step: replay of a rollout, policy loss, backward pass, clipping and AdamW.

The model and the replay are the trainer's in every provider, the loss differs. `body` has no loss: its backward pass
starts from the right gradient of the hidden states, known beforehand, so that what a provider takes beyond it is what
the loss costs. The learning rate is 0: the optimizer does all its work and every call computes the same.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from bench.fused_policy_loss import make_old_logprob, reference_loss
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
from bench.latent_logprob import TEMPERATURE, Logprob, Trajectory, naive_shortage, one_softmax
from bench.rollout import END, MODELS, make_model
from latent_grpo import LatentSampling, generate_latent
from latent_grpo.model import embedding_table, lm_head
from latent_grpo.rollout.trajectory import Rollout
from latent_grpo.update.replay import replay
from latent_kernels import fused_policy_loss
from latent_kernels.reference import HARD, policy_loss_ref

LATENT_TOP_K, SEED, MAX_GRAD_NORM = 10, 0, 1.0
EPSILON = 1e-4  # of AdamW; 1e-8 is 0 in float16, and 0 / 0 at rate 0 is not 0
# Prompts, responses to each, prompt tokens, steps.
ON_A_CPU = {"tiny": (4, 4, 16, 16), "smollm2": (2, 4, 64, 64)}
ON_A_GPU = (8, 8, 192, 128)


def cases(shape: Shape, device: torch.device) -> list[Parameters]:
    """Models small enough for the device; none for shapes that are no model's."""
    if shape.name not in MODELS:
        return []
    sizes = ON_A_GPU if device.type == "cuda" and shape.name != "tiny" else ON_A_CPU.get(shape.name)
    if sizes is None:
        return []
    prompts, group, prompt, steps = sizes
    base = {"model": shape.name, "hidden": shape.hidden, "vocab": shape.vocab}
    return [{**base, "prompts": prompts, "group_size": group, "prompt": prompt, "steps": steps}]


def sample(model: Any, parameters: Parameters) -> Rollout:
    """Responses of `steps` steps each: the first half latent, the rest made text steps of the highest logit's token."""
    prompts = torch.randint(1, parameters["vocab"], (parameters["prompts"], parameters["prompt"]), device=model.device)
    sampling = LatentSampling(
        max_new_tokens=parameters["steps"], latent_top_k=LATENT_TOP_K, seed=SEED, end_token_id=END, eos_token_id=()
    )
    rollout = generate_latent(
        model, prompts, torch.ones_like(prompts), sampling, num_generations=parameters["group_size"]
    )
    text = slice(parameters["steps"] // 2, None)
    ids, is_latent = rollout.ids.clone(), rollout.is_latent.clone()
    ids[:, text, 0], ids[:, text, 1:], is_latent[:, text] = rollout.token[:, text], HARD, False
    return dataclasses.replace(rollout, ids=ids, is_latent=is_latent)


def response_steps(parameters: Parameters) -> int:
    """Steps of all responses, N."""
    return int(parameters["prompts"] * parameters["group_size"] * parameters["steps"])


def step_cost(model: Any, parameters: Parameters) -> tuple[int, int]:
    """Least bytes and FLOPs: weights, gradients and moments read and written; three products a weight and token."""
    table = embedding_table(model)
    body = sum(p.numel() for p in model.parameters()) - table.numel()
    rows = response_steps(parameters)
    fed = parameters["prompts"] * parameters["prompt"] + rows
    return 10 * body * model.dtype.itemsize, 6 * body * fed + 4 * rows * table.numel()


def build(parameters: Parameters, device: torch.device, dtype: torch.dtype, compile: bool) -> Problem:
    """Outputs: the loss, and the gradients of every norm's weights before clipping, in one vector."""
    model = make_model(parameters, device, dtype)
    embedding_table(model).requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    norms = [p for p in trained if p.ndim == 1]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, eps=EPSILON)
    rollout = sample(model, parameters)
    advantages = torch.randn(len(rollout.mask), 1, device=device).expand(rollout.mask.shape)
    flat_ids, flat_scores, flat_advantages = (
        rollout.ids.flatten(0, 1),
        rollout.scores.flatten(0, 1),
        advantages.flatten(),
    )
    with torch.no_grad():
        hidden = replay(model, rollout)
    trajectory = Trajectory(hidden.flatten(0, 1), lm_head(model), flat_ids, flat_scores, flat_advantages)
    old = make_old_logprob(trajectory).view_as(rollout.logprob)

    shortage = naive_shortage({**parameters, "rows": response_steps(parameters)}, device)

    def step(loss: Tensor) -> Outputs:
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in norms if p.grad is not None])
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach(), gradient

    def naive(logprob: Logprob, name: str = "eager") -> Provider:
        def run() -> Outputs:
            states = replay(model, rollout).flatten(0, 1)
            out = logprob(states, lm_head(model), flat_ids, flat_scores, flat_advantages)
            return step(policy_loss_ref(out.view_as(old), old, advantages, rollout.mask)[0])

        return Provider(name, run, unavailable=shortage)

    def make(impl: str) -> Provider:
        def run() -> Outputs:
            loss, _ = fused_policy_loss(
                replay(model, rollout), lm_head(model), rollout.ids, rollout.scores, old, advantages, rollout.mask,
                temperature=TEMPERATURE, impl=impl,
            )  # fmt: skip
            return step(loss)

        return Provider("ours", run)

    expected_loss, slope = reference_loss(trajectory, old, advantages, rollout.mask)
    slope = slope.view_as(hidden).to(dtype)

    def body() -> Outputs:
        return step((replay(model, rollout) * slope).sum())

    expected: list[Tensor] = []

    def check_gradient(outputs: Outputs) -> str | None:
        if not expected:
            expected.append(body()[1])
        return compare("gradient of the norms", outputs[1], expected[0], tolerance(dtype))

    def check(outputs: Outputs) -> str | None:
        return compare("loss", outputs[0], expected_loss, tolerance(dtype)) or check_gradient(outputs)

    return Problem(
        [
            naive(one_softmax),
            *compiled(naive, one_softmax, compile),
            Provider("body", body, check=check_gradient),
            *ours(make, device),
        ],
        check,
        *step_cost(model, parameters),
    )


TRAIN_STEP = Operator("train_step", cases, build, measure_memory=True)
