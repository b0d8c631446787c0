"""`fused_policy_loss`: forward pass and gradient in hidden.

Rivals: PyTorch that holds [N, V], the two bare products and, on text only, Liger's fused linear GRPO and TRL's chunked
log-probs with the loss on top. Liger also computes the gradient of the head, which is a third product.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.harness.cases import (
    CaseError,
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
from bench.latent_logprob import (
    NO_CAP,
    TEMPERATURE,
    Trajectory,
    in_blocks,
    logprob_cost,
    make_trajectory,
    naive_shortage,
    one_softmax,
    reference,
)
from bench.latent_logprob import cases as logprob_cases
from latent_kernels import fused_policy_loss, latent_logprob
from latent_kernels._chunks import chunk_buffer, row_chunks
from latent_kernels.reference.loss import policy_loss_ref

CLIP, DUAL_CLIP = 0.2, 3.0
ROWS_ON_A_GPU = (2048, 8192, 32768)
CHECKED_ROWS = 8  # of the bare products
TRL_CHUNK = 32768  # columns of the vocabulary that TRL's trainer takes at a time


def cases(shape: Shape, device: torch.device) -> list[Parameters]:
    """Return the steps of `latent_logprob` as responses of 128 steps (16 on the tiny shape), on a GPU more of them too.

    The last case is text only.
    """
    steps = 16 if shape.name == "tiny" else 128
    (base,) = ({**parameters, "response_steps": steps} for parameters in logprob_cases(shape, device))
    on_gpu = device.type == "cuda"
    mixed = [{**base, "rows": rows} for rows in ROWS_ON_A_GPU] if on_gpu and shape.name != "tiny" else [base]
    return [*mixed, {**mixed[-1], "latent_share": 0.0}]


class Responses(NamedTuple):
    """R responses of T steps. `flat` holds the same steps as one list of N = R T, the form of the log-prob."""

    flat: Trajectory
    hidden: Tensor  # [R, T, D], requires a gradient
    ids: Tensor  # [R, T, K]
    scores: Tensor  # [R, T, K]
    old_logprob: Tensor  # [R, T]
    advantages: Tensor  # [R, T], constant within a response
    mask: Tensor  # [R, T], all True


def make_responses(parameters: Parameters, device: torch.device, dtype: torch.dtype) -> Responses:
    """Cut the trajectory of `latent_logprob` into responses. Raises CaseError if the rows do not fill them."""
    rows, steps = parameters["rows"], parameters["response_steps"]
    if rows % steps:
        raise CaseError(f"rows is {rows}: give a multiple of {steps}, the steps of a response")
    flat = make_trajectory(parameters, device, dtype)
    advantages = flat.advantages.unflatten(0, (-1, steps))[:, :1].expand(-1, steps)
    flat = flat._replace(advantages=advantages.flatten())
    old_logprob = make_old_logprob(flat).unflatten(0, (-1, steps))
    return Responses(
        flat,
        # A leaf of its own: the gradient of the loss is taken in this tensor.
        hidden=flat.hidden.detach().unflatten(0, (-1, steps)).requires_grad_(),
        ids=flat.ids.unflatten(0, (-1, steps)),
        scores=flat.scores.unflatten(0, (-1, steps)),
        old_logprob=old_logprob,
        advantages=flat.advantages.unflatten(0, (-1, steps)),
        mask=torch.ones_like(old_logprob, dtype=torch.bool),
    )


def make_old_logprob(trajectory: Trajectory) -> Tensor:
    """Return log-probs [N] of an old policy. One step in five is beyond the clip range, none is near its ends.

    Near the ends the rounding of bfloat16 logits would decide whether a step is clipped, and no two providers would
    agree.
    """
    hidden, lm_head, ids, scores, _, softcap = trajectory
    with torch.no_grad():
        logprob = latent_logprob(hidden, lm_head, ids, scores, temperature=TEMPERATURE, softcap=softcap, impl="eager")
    return logprob - torch.where(torch.rand_like(logprob) < 0.2, 0.6, 0.03) * torch.randn_like(logprob).sign()


def reference_loss(trajectory: Trajectory, old: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss and dHidden [N, D] of the reference in float32, computed a block of rows at a time.

    `old`, `advantages` and `mask` are [R, T].
    """
    losses: list[Tensor] = []

    def upstream(logprob: Tensor) -> Tensor:
        logprob = logprob.view_as(old).requires_grad_()
        losses.append(policy_loss_ref(logprob, old, advantages, mask)[0])
        return torch.autograd.grad(losses[0], logprob)[0].flatten()

    gradient = in_blocks(trajectory, upstream)[1]
    return losses[0].detach(), gradient


