"""The oracle of tests/support/oracle.py for the logits of an LM head with a bias, a scale and a soft cap."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from support import oracle
from support.oracle_loss import policy_loss


class HeadLogits(NamedTuple):
    """Logits [N, V] and their derivative in the product with the head [N, V], in float64."""

    value: Tensor
    slope: Tensor


def head_logits(
    hidden: Tensor, lm_head: Tensor, bias: Tensor | None, logit_scale: float = 1.0, softcap: float | None = None
) -> HeadLogits:
    """Return z = s (h W^T + b), and with a cap c tanh(z / c), whose derivative in z is 1 / cosh(z / c)^2."""
    product = hidden.detach().double() @ lm_head.detach().double().T
    if bias is not None:
        product = product + bias.detach().double()
    scaled = logit_scale * product
    if softcap is None:
        return HeadLogits(scaled, torch.full_like(scaled, logit_scale))
    up, down = torch.exp(scaled / softcap), torch.exp(-scaled / softcap)
    return HeadLogits(softcap * (up - down) / (up + down), logit_scale * 4.0 / (up + down) ** 2)


class HeadGradients(NamedTuple):
    """Gradients in hidden [N, D], lm_head [V, D] and bias [V], in float64."""

    hidden: Tensor
    lm_head: Tensor
    bias: Tensor


def head_gradients(dlogits: Tensor, logits: HeadLogits, hidden: Tensor, lm_head: Tensor) -> HeadGradients:
    """Return the gradients of inputs from that of the logits [N, V]."""
    raw = dlogits.double() * logits.slope
    return HeadGradients(raw @ lm_head.detach().double(), raw.T @ hidden.detach().double(), raw.sum(0))


def logprob(
    leaves: tuple[Tensor, ...], ids: Tensor, scores: Tensor, upstream: Tensor, head: dict[str, Any], **options: Any
) -> tuple[Tensor, ...]:
    """Return log-probs [N] and their gradients in the leaves: hidden, lm_head and, if it is given, bias."""
    hidden, lm_head, *bias = leaves
    logits = head_logits(hidden, lm_head, *(bias or [None]), **head)
    scored = oracle.logprob(logits.value, ids, scores, **options)
    dlogits = upstream.double().unsqueeze(-1) * scored.gradient
    return scored.value, *head_gradients(dlogits, logits, hidden, lm_head)[: len(leaves)]


def fused_policy_loss(
    batch: dict[str, Any],
    bias: Tensor | None,
    head: dict[str, Any],
    *,
    entropy_coef: float = 0.0,
    temperature: float = 1.0,
    margin_gradient: str = "aligned",
    method: str = "latent_grpo",
    **loss_options: Any,
) -> tuple[float, HeadGradients]:
    """Return the loss of a batch of responses and its gradients, by the chain rule over all logits of active steps."""
    mask = batch["mask"].bool()
    hidden, lm_head = batch["hidden"].detach()[mask], batch["lm_head"].detach()
    ids, scores, advantages = (batch[name][mask] for name in ("ids", "scores", "advantages"))
    logits = head_logits(hidden, lm_head, bias, **head)
    options = dict(temperature=temperature, margin_gradient=margin_gradient, method=method)
    scored = oracle.logprob(logits.value, ids, scores, advantages=advantages, **options)
    values = torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, scored.value)
    rest = (batch[name] for name in ("old_logprob", "advantages", "mask"))
    loss, gradient, _ = policy_loss(values, *rest, ref_logprob=batch.get("ref_logprob"), **loss_options)
    dlogits = gradient[mask].unsqueeze(-1) * scored.gradient
    if entropy_coef:
        bonus = oracle.entropy(logits.value, ids, temperature)
        text = torch.tensor([oracle.is_text(row) for row in ids]).double()
        weights = text / text.sum().clamp_min(1.0)
        loss -= entropy_coef * float(weights @ bonus.value)
        dlogits = dlogits - entropy_coef * weights.unsqueeze(-1) * bonus.gradient
    found = head_gradients(dlogits, logits, hidden, lm_head)
    for_hidden = torch.zeros(batch["hidden"].shape, dtype=torch.float64)
    for_hidden[mask] = found.hidden
    return loss, found._replace(hidden=for_hidden)
