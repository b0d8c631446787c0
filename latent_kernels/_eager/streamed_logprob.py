"""The eager log-probs of hidden states and their gradient on a CPU, without a chunk of logits (Eq. 15-17).

With p the softmax of a row's logits and c_k the gradient of its log-prob in the log-prob of component k,

    d logprob / d hidden = sum_k c_k W[id_k] - (sum_k c_k) sum_v p_v W_v

up to the factors of temperature and head. The last sum is that of attention, with the rows of the head as keys and as
values. So one pass over the vocabulary is enough, a block at a time: `exp(z - m)` is summed and multiplied by the same
block of the head that made it, and both sums are rescaled when the maximum m grows. The coefficients c_k, which depend
on the whole row, are only needed at the end. There are two products with the head, or one without a gradient, and a
block of logits never leaves the cache.

Logits are held as [block, n]: a product with few rows of hidden is faster with the head on the left.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from latent_kernels._eager.latent_logprob import coefficients_of, inverse_temperature_of, score, softmax_share
from latent_kernels._linear import head_logits_, no_autocast, softcap_slope
from latent_kernels._loss_types import LogprobSpec
from latent_kernels.reference.latent_step import compute_dtype, has_valid_ids, is_hard

BLOCK_TOKENS = 4096  # rows of the head at a time: fewer are more operations, each of which waits for all cores
MAX_ROWS = 512  # rows of hidden at a time: products with more are no faster


class StreamedScores(NamedTuple):
    """The log-probs of n rows, and their gradient in the hidden states."""

    logprob: Tensor  # [n]
    crossed: Tensor  # [n] integer, latent components with a negative margin
    dhidden: Tensor | None  # [n, D] float32, or float64 for float64 inputs


class _Sums(NamedTuple):
    """What one pass over the vocabulary finds for n rows."""

    log_z: Tensor  # [n, 1] log-sum-exp of the logits, on a text row of logits / temperature
    picked: Tensor  # [n, K] logits of the components, under the same temperature
    mean: Tensor | None  # [n, D] sum_v p_v s_v W_v, with s the slope of the soft cap; stored by columns


def streamed_chunks(rows: int) -> list[slice]:
    """Cut rows into slices of nearly equal length, of at most MAX_ROWS."""
    size = max(1, -(-rows // max(1, -(-rows // MAX_ROWS))))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def streamed_logprob(hidden: Tensor, lm_head: Tensor, spec: LogprobSpec, *, wants_gradient: bool) -> StreamedScores:
    """Return the log-probs of hidden states [n, D] under a head [V, D] and, if wanted, their gradient in hidden.

    One log-prob per row: a spec with `components` is not for this function.
    """
    hard = is_hard(spec.ids)
    inverse_temperature = inverse_temperature_of(hidden.to(compute_dtype(hidden, lm_head)), spec, hard)
    ids, exist = spec.ids.clamp(0, len(lm_head) - 1), has_valid_ids(spec.ids, len(lm_head))
    with no_autocast(hidden.device):
        sums = _pass_over_vocabulary(hidden, lm_head, spec, ids, inverse_temperature, wants_gradient)
        log_probs = sums.picked - sums.log_z
        logprob, crossed = score(log_probs, spec, hard, exist)
        if sums.mean is None:
            return StreamedScores(logprob, crossed, None)
        coefficients = coefficients_of(log_probs, spec, hard, exist) * (inverse_temperature * spec.head.logit_scale)
        dhidden = sums.mean.contiguous().mul_(-softmax_share(coefficients, spec, hard))
        if spec.head.softcap is not None:
            coefficients = coefficients * softcap_slope(sums.picked / inverse_temperature, spec.head.softcap)
        for k in range(ids.shape[1]):  # K gathers need less memory than [n, K, D]
            dhidden.addcmul_(lm_head[ids[:, k]].to(dhidden.dtype), coefficients[:, k : k + 1])
        return StreamedScores(logprob, crossed, dhidden)


def _pass_over_vocabulary(
    hidden: Tensor,
    lm_head: Tensor,
    spec: LogprobSpec,
    ids: Tensor,  # [n, K], all within the vocabulary
    inverse_temperature: Tensor,  # [n, 1]
    wants_mean: bool,
) -> _Sums:
    """Return the sums of a row of logits that a log-prob and its gradient need."""
    dtype, bias, softcap = inverse_temperature.dtype, spec.head.bias, spec.head.softcap
    scales_states = bias is None and softcap is None  # then the temperature need not be applied to logits
    states = hidden.to(dtype)
    columns = (states * inverse_temperature if scales_states else states).T.contiguous()
    buffer = columns.new_empty(min(BLOCK_TOKENS, len(lm_head)), len(hidden))
    # Not -inf: a first block of logits -inf has exp(-inf - highest) = 0.
    highest = columns.new_full((len(hidden), 1), torch.finfo(dtype).min)
    total, picked = torch.zeros_like(highest), columns.new_zeros(ids.shape)
    weighted = torch.zeros_like(columns) if wants_mean else None
    for start in range(0, len(lm_head), BLOCK_TOKENS):
        block = slice(start, start + BLOCK_TOKENS)
        weight = lm_head[block].to(dtype)
        logits = torch.mm(weight, columns, out=buffer[: len(weight)]).T  # [n, block]
        head_logits_(logits, spec.head if bias is None else spec.head._replace(bias=bias[block]))
        slope = None if softcap is None or weighted is None else softcap_slope(logits, softcap)
        if spec.temperature != 1.0 and not scales_states:
            logits.mul_(inverse_temperature)
        place = ids - start
        inside = (place >= 0) & (place < len(weight))
        picked = torch.where(inside, logits.gather(-1, place.clamp_(0, len(weight) - 1)), picked)
        higher = torch.maximum(highest, logits.amax(-1, keepdim=True))
        shrink = highest.sub_(higher).exp_()
        total.mul_(shrink).add_(logits.sub_(higher).exp_().sum(-1, keepdim=True))
        highest = higher
        if weighted is not None:
            weights = logits if slope is None else logits.mul_(slope)
            weighted.mul_(shrink.T).addmm_(weight.T, weights.T)
    return _Sums(highest + total.log(), picked, None if weighted is None else weighted.div_(total.T).T)
