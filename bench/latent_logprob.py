"""`latent_logprob`: forward pass and gradient in hidden, against PyTorch that holds [N, V].

On text only at temperature 1, the log-prob of a step is minus a cross entropy. That case has two more rivals, neither
of which holds [N, V]: `linear_cross_entropy` of PyTorch, in chunks, and cut cross entropy.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bench.harness.cases import (
    Operator,
    Outputs,
    Parameters,
    Problem,
    Provider,
    Shape,
    capped,
    compare,
    compiled_provider,
    our_providers,
    tolerance,
)
from bench.harness.memory import free_memory
from latent_kernels import latent_logprob
from latent_kernels.reference.latent_step import UNUSED_ID, is_hard
from latent_kernels.reference.loss import (
    component_margins,
    latent_logprob_from_logits_ref,
    margin_coefficients,
    surrogate,
)

TOP_K, TEMPERATURE, LATENT_SHARE = 10, 0.6, 0.5
LOGIT_STD = 2.0  # before a cap
CAP_FLOPS = 40  # of a soft cap and its slope in both passes over the logits, per logit
NO_CAP = "it has no soft cap"
BLOCK = 128  # rows that the check holds at a time


class Trajectory(NamedTuple):
    """N response steps and the head that scores them."""

    hidden: Tensor  # [N, D], requires a gradient
    lm_head: Tensor  # [V, D], frozen
    ids: Tensor  # [N, K]
    scores: Tensor  # [N, K]
    advantages: Tensor  # [N]
    softcap: float | None = None  # of the logits


Logprob = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # hidden, lm_head, ids, scores, advantages -> [N]


def make_ids(rows: int, vocab: int, latent_share: float, device: torch.device) -> Tensor:
    """Return distinct ids [N, K]. Text steps come last; they have -100 behind the first id."""
    # Equal distances keep the ids of a row distinct without a sort.
    start = torch.randint(vocab, (rows, 1), device=device)
    ids = (start + (vocab // TOP_K) * torch.arange(TOP_K, device=device)) % vocab
    ids[round(latent_share * rows) :, 1:] = UNUSED_ID
    return ids


def make_trajectory(parameters: Parameters, device: torch.device, dtype: torch.dtype) -> Trajectory:
    """Draw random states, and targets that lie one-sided noise above an estimate of the policy's log-probs.

    The logits are normal, so their log-sum-exp is about log V plus half their variance, or less under a soft cap. The
    estimate needs no [N, V].
    """
    softcap = parameters.get("softcap")
    rows, vocab, width = parameters["rows"], parameters["vocab"], parameters["hidden"]
    hidden = torch.randn(rows, width, device=device).to(dtype)
    lm_head = (torch.randn(vocab, width, device=device).mul_(LOGIT_STD / width**0.5)).to(dtype)
    ids = make_ids(rows, vocab, parameters["latent_share"], device)
    picked = capped(torch.einsum("nd,nkd->nk", hidden.float(), lm_head[ids.clamp_min(0)].float()), softcap)
    log_vocab = torch.log(torch.tensor(float(vocab)))
    noise = 4.5 * torch.rand(rows, TOP_K, device=device)
    scores = picked - log_vocab - LOGIT_STD**2 / 2 + noise
    advantages = torch.randn(rows, device=device)
    return Trajectory(hidden.requires_grad_(), lm_head, ids, scores, advantages, softcap)


def one_softmax(
    hidden: Tensor,
    lm_head: Tensor,
    ids: Tensor,
    scores: Tensor,
    advantages: Tensor,
    temperature: float = TEMPERATURE,
    softcap: float | None = None,
) -> Tensor:
    """Return log-probs [N] by a careful composition of PyTorch: one product, one log_softmax, K log-probs gathered.

    Text rows are divided by the temperature before the log_softmax, latent rows are not.
    """
    hard = is_hard(ids)
    logits = capped((hidden @ lm_head.T).float(), softcap) * torch.where(hard, 1.0 / temperature, 1.0).unsqueeze(-1)
    log_probs = logits.log_softmax(-1).gather(-1, ids.clamp_min(0))
    margin = component_margins(scores, log_probs).detach()
    coefficients = margin_coefficients(margin, advantages, "aligned")
    latent = surrogate(margin) + (coefficients * (log_probs - log_probs.detach())).mean(-1)
    return torch.where(hard, log_probs[:, 0], latent)


def reference(
    hidden: Tensor,
    lm_head: Tensor,
    ids: Tensor,
    scores: Tensor,
    advantages: Tensor,
    temperature: float = TEMPERATURE,
    softcap: float | None = None,
) -> Tensor:
    """Return log-probs [N] by the reference on whole logits, with one log_softmax per kind of row."""
    return latent_logprob_from_logits_ref(
        capped(hidden @ lm_head.T, softcap), ids, scores, temperature=temperature, advantages=advantages
    )


def linear_cross_entropy(hidden: Tensor, lm_head: Tensor, ids: Tensor, scores: Tensor, advantages: Tensor) -> Tensor:
    """Return log-probs [N] of text steps by PyTorch's own function, in chunks of the size that it chooses."""
    options = torch.nn.LinearCrossEntropyOptions()
    losses = torch.nn.functional.linear_cross_entropy(hidden, lm_head, ids[:, 0], reduction="none", options=options)
    return -losses.float()


