"""The eager latent step: it sorts no large vocabulary and draws no noise for most of it (Eq. 1, 12-14).

Noise is bounded. So a token can be among the final K only if `lp + high >= theta`, where theta is the K-th best score
seen so far. The tokens `{logit > frontier}` are a prefix of the sorted order, so their exclusive cumulative mass under
the global log-sum-exp decides the nucleus.

A round looks at the groups with the highest maxima. Every token above the maximum of the next group (the frontier) is
inside these groups. Rows whose result could still depend on tokens below the frontier go to the next round, with up to
four times as many groups, and in the last round with all of them.

A vocabulary that the first round would cover whole is sorted instead. There, time goes into starting operations, and
sorting takes the fewest.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from latent_kernels._noise import exponential_draws, gumbel_noise, noise_bounds
from latent_kernels._types import LatentStep, LatentStepOptions, NoiseSpec
from latent_kernels.reference.latent_step import (
    best_first,
    in_latent_run,
    nucleus_mask,
    per_row,
    tempered,
    with_ended_rows,
)

GROUP = 32  # ids per group: every (V / 32)-th id, so that the maxima are a reduction over the outer axis
FIRST_GROUPS = 96  # covers realistic rows (30 to 350 ids that matter) in one or two rounds
GROWTH = 4
ID_LIMIT = 1 << 40  # above any vocabulary id


class RowNoise(NamedTuple):
    """The noise of B rows, from which rows can be selected."""

    kind: str
    scale: Tensor  # [B, 1] or 0-d
    seed: int | Tensor | None
    step: int | Tensor
    row_ids: Tensor  # [B]
    exponential: Tensor | None  # [B, V] injected draws
    delta: float  # the least one-sided noise

    def select(self, index: Tensor) -> RowNoise:
        """Return the same noise for a subset of the rows."""
        return self._replace(
            scale=self.scale[index] if self.scale.ndim else self.scale,
            step=self.step[index] if isinstance(self.step, Tensor) and self.step.ndim else self.step,
            row_ids=self.row_ids[index],
            exponential=None if self.exponential is None else self.exponential[index],
        )

    def at(self, ids: Tensor) -> Tensor:
        """Return the scaled noise of ids [B, M]. Padding ids beyond the vocabulary get any finite value."""
        if self.exponential is not None:
            draws = self.exponential.gather(-1, ids.clamp_max(self.exponential.shape[1] - 1))
        else:
            assert self.seed is not None
            draws = exponential_draws(ids, self.row_ids, self.seed, self.step)
        return gumbel_noise(draws, self.kind, self.delta).to(self.scale.dtype) * self.scale


def row_noise(noise: NoiseSpec, logits: Tensor) -> RowNoise:
    """Return the noise of the rows of logits [B, V], in their dtype."""
    row_ids = torch.arange(len(logits), device=logits.device) if noise.row_ids is None else noise.row_ids
    scale = per_row(noise.scale, logits)
    return RowNoise(noise.kind, scale, noise.seed, noise.step, row_ids, noise.exponential, noise.delta)


class Prefix(NamedTuple):
    """The best tokens of R rows, ordered by falling logit, then rising id. Padding at the end is -inf."""

    logits: Tensor  # [R, M]
    ids: Tensor  # [R, M]
    frontier: Tensor  # [R, 1] every token above it is in the prefix; -inf if the prefix holds all finite tokens
    whole: bool  # whether all tokens are in the prefix, including those at -inf


def grouped(logits: Tensor) -> Tensor:
    """Return logits [B, V] as [B, GROUP, ceil(V / GROUP)], padded with -inf. Group j holds the ids congruent to j."""
    tail = -logits.shape[1] % GROUP
    padded = F.pad(logits, (0, tail), value=-torch.inf) if tail else logits
    return padded.reshape(len(logits), GROUP, padded.shape[1] // GROUP)


def best_prefix(blocks: Tensor, maxima: Tensor, groups: int, top_k: int) -> Prefix:
    """Return the tokens of the `groups` best groups that are above every other group.

    blocks is [R, GROUP, S], maxima [R, S].
    """
    rows, _, stride = blocks.shape
    offsets = torch.arange(GROUP, device=blocks.device).view(1, GROUP, 1) * stride
    whole = groups >= stride
    if whole:
        ids = (offsets + torch.arange(stride, device=blocks.device)).reshape(1, -1).expand(rows, -1)
        frontier = torch.full_like(maxima[:, :1], -torch.inf)
        values = blocks.reshape(rows, -1)
    else:
        best, index = maxima.topk(groups + 1, dim=-1)
        frontier = best[:, -1:]
        index = index[:, :-1].sort(dim=-1).values.unsqueeze(1)
        values = blocks.gather(2, index.expand(-1, GROUP, -1)).reshape(rows, -1)
        ids = (offsets + index).reshape(rows, -1)
        values = values.masked_fill(values <= frontier, -torch.inf)
        # Most gathered tokens are below the frontier. Dropping them before the stable sort makes it short.
        width = max(top_k, int((values > frontier).sum(-1).max()))
        kept = values.topk(width, dim=-1, sorted=False).indices.sort(dim=-1).values
        values, ids = values.gather(-1, kept), ids.gather(-1, kept)
    # Ids ascend along the row here, so a stable sort leaves ties at the lower id.
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return Prefix(values, ids.gather(-1, order), frontier, whole)


def highest(logits: Tensor, blocks: Tensor, maxima: Tensor) -> Tensor:
    """Return `logits.argmax(-1)` [B]. If only one group per row holds the maximum, read only that group."""
    if not len(logits):
        return logits.argmax(-1)
    best, group = maxima.max(-1, keepdim=True)
    # Neighbouring ids are in different groups, so a tie between groups says nothing about which id is lower.
    if ((maxima == best).sum(-1) != 1).any():
        return logits.argmax(-1)
    column = blocks.gather(2, group.unsqueeze(1).expand(-1, GROUP, -1)).squeeze(2)
    return column.argmax(-1) * maxima.shape[1] + group.squeeze(-1)


def whole_prefix(logits: Tensor) -> Prefix:
    """Return the prefix of all tokens of logits [B, V]."""
    if logits.dtype == torch.float32 and logits.device.type == "cpu":
        ids = _best_first_ids(logits)
        values = logits.gather(-1, ids)
    else:
        values, ids = logits.sort(dim=-1, descending=True, stable=True)
    return Prefix(values, ids, torch.full_like(values[:, :1], -torch.inf), True)


def _best_first_ids(logits: Tensor) -> Tensor:
    """Return the ids [B, V] by falling logit, then rising id.

    Both are packed into one int64 key, because NumPy sorts such keys six times as fast.
    """
    bits = (logits + 0.0).numpy().view(np.int32)  # adding 0.0 turns -0.0 into 0.0, so that the two tie
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # orders as int32 like the floats themselves
    keys = (~rising).astype(np.int64) << 32
    keys |= np.arange(logits.shape[1])
    keys.sort(axis=-1)
    return torch.from_numpy(keys & 0xFFFFFFFF)


def clean_top_k(blocks: Tensor, maxima: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the top_k highest logits [R, top_k] and their ids, ties to the lower id."""
    prefix = best_prefix(blocks, maxima, top_k, top_k)
    tied = prefix.logits[:, top_k - 1] == -torch.inf
    if tied.any():  # a tie across the frontier left fewer than top_k tokens above it
        prefix = best_prefix(blocks, maxima, maxima.shape[1], top_k)
    return prefix.logits[:, :top_k], prefix.ids[:, :top_k]


