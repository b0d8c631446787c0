"""The eager decoding step: a latent step or a sampled token for each row, with its log-prob.

A batch of both kinds is split, because most operations here read all logits of a row.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latent_kernels._eager.latent_logprob import score_rows
from latent_kernels._eager.latent_step import latent_step_and_log_z
from latent_kernels._eager.latent_step_methods import GROUP, latent_step_with_method_eager, pick
from latent_kernels._linear import no_autocast
from latent_kernels._loss_types import LogprobSpec
from latent_kernels._noise import uniform_draws
from latent_kernels._types import DecodingStep, LatentStepOptions, TextOptions
from latent_kernels.reference.latent_step import UNUSED_ID, stream_rows
from latent_kernels.reference.loss import component_margins, surrogate

# Without top_k, the nucleus is looked for in this many best tokens, then in GROWTH times as many, and so on.
FIRST_CANDIDATES, GROWTH = 64, 8


def decoding_step_eager(
    logits: Tensor, embedding: Tensor, options: LatentStepOptions, text: TextOptions
) -> DecodingStep:  # fmt: skip
    """Compute the step of latent and text rows on checked arguments and float32 or float64 logits [B, V]."""
    mask = options.latent_mask
    if mask is None or bool(mask.all()):
        return latent_rows(logits, embedding, options, text)
    if not bool(mask.any()):
        return text_rows(logits, embedding, options, text)
    parts, order = [], []
    for rows, function in ((mask, latent_rows), (~mask, text_rows)):
        index = rows.nonzero().squeeze(-1)
        chosen = text._replace(uniform=None if text.uniform is None else text.uniform[index])
        parts.append(function(logits[index], embedding, select(options, index, len(logits)), chosen))
        order.append(index)
    place = torch.cat(order).argsort()
    with no_autocast(logits.device):  # it refuses to join tensors of another 16-bit dtype than its own
        return DecodingStep(*(torch.cat(both)[place] for both in zip(*parts, strict=True)))


def select(options: LatentStepOptions, index: Tensor, rows: int) -> LatentStepOptions:
    """Return the options of the rows `index` [n] of a batch of `rows`, which are of one kind."""

    def of_rows(value: Any) -> Any:
        return value[index] if isinstance(value, Tensor) and value.ndim else value

    return replace(
        options,
        top_p=of_rows(options.top_p),
        tau=of_rows(options.tau),
        noise_scale=of_rows(options.noise_scale),
        step=of_rows(options.step),
        row_ids=stream_rows(rows, options, index.device)[index],
        exponential=of_rows(options.exponential),
        latent_mask=None,
    )


def latent_rows(logits: Tensor, embedding: Tensor, options: LatentStepOptions, text: TextOptions) -> DecodingStep:
    """Compute the step of rows that are in their latent run. The run of some of them may end."""
    if options.method == "latent_grpo":
        step, log_z = latent_step_and_log_z(logits, embedding, options)
        log_probs = logits.gather(-1, step.ids) - log_z
        logprob = surrogate(component_margins(step.scores.to(log_probs.dtype), log_probs))
    else:
        step = latent_step_with_method_eager(logits, embedding, options)
        logprob = score_rows(logits, LogprobSpec(step.ids, step.scores, None, 1.0, "none", options.method))
    result = DecodingStep(step.ids, step.scores, step.embedding, step.top_token, step.is_latent, logprob.float())
    if bool(step.is_latent.all()):
        return result
    index = (~step.is_latent).nonzero().squeeze(-1)
    ended = with_tokens(logits[index], embedding, step.top_token[index], options.top_k, text)
    for values, of_ended in zip(result, ended, strict=True):
        values[index] = of_ended
    return result


def text_rows(logits: Tensor, embedding: Tensor, options: LatentStepOptions, text: TextOptions) -> DecodingStep:
    """Compute the step of rows that are in their text."""
    token = sampled_tokens(logits, options, text)
    return with_tokens(logits, embedding, token, options.top_k, text)


def with_tokens(logits: Tensor, embedding: Tensor, token: Tensor, top_k: int, text: TextOptions) -> DecodingStep:
    """Return the step of rows that emit these tokens [B]."""
    tempered = logits if text.temperature in (0, 1) else logits / text.temperature
    column = token.unsqueeze(-1)
    logprob = (tempered.gather(-1, column) - tempered.logsumexp(-1, keepdim=True)).squeeze(-1)
    return DecodingStep(
        ids=F.pad(column, (0, top_k - 1), value=UNUSED_ID),
        scores=logprob.new_zeros(len(token), top_k, dtype=torch.float32),
        embedding=embedding[token],
        token=token,
        is_latent=torch.zeros_like(token, dtype=torch.bool),
        logprob=logprob.float(),
    )


def sampled_tokens(logits: Tensor, options: LatentStepOptions, text: TextOptions) -> Tensor:
    """Return one token per row [B]: where the cumulative distribution of what the options leave passes the draw.

    What is cut is in falling order of the logits, the lower id first among equals. The whole distribution is in the
    order of the vocabulary.
    """
    kind = text.kind(logits.shape[1])
    if kind == "greedy":
        return logits.argmax(-1)
    draw = (text_draws(len(logits), options, logits.device) if text.uniform is None else text.uniform).unsqueeze(-1)
    if kind == "whole":
        return token_of_whole(logits, text.temperature, draw)
    weights, ids, whole = candidates(logits, text)
    mass = weights.cumsum(-1)
    # As the kernel takes it, in float32.
    limit = _rounded(text.top_p) if text.top_p < 1 else torch.inf
    nucleus = mass - weights < limit * whole
    total = (weights * nucleus).sum(-1, keepdim=True)
    last = nucleus.sum(-1, keepdim=True) - 1  # a draw that rounds up to the whole mass takes the last token
    place = torch.minimum(torch.searchsorted(mass, draw * total, right=True), last)
    return ids.gather(-1, place).squeeze(-1)


def text_draws(rows: int, options: LatentStepOptions, device: torch.device) -> Tensor:
    """Return the uniform draw of each row's noise stream at its step [B] float64: that of `philox_uniform`."""
    assert options.seed is not None
    return uniform_draws(1, stream_rows(rows, options, device), options.seed, options.step).squeeze(-1)