def cut_cross_entropy(
    hidden: Tensor,
    lm_head: Tensor,
    ids: Tensor,
    scores: Tensor,
    advantages: Tensor,
    softcap: float | None = None,
) -> Tensor:
    """Return log-probs [N] of text steps by the package with its defaults.

    The package leaves out blocks of the gradient below its threshold.
    """
    from cut_cross_entropy import linear_cross_entropy

    losses: Tensor = linear_cross_entropy(hidden, lm_head, ids[:, 0], softcap=softcap, reduction="none")
    return -losses.float()


def linear_cross_entropy_missing(softcap: float | None) -> str | None:
    """Return why PyTorch's own function cannot run in chunks, or None if it can."""
    if softcap is not None:
        return NO_CAP
    has_options = hasattr(torch.nn, "LinearCrossEntropyOptions")
    return None if has_options else f"torch {torch.__version__} does not have it"


def cut_cross_entropy_missing(device: torch.device) -> str | None:
    """Return why cut cross entropy cannot run on `device`, or None if it can."""
    if importlib.util.find_spec("cut_cross_entropy") is None:
        return "cut-cross-entropy is not installed"
    return None if device.type == "cuda" else "no CUDA device"


def in_blocks(
    trajectory: Trajectory, upstream: Callable[[Tensor], Tensor], temperature: float = TEMPERATURE
) -> tuple[Tensor, Tensor]:
    """Return log-probs [N] and dHidden [N, D] of the reference in float32, computed a block of rows at a time.

    `upstream` returns the gradient of all log-probs [N] from their values. It is called once with all rows, because a
    loss averages over them.
    """
    hidden, lm_head = trajectory.hidden.detach().float(), trajectory.lm_head.float()

    def logprob_of(block: slice, states: Tensor) -> Tensor:
        ids, scores, advantages = trajectory.ids[block], trajectory.scores[block], trajectory.advantages[block]
        return reference(states, lm_head, ids, scores, advantages, temperature, trajectory.softcap)

    blocks = [slice(start, start + BLOCK) for start in range(0, len(hidden), BLOCK)]
    with torch.no_grad():
        logprob = torch.cat([logprob_of(block, hidden[block]) for block in blocks])
    upstream_gradient = upstream(logprob)
    gradients: list[Tensor] = []
    for block in blocks:
        states = hidden[block].requires_grad_()
        gradients += torch.autograd.grad(logprob_of(block, states), states, upstream_gradient[block])
    return logprob, torch.cat(gradients)


