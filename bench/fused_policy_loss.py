"""`fused_policy_loss`, forward and gradient in hidden, against PyTorch that holds [N, V], the two bare products, and on
text alone Liger's fused linear GRPO, which also takes the head's gradient (a third product)."""

from __future__ import annotations

import importlib.util

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
    compiled,
    ours,
    tolerance,
)
from bench.latent_logprob import (
    TEMPERATURE,
    Logprob,
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
from latent_kernels.reference import policy_loss_ref

CLIP, DUAL_CLIP = 0.2, 3.0
ROWS_ON_A_GPU = (2048, 8192, 32768)
CHECKED_ROWS = 8  # of the bare products


def cases(shape: Shape, device: torch.device) -> list[Parameters]:
    """The steps of `latent_logprob` as responses of 128 steps (16 on the tiny shape); on a GPU more of them too.

    A case of text alone comes last, but for a CPU on the shapes of models.
    """
    steps = 16 if shape.name == "tiny" else 128
    (base,) = ({**parameters, "response_steps": steps} for parameters in logprob_cases(shape, device))
    on_gpu = device.type == "cuda"
    found = [{**base, "rows": rows} for rows in ROWS_ON_A_GPU] if on_gpu and shape.name != "tiny" else [base]
    return [*found, {**found[-1], "latent_share": 0.0}] if on_gpu or shape.name == "tiny" else found


def make_old_logprob(trajectory: Trajectory) -> Tensor:
    """Log-probs [N] of an old policy: one step in five is beyond the clip range, none near its ends.

    Near them the rounding of bfloat16 logits would decide whether a step is clipped, and no two providers would agree.
    """
    hidden, lm_head, ids, scores, _ = trajectory
    with torch.no_grad():
        policy = latent_logprob(hidden, lm_head, ids, scores, temperature=TEMPERATURE, impl="eager")
    return policy - torch.where(torch.rand_like(policy) < 0.2, 0.6, 0.03) * torch.randn_like(policy).sign()


def reference_loss(trajectory: Trajectory, old: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and dHidden [N, D], by the reference in float32, a block of rows at a time. old and the rest [R, T]."""
    losses: list[Tensor] = []

    def upstream(logprob: Tensor) -> Tensor:
        logprob = logprob.view_as(old).requires_grad_()
        losses.append(policy_loss_ref(logprob, old, advantages, mask)[0])
        return torch.autograd.grad(losses[0], logprob)[0].flatten()

    gradient = in_blocks(trajectory, upstream)[1]
    return losses[0].detach(), gradient


def build(parameters: Parameters, device: torch.device, dtype: torch.dtype, compile: bool) -> Problem:
    """Outputs: the loss, and dHidden [R, T, D]."""
    rows, steps = parameters["rows"], parameters["response_steps"]
    if rows % steps:
        raise CaseError(f"rows is {rows}: give a multiple of {steps}, the steps of a response")
    trajectory = make_trajectory(parameters, device, dtype)
    of_response = trajectory.advantages.unflatten(0, (-1, steps))[:, :1].expand(-1, steps)
    trajectory = trajectory._replace(advantages=of_response.flatten())
    flat_hidden, lm_head, flat_ids, flat_scores, flat_advantages = trajectory
    flat_old = make_old_logprob(trajectory)
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

    def liger() -> Outputs:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        loss = LigerFusedLinearGRPOLoss(
            beta=0.0, compiled=device.type == "cuda", use_ref_model=False, epsilon_low=CLIP, epsilon_high=CLIP,
            loss_type="bnpo", temperature=TEMPERATURE, delta=DUAL_CLIP,
        )  # fmt: skip
        advantage = advantages[:, 0].contiguous()
        return with_gradient(loss(hidden, lm_head, ids[..., 0], mask, advantage, old_per_token_logps=old)[0])

    def products() -> Outputs:
        states, out = flat_hidden.detach(), torch.empty_like(flat_hidden)
        parts = row_chunks(len(states), len(lm_head), torch.float32, device)
        buffer = chunk_buffer(parts, len(lm_head), dtype, device)
        for part in parts:
            logits = torch.mm(states[part], lm_head.T, out=buffer[: part.stop - part.start])
            torch.mm(logits, lm_head, out=out[part])
        return (out,)

    def check_products(outputs: Outputs) -> str | None:
        states, head = flat_hidden[:CHECKED_ROWS].detach().float(), lm_head.float()
        return compare("product", outputs[0][:CHECKED_ROWS], (states @ head.T) @ head, tolerance(dtype))

    missing = None if importlib.util.find_spec("liger_kernel") else "liger-kernel is not installed"
    text_alone = [Provider("liger", liger, unavailable=missing, optional=True)]
    expected: list[Tensor] = []

    def check(outputs: Outputs) -> str | None:
        if not expected:
            loss, gradient = reference_loss(trajectory, old, advantages, mask)
            expected.extend((loss, gradient.view_as(hidden)))
        return compare("loss", outputs[0], expected[0], tolerance(dtype)) or compare(
            "dHidden", outputs[1], expected[1], tolerance(dtype)
        )

    return Problem(
        [
            naive(one_softmax),
            naive(reference, "reference"),
            *compiled(naive, one_softmax, compile),
            *(text_alone if parameters["latent_share"] == 0.0 else ()),
            Provider("matmul", products, check=check_products),
            *ours(make, device),
        ],
        check,
        *logprob_cost(parameters, dtype),
    )


FUSED_POLICY_LOSS = Operator("fused_policy_loss", cases, build, measure_memory=True)