def build(parameters: Parameters, device: torch.device, dtype: torch.dtype, compile: bool) -> Problem:
    """Build a case. Outputs: the loss, and dHidden [R, T, D]."""
    responses = make_responses(parameters, device, dtype)
    flat, hidden, ids, scores, old, advantages, mask = responses
    shortage = naive_shortage(parameters, device)

    def naive(logprob: Callable[..., Tensor], name: str = "eager") -> Provider:
        def run() -> Outputs:
            inputs = (hidden.flatten(0, 1), flat.lm_head, flat.ids, flat.scores, flat.advantages)
            actual = logprob(*inputs, softcap=flat.softcap)
            return with_gradient(policy_loss_ref(actual.view_as(old), old, advantages, mask)[0], hidden)

        return Provider(name, run, unavailable=shortage)

    def make(impl: str) -> Provider:
        inputs = (hidden, flat.lm_head, ids, scores, old, advantages, mask)
        options: dict[str, Any] = {"temperature": TEMPERATURE, "softcap": flat.softcap, "impl": impl}

        def run() -> Outputs:
            return with_gradient(fused_policy_loss(*inputs, **options)[0], hidden)

        return Provider("ours", run)

    expected: list[Tensor] = []

    def check(outputs: Outputs) -> str | None:
        if not expected:
            loss, gradient = reference_loss(flat, old, advantages, mask)
            expected.extend((loss, gradient.view_as(hidden)))
        return compare("loss", outputs[0], expected[0], tolerance(dtype)) or compare(
            "dHidden", outputs[1], expected[1], tolerance(dtype)
        )

    return Problem(
        [
            naive(one_softmax),
            naive(reference, "reference"),
            *compiled_provider(naive, one_softmax, compile),
            *([liger_provider(responses), trl_provider(responses)] if parameters["latent_share"] == 0.0 else ()),
            bare_products(flat),
            *our_providers(make, device),
        ],
        check,
        *logprob_cost(parameters, dtype),
    )


def with_gradient(loss: Tensor, hidden: Tensor) -> Outputs:
    """Return a loss and its gradient in hidden."""
    return loss.detach(), *torch.autograd.grad(loss, hidden)


def liger_provider(responses: Responses) -> Provider:
    """Return Liger's fused linear GRPO, which knows text steps only: the first id of every step is the token."""
    _, hidden, ids, _, old, advantages, mask = responses

    def run() -> Outputs:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        loss = LigerFusedLinearGRPOLoss(
            beta=0.0,
            compiled=hidden.is_cuda,
            use_ref_model=False,
            epsilon_low=CLIP,
            epsilon_high=CLIP,
            loss_type="bnpo",  # the name there of the mean over all tokens
            temperature=TEMPERATURE,
            delta=DUAL_CLIP,
        )
        advantage = advantages[:, 0].contiguous()
        output = loss(hidden, responses.flat.lm_head, ids[..., 0], mask, advantage, old_per_token_logps=old)
        return with_gradient(output[0], hidden)

    missing = None if importlib.util.find_spec("liger_kernel") else "liger-kernel is not installed"
    capped = responses.flat.softcap is not None
    return Provider("liger", run, unavailable=NO_CAP if capped else missing, optional=True)


def trl_provider(responses: Responses) -> Provider:
    """Return the loss of TRL's trainer on its chunked log-probs: text steps only, the logits computed twice."""
    flat, hidden, ids, _, old, advantages, _ = responses

    def run() -> Outputs:
        from trl.kernels import ChunkedLogProbFunction

        rows, token = hidden.flatten(0, 1), ids[..., 0].flatten()
        options = (flat.softcap, 1.0, ("log_probs",))  # soft cap, logit scale, outputs
        logprob = ChunkedLogProbFunction.apply(rows, flat.lm_head, None, token, TEMPERATURE, TRL_CHUNK, *options)[0]
        ratio = (logprob.view_as(old) - old).exp()
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP) * advantages
        return with_gradient(-torch.min(ratio.clamp(max=DUAL_CLIP) * advantages, clipped).mean(), hidden)

    missing = None if importlib.util.find_spec("trl") else "trl is not installed"
    return Provider("trl", run, unavailable=missing, optional=True)


def bare_products(trajectory: Trajectory) -> Provider:
    """Return the two products that the loss and its gradient cannot do without, in the chunks of the fused loss."""
    states, lm_head = trajectory.hidden.detach(), trajectory.lm_head

    def run() -> Outputs:
        output = torch.empty_like(states)
        chunks = row_chunks(len(states), len(lm_head), torch.float32, states.device)
        buffer = chunk_buffer(chunks, len(lm_head), states.dtype, states.device)
        for chunk in chunks:
            logits = torch.mm(states[chunk], lm_head.T, out=buffer[: chunk.stop - chunk.start])
            torch.mm(logits, lm_head, out=output[chunk])
        return (output,)

    def check(outputs: Outputs) -> str | None:
        # A few rows are enough: the product of all rows in float32 would hold another [N, V].
        head = lm_head.float()
        expected = (states[:CHECKED_ROWS].float() @ head.T) @ head
        return compare("product", outputs[0][:CHECKED_ROWS], expected, tolerance(states.dtype))

    return Provider("matmul", run, check=check)


FUSED_POLICY_LOSS = Operator("fused_policy_loss", cases, build, measure_memory=True)