def best_scores(scores: Tensor, ids: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return `best_first(scores, ids, top_k)`. It sorts twice, so call it only if scores tie, which is rare."""
    best, order = scores.topk(min(top_k + 1, scores.shape[1]), dim=-1)
    if (best[:, 1:] == best[:, :-1]).any():
        return best_first(scores, ids, top_k)
    return best[:, :top_k], ids.gather(-1, order[:, :top_k])


def noisy_round(
    prefix: Prefix, log_z: Tensor, top_k: int, top_p: Tensor, noise: RowNoise
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best noisy scores and ids [R, top_k] within a prefix, and which rows [R] are decided.

    A row is decided if no token outside the prefix can change its result.
    """
    low, high = noise_bounds(noise.kind, noise.delta)
    log_probs = prefix.logits - log_z
    candidate = nucleus_mask(log_probs, top_p, top_k)
    if not prefix.whole:
        candidate &= prefix.logits > prefix.frontier
    # At least top_k scores reach the K-th clean log-prob plus the least noise, so only tokens above that line need a
    # draw.
    reach = log_probs + high * noise.scale >= log_probs[:, top_k - 1 : top_k] + low * noise.scale
    width = max(top_k, int((candidate & reach).sum(-1).max()))  # both masks are prefixes: the widest row decides
    ids = prefix.ids[:, :width]
    scores = torch.where(candidate[:, :width], log_probs[:, :width] + noise.at(ids), -torch.inf)
    # A candidate of probability zero has score -inf too. It must come before all tokens that are no candidates.
    scores, ids = best_scores(scores, ids.add(~candidate[:, :width], alpha=ID_LIMIT), top_k)
    if prefix.whole:
        return scores, ids % ID_LIMIT, torch.ones_like(candidate[:, 0])
    mass = log_probs.double().exp().sum(-1, keepdim=True)
    limit = per_row(top_p, mass)
    nucleus_inside = (mass >= limit) & (limit < 1.0)
    out_of_reach = scores[:, -1:] > prefix.frontier - log_z + high * noise.scale
    enough = candidate.sum(-1, keepdim=True) >= top_k
    return scores, ids % ID_LIMIT, (enough & (nucleus_inside | out_of_reach)).squeeze(-1)


def next_groups(scores: Tensor, maxima: Tensor, log_z: Tensor, noise: RowNoise, groups: int) -> int:
    """Return how many groups the pending rows need: scores [R, top_k] so far, maxima [R, S], log_z [R, 1]."""
    if not len(scores):
        return groups
    # The K-th best score only grows, so the groups that could beat the current one are enough. A row with fewer than K
    # candidates has -inf there, and so asks for all groups.
    _, high = noise_bounds(noise.kind, noise.delta)
    line = scores[:, -1:] - high * noise.scale.max()
    needed = int((maxima - log_z >= line).sum(-1).max())
    return min(max(needed, groups + 1), groups * GROWTH, maxima.shape[1])


def noisy_top_k(
    blocks: Tensor, maxima: Tensor, log_z: Tensor, top_k: int, top_p: float | Tensor, noise: RowNoise
) -> tuple[Tensor, Tensor]:
    """Return scores and ids [B, top_k] of the noisy rule, exact for every row."""
    rows = len(maxima)
    scores = blocks.new_empty(rows, top_k)
    ids = torch.empty(rows, top_k, dtype=torch.int64, device=blocks.device)
    pending = torch.arange(rows, device=blocks.device)
    top_p = torch.as_tensor(top_p, dtype=torch.float64, device=blocks.device).expand(rows)
    groups = max(FIRST_GROUPS, top_k)
    while len(pending):
        if len(pending) < rows:
            inputs = blocks[pending], maxima[pending], log_z[pending], top_p[pending], noise.select(pending)
        else:
            inputs = blocks, maxima, log_z, top_p, noise
        prefix = best_prefix(inputs[0], inputs[1], groups, top_k)
        round_scores, round_ids, done = noisy_round(prefix, inputs[2], top_k, inputs[3], inputs[4])
        scores[pending[done]], ids[pending[done]] = round_scores[done], round_ids[done]
        pending = pending[~done]
        groups = next_groups(round_scores[~done], inputs[1][~done], inputs[2][~done], noise, groups)
    return scores, ids


def sorted_step(prefix: Prefix, log_z: Tensor, noisy: Tensor, options: LatentStepOptions) -> tuple[Tensor, Tensor]:
    """Return scores and ids [B, top_k] from the sorted vocabulary of B rows, of which noisy [B] get noise."""
    top_k, column = options.top_k, noisy.unsqueeze(-1)
    scores, ids = prefix.logits[:, :top_k] - log_z, prefix.ids[:, :top_k]
    if options.noise == "none":
        return scores, ids
    noise, top_p = row_noise(options.noise_spec, prefix.logits), torch.as_tensor(options.top_p, dtype=torch.float64)
    best, best_ids, _ = noisy_round(prefix, log_z, top_k, top_p, noise)
    # A row without noise is not ranked again: different logits may have equal log-probs, by rounding.
    return torch.where(column, best, scores), torch.where(column, best_ids, ids)


def grouped_step(
    logits: Tensor, blocks: Tensor, maxima: Tensor, log_z: Tensor, noisy: Tensor, options: LatentStepOptions
) -> tuple[Tensor, Tensor]:
    """Return scores and ids [B, top_k] from the groups of the vocabulary of B rows, of which noisy [B] get noise."""
    rows, top_k, top_p = len(logits), options.top_k, options.top_p
    scores = logits.new_empty(rows, top_k)
    ids = torch.empty(rows, top_k, dtype=torch.int64, device=logits.device)
    noise = row_noise(options.noise_spec, logits)
    for index, is_noisy in ((noisy.nonzero().squeeze(-1), True), ((~noisy).nonzero().squeeze(-1), False)):
        if not len(index):
            continue
        # Indexing copies the logits. Rows that are all of one kind, the usual case, need no copy.
        all_rows = len(index) == rows
        row_blocks, row_maxima = (blocks, maxima) if all_rows else (blocks[index], maxima[index])
        if is_noisy:
            row_top_p = top_p[index] if isinstance(top_p, Tensor) and top_p.ndim else top_p
            best, best_ids = noisy_top_k(row_blocks, row_maxima, log_z[index], top_k, row_top_p, noise.select(index))
            scores[index], ids[index] = best, best_ids
        else:
            best, ids[index] = clean_top_k(row_blocks, row_maxima, top_k)
            scores[index] = best - log_z[index]
    return scores, ids


def mixture(ids: Tensor, weights: Tensor, embedding: Tensor) -> Tensor:
    """Return `mix(ids, weights, embedding)`, rounding included, of few rows: all components are in memory at once."""
    components = F.embedding(ids, embedding).to(weights.dtype).mul_(weights.unsqueeze(-1))
    first, *others = components.unbind(1)
    out = first.clone()
    for component in others:
        out += component
    return out.to(embedding.dtype)


def latent_step_from_logits_eager(logits: Tensor, embedding: Tensor, options: LatentStepOptions) -> LatentStep:
    """Compute the rule of "latent_grpo" on checked arguments and float32 or float64 logits [B, V]."""
    return latent_step_and_log_z(logits, embedding, options)[0]


def latent_step_and_log_z(
    logits: Tensor, embedding: Tensor, options: LatentStepOptions
) -> tuple[LatentStep, Tensor]:  # fmt: skip
    """Return the step of `latent_step_from_logits_eager` and the rows' log-sum-exp [B, 1]."""
    small = len(logits) > 0 and logits.shape[1] <= GROUP * max(FIRST_GROUPS, options.top_k)
    if small:
        prefix = whole_prefix(logits)
        top_token = prefix.ids[:, 0]
    else:
        blocks = grouped(logits)
        maxima = blocks.amax(1)
        top_token = highest(logits, blocks, maxima)
    is_latent = in_latent_run(top_token, options)
    noisy = is_latent if options.noise != "none" else torch.zeros_like(is_latent)
    log_z = logits.logsumexp(-1, keepdim=True)
    if small:
        scores, ids = sorted_step(prefix, log_z, noisy, options)
    else:
        scores, ids = grouped_step(logits, blocks, maxima, log_z, noisy, options)
    tau = torch.as_tensor(options.tau, dtype=logits.dtype, device=logits.device)
    weights = tempered(scores, torch.where(noisy, tau, 1.0).unsqueeze(-1)).softmax(-1)
    embeds = mixture(ids, weights, embedding)
    step = LatentStep(ids, scores.float(), weights.float(), embeds, top_token, is_latent)
    return with_ended_rows(step, options), log_z