def candidates(logits: Tensor, text: TextOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Return exp((logit - peak) / T) of the best tokens, [B, C] float64, their ids, and the mass of all [B, 1].

    The mass is over the tokens that top-k leaves. C is top_k. Without top_k it is large enough for the nucleus.
    """

    def weights(values: Tensor, peak: Tensor) -> Tensor:
        return ((values - peak).double() / _rounded(text.temperature)).exp()

    vocab = logits.shape[-1]
    if 0 < text.top_k < vocab:
        best, ids = highest_first(logits, text.top_k)
        of_best = weights(best, best[:, :1])
        return of_best, ids, of_best.sum(-1, keepdim=True)
    whole = weights(logits, logits.amax(-1, keepdim=True)).sum(-1, keepdim=True)
    count = FIRST_CANDIDATES
    while True:
        best, ids = highest_first(logits, min(count, vocab))
        of_best = weights(best, best[:, :1])
        if count >= vocab or bool((of_best.sum(-1, keepdim=True) >= text.top_p * whole).all()):
            return of_best, ids, whole
        count *= GROWTH


def _rounded(value: float) -> float:
    """Return a number in float32, as a kernel takes it."""
    return float(torch.tensor(value, dtype=torch.float32))


def highest_first(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` highest logits [B, count] in falling order, ties to the lower id, and their ids."""
    best, ids = logits.topk(min(count + 1, logits.shape[-1]), dim=-1)
    if bool((best[:, 1:] == best[:, :-1]).any()):  # `topk` says nothing of ties
        best, ids = logits.sort(dim=-1, descending=True, stable=True)
    return best[:, :count], ids[:, :count]


def token_of_whole(logits: Tensor, temperature: float, draw: Tensor) -> Tensor:
    """Return the first id [B] whose cumulative mass in softmax(logits / T) is above the draw [B, 1] of a row.

    The draw picks a group of ids by the mass of the groups, then an id inside the group.
    """
    groups = F.pad(logits, (0, -logits.shape[1] % GROUP), value=-torch.inf).unflatten(-1, (-1, GROUP))
    tempered = (groups - groups.amax((1, 2), keepdim=True)) / temperature
    group, share = pick(tempered.exp().sum(-1, dtype=torch.float64), draw)
    inner = tempered.take_along_dim(group.unsqueeze(-1), 1).squeeze(1).double().exp()
    place, _ = pick(inner, share)
    return (group * GROUP + place).squeeze(-1)
