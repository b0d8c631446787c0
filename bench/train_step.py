"""A training step: replay of a rollout, policy loss, backward pass, clipping and AdamW.

Every provider uses the model and the replay of the trainer; only the loss differs. `body` has no loss: its backward
pass starts from the right gradient of the hidden states, which is known beforehand. The time of a provider beyond
`body` is the cost of its loss. The learning rate is 0: the optimizer does all its work, and every call computes the
same.
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
    compiled_provider,
    our_providers,
    tolerance,
)
from bench.latent_logprob import TEMPERATURE, Logprob, Trajectory, naive_shortage, one_softmax
from bench.rollout import END, MODELS, make_model
from latent_grpo import LatentSampling, generate_latent
from latent_grpo.model import embedding_table, lm_head
from latent_grpo.rollout.trajectory import Rollout
from latent_grpo.update.replay import replay
from latent_kernels import fused_policy_loss
from latent_kernels.reference.latent_step import UNUSED_ID
from latent_kernels.reference.loss import policy_loss_ref

LATENT_TOP_K, SEED, MAX_GRAD_NORM = 10, 0, 1.0
EPSILON = 1e-4  # of AdamW; the usual 1e-8 is 0 in float16, where 0 / 0 would make weights NaN even at rate 0
# Prompts, responses per prompt, prompt tokens, steps.
ON_A_CPU = {"tiny": (4, 4, 16, 16), "smollm2": (2, 4, 64, 64)}
ON_A_GPU = (8, 8, 192, 128)


def cases(shape: Shape, device: torch.device) -> list[Parameters]:
    """Return one case if the shape is that of a model small enough for the device, otherwise none."""
    if shape.name not in MODELS:
        return []
    sizes = ON_A_GPU if device.type == "cuda" and shape.name != "tiny" else ON_A_CPU.get(shape.name)
    if sizes is None:
        return []
    prompts, group, prompt, steps = sizes
    base = {"model": shape.name, "hidden": shape.hidden, "vocab": shape.vocab}
    return [{**base, "prompts": prompts, "group_size": group, "prompt": prompt, "steps": steps}]


def build(parameters: Parameters, device: torch.device, dtype: torch.dtype, compile: bool) -> Problem:
    """Build a case. Outputs: the loss, and the gradients of all norm weights before clipping, in one vector."""
    model = make_model(parameters, device, dtype)
    embedding_table(model).requires_grad_(False)
    update = Update(model)
    batch = make_batch(model, parameters)
    old, advantages, mask = batch.old_logprob, batch.advantages, batch.rollout.mask
    shortage = naive_shortage({**parameters, "rows": response_steps(parameters)}, device)

    def naive(logprob: Logprob, name: str = "eager") -> Provider:
        def run() -> Outputs:
            states, flat = replay(model, batch.rollout).flatten(0, 1), batch.flat
            actual = logprob(states, lm_head(model), flat.ids, flat.scores, flat.advantages)
            return update(policy_loss_ref(actual.view_as(old), old, advantages, mask)[0])

        return Provider(name, run, unavailable=shortage)

    def make(impl: str) -> Provider:
        def run() -> Outputs:
            inputs = (lm_head(model), batch.rollout.ids, batch.rollout.scores, old, advantages, mask)
            hidden = replay(model, batch.rollout)
            return update(fused_policy_loss(hidden, *inputs, temperature=TEMPERATURE, impl=impl)[0])

        return Provider("ours", run)

    expected_loss, hidden_gradient = reference_loss(batch.flat, old, advantages, mask)
    hidden_gradient = hidden_gradient.view(*mask.shape, -1).to(dtype)

    def body() -> Outputs:
        # The gradient of this sum in the hidden states is `hidden_gradient`, whatever the states are.
        return update((replay(model, batch.rollout) * hidden_gradient).sum())

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
            *compiled_provider(naive, one_softmax, compile),
            Provider("body", body, check=check_gradient),
            *our_providers(make, device),
        ],
        check,
        *step_cost(model, parameters),
    )


class Update:
    """Backward pass, clipping and AdamW: the parts of a step behind the loss."""

    def __init__(self, model: Any) -> None:
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.norms = [p for p in self.trained if p.ndim == 1]
        self.optimizer = torch.optim.AdamW(self.trained, lr=0.0, weight_decay=0.0, eps=EPSILON)

    def __call__(self, loss: Tensor) -> Outputs:
        """Take a step. Return the loss, and the gradients of all norm weights before clipping."""
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in self.norms if p.grad is not None])
        torch.nn.utils.clip_grad_norm_(self.trained, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), gradient


@dataclasses.dataclass(frozen=True)
class Batch:
    """A rollout with R responses of T steps, and what the loss needs of it. `flat` is the same as N = R T steps."""

    rollout: Rollout
    flat: Trajectory
    old_logprob: Tensor  # [R, T]
    advantages: Tensor  # [R, T], constant within a response


def make_batch(model: Any, parameters: Parameters) -> Batch:
    """Sample a rollout and draw advantages and old log-probs for it."""
    rollout = sample(model, parameters)
    advantages = torch.randn(len(rollout.mask), 1, device=model.device).expand(rollout.mask.shape)
    with torch.no_grad():
        hidden = replay(model, rollout).flatten(0, 1)
    ids, scores = rollout.ids.flatten(0, 1), rollout.scores.flatten(0, 1)
    flat = Trajectory(hidden, lm_head(model), ids, scores, advantages.flatten())
    return Batch(rollout, flat, make_old_logprob(flat).view_as(rollout.logprob), advantages)


def sample(model: Any, parameters: Parameters) -> Rollout:
    """Sample responses of `steps` steps each.

    All steps are sampled as latent. The second half is then rewritten as text steps with the token of the highest
    logit, so that the loss meets both kinds.
    """
    prompts = torch.randint(1, parameters["vocab"], (parameters["prompts"], parameters["prompt"]), device=model.device)
    sampling = LatentSampling(
        max_new_tokens=parameters["steps"], latent_top_k=LATENT_TOP_K, seed=SEED, end_token_id=END, eos_token_id=()
    )
    rollout = generate_latent(
        model, prompts, torch.ones_like(prompts), sampling, num_generations=parameters["group_size"]
    )
    text = slice(parameters["steps"] // 2, None)
    ids, is_latent = rollout.ids.clone(), rollout.is_latent.clone()
    ids[:, text, 0], ids[:, text, 1:], is_latent[:, text] = rollout.token[:, text], UNUSED_ID, False
    return dataclasses.replace(rollout, ids=ids, is_latent=is_latent)


def step_cost(model: Any, parameters: Parameters) -> tuple[int, int]:
    """Return the least bytes and FLOPs of a step.

    Bytes: weights, gradients and moments, read and written. FLOPs: three products per weight and token, and two
    products with the head per response step.
    """
    table = embedding_table(model)
    body = sum(p.numel() for p in model.parameters()) - table.numel()
    rows = response_steps(parameters)
    fed = parameters["prompts"] * parameters["prompt"] + rows
    return 10 * body * model.dtype.itemsize, 6 * body * fed + 4 * rows * table.numel()


def response_steps(parameters: Parameters) -> int:
    """Return the number of steps of all responses, N."""
    return int(parameters["prompts"] * parameters["group_size"] * parameters["steps"])


TRAIN_STEP = Operator("train_step", cases, build, measure_memory=True)