def logprob_cost(parameters: Parameters, dtype: torch.dtype) -> tuple[int, int]:
    """Return the least bytes and FLOPs of the log-probs and dHidden.

    Bytes: the head twice, hidden and its gradient. FLOPs: two products, and a soft cap with its slope.
    """
    rows, vocab, hidden = parameters["rows"], parameters["vocab"], parameters["hidden"]
    per_logit = 4 * hidden + (CAP_FLOPS if "softcap" in parameters else 0)
    return (2 * vocab + 2 * rows) * hidden * dtype.itemsize, rows * vocab * per_logit


def naive_shortage(parameters: Parameters, device: torch.device) -> str | None:
    """Return why the providers that hold [N, V] lack memory.

    None if there is enough, or if the system does not tell what is free.
    """
    # An estimate: five float32 tensors [N, V] are alive at a time, such as logits, log-probs and their gradients.
    needed = 5 * parameters["rows"] * parameters["vocab"] * 4
    free = free_memory(device)
    if free is None or needed <= free:
        return None
    return f"needs about {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"


def cases(shape: Shape, device: torch.device) -> list[Parameters]:
    """Return one case of 2048 steps (96 on the tiny shape). Half of them are latent, none is masked."""
    return [
        {
            "rows": 96 if shape.name == "tiny" else 2048,
            **shape.head,
            "top_k": TOP_K,
            "latent_share": LATENT_SHARE,
            "temperature": TEMPERATURE,
        }
    ]


def cases_and_text(shape: Shape, device: torch.device) -> list[Parameters]:
    """Return the cases of `cases`, then text only at temperature 1."""
    mixed = cases(shape, device)
    return [*mixed, {**mixed[-1], "latent_share": 0.0, "temperature": 1.0}]


def build(parameters: Parameters, device: torch.device, dtype: torch.dtype, compile: bool) -> Problem:
    """Build a case. Outputs: log-probs [N], and dHidden [N, D] for the advantages as upstream gradient."""
    trajectory = make_trajectory(parameters, device, dtype)
    hidden, lm_head, ids, scores, advantages, softcap = trajectory
    temperature, shortage = parameters["temperature"], naive_shortage(parameters, device)

    def provider(
        logprob: Logprob, name: str = "eager", unavailable: str | None = None, optional: bool = False
    ) -> Provider:
        def run() -> Outputs:
            output = logprob(hidden, lm_head, ids, scores, advantages)
            return output.detach(), *torch.autograd.grad(output, hidden, advantages)

        return Provider(name, run, unavailable=unavailable, optional=optional)

    def naive(logprob: Callable[..., Tensor], name: str = "eager") -> Provider:
        return provider(functools.partial(logprob, temperature=temperature, softcap=softcap), name, shortage)

    def make(impl: str) -> Provider:
        return provider(
            lambda hidden, lm_head, ids, scores, advantages: latent_logprob(
                hidden,
                lm_head,
                ids,
                scores,
                temperature=temperature,
                advantages=advantages,
                softcap=softcap,
                impl=impl,
            )
        )

    cut = functools.partial(cut_cross_entropy, softcap=softcap)
    cross_entropies = [
        provider(linear_cross_entropy, "linear_cross_entropy", linear_cross_entropy_missing(softcap), optional=True),
        provider(cut, "cut-cross-entropy", cut_cross_entropy_missing(device), optional=True),
    ]
    expected: list[Tensor] = []

    def check(outputs: Outputs) -> str | None:
        if not expected:
            expected.extend(in_blocks(trajectory, lambda logprob: advantages, temperature))
        return compare("logprob", outputs[0], expected[0], tolerance(dtype)) or compare(
            "dHidden", outputs[1], expected[1], tolerance(dtype)
        )

    return Problem(
        [
            naive(one_softmax),
            naive(reference, "reference"),
            *compiled_provider(naive, one_softmax, compile),
            *(cross_entropies if parameters["latent_share"] == 0.0 and temperature == 1.0 else ()),
            *our_providers(make, device),
        ],
        check,
        *logprob_cost(parameters, dtype),
    )


LATENT_LOGPROB = Operator("latent_logprob", cases_and_text, build, measure_memory=True)
