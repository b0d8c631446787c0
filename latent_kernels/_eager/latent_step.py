"""The latent step without a sort of the vocabulary and without noise on it.

Noise is bounded, so a token can be among the final K only if `lp + high >= theta`, theta being the K-th best score seen
so far, and the set `{logit > frontier}` is a prefix of the sorted order, so that its exclusive cumulative mass under
the global log-sum-exp is the nucleus rule. A round therefore looks at the groups with the highest maxima: every token
above the next group's maximum (the frontier) is inside them. Rows whose answer could still lie below the frontier go to
the next round with four times as many groups, in the last with all of them. A vocabulary that the first round covers is
sorted instead: its steps cost what their operations cost to start, and that takes the fewest.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from latent_kernels._noise import NoiseSpec, exponential_draws, gumbel_noise, noise_bounds
from latent_kernels._types import LatentStep
from latent_kernels.reference import best_first, nucleus_mask, per_row

GROUP = 32  # ids a group: every (V / 32)-th id, so that the maxima are a reduction over the outer axis
FIRST_GROUPS = 96  # covers realistic rows (30 to 350 ids that matter) in one or two rounds
GROWTH = 4
ID_LIMIT = 1 << 40  # above any vocabulary id


class RowNoise(NamedTuple):
    """Noise of B rows, of which some can be picked: scale [B, 1] or 0-d, a stream or injected draws [B, V]."""

    kind: str
    scale: Tensor
    seed: int | Tensor | None
    step: int | Tensor
    row_ids: Tensor
    exponential: Tensor | None

    def rows(self, index: Tensor) -> RowNoise:
        """The same noise for a subset of the rows."""
        return self._replace(
            scale=self.scale[index] if self.scale.ndim else self.scale,
            step=self.step[index] if isinstance(self.step, Tensor) and self.step.ndim else self.step,
            row_ids=self.row_ids[index],
            exponential=None if self.exponential is None else self.exponential[index],
        )

    def at(self, ids: Tensor) -> Tensor:
        """Scaled noise of ids [B, M]; padding ids beyond the vocabulary get any finite value."""
        if self.exponential is not None:
            draws = self.exponential.gather(-1, ids.clamp_max(self.exponential.shape[1] - 1))
        else:
            assert self.seed is not None
            draws = exponential_draws(ids, self.row_ids, self.seed, self.step)
        return gumbel_noise(draws, self.kind).to(self.scale.dtype) * self.scale


def row_noise(spec: NoiseSpec, logits: Tensor) -> RowNoise:
    """The noise in the dtype of logits [B, V], row by row."""
    rows = torch.arange(len(logits), device=logits.device) if spec.row_ids is None else spec.row_ids
    return RowNoise(spec.kind, per_row(spec.scale, logits), spec.seed, spec.step, rows, spec.exponential)


class Prefix(NamedTuple):
    """The best tokens of R rows, by (logit downwards, id upwards); what is not above the frontier is -inf padding."""

    logits: Tensor  # [R, M]
    ids: Tensor  # [R, M]
    frontier: Tensor  # [R, 1] every token above it is in the prefix; -inf where all finite tokens are
    whole: bool  # all tokens are in the prefix, those at -inf as well


def grouped(logits: Tensor) -> Tensor:
    """[B, V] as [B, GROUP, ceil(V / GROUP)], group j holding the ids congruent to j; the tail padded with -inf."""
    tail = -logits.shape[1] % GROUP
    padded = F.pad(logits, (0, tail), value=-torch.inf) if tail else logits
    return padded.reshape(len(logits), GROUP, padded.shape[1] // GROUP)


def best_prefix(blocks: Tensor, maxima: Tensor, groups: int, top_k: int) -> Prefix:
    """The tokens of the `groups` best groups that are above every other group. blocks [R, GROUP, S], maxima [R, S]."""
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
        width = max(top_k, int((values > frontier).sum(-1).max()))
        kept = values.topk(width, dim=-1, sorted=False).indices.sort(dim=-1).values
        values, ids = values.gather(-1, kept), ids.gather(-1, kept)
    # Ids ascend along the row here, so a stable sort leaves ties at the lower id.
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return Prefix(values, ids.gather(-1, order), frontier, whole)


def highest(logits: Tensor, blocks: Tensor, maxima: Tensor) -> Tensor:
    """`logits.argmax(-1)` [B], read out of the best group where only one group holds the maximum."""
    if not len(logits):
        return logits.argmax(-1)
    best, group = maxima.max(-1, keepdim=True)
    if ((maxima == best).sum(-1) != 1).any():
        return logits.argmax(-1)
    column = blocks.gather(2, group.unsqueeze(1).expand(-1, GROUP, -1)).squeeze(2)
    return column.argmax(-1) * maxima.shape[1] + group.squeeze(-1)


def whole_prefix(logits: Tensor) -> Prefix:
    """All tokens [B, V]."""
    if logits.dtype == torch.float32 and logits.device.type == "cpu":
        ids = _best_first_ids(logits)
        values = logits.gather(-1, ids)
    else:
        values, ids = logits.sort(dim=-1, descending=True, stable=True)
    return Prefix(values, ids, torch.full_like(values[:, :1], -torch.inf), True)


def _best_first_ids(logits: Tensor) -> Tensor:
    """Ids [B, V] by (logit downwards, id upwards), both in one int64 key: NumPy sorts those six times as fast."""
    bits = (logits + 0.0).numpy().view(np.int32)  # -0.0 ties with 0.0
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # a float's order as an int's
    keys = (~rising).astype(np.int64) << 32
    keys |= np.arange(logits.shape[1])
    keys.sort(axis=-1)
    return torch.from_numpy(keys & 0xFFFFFFFF)


def clean_top_k(blocks: Tensor, maxima: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The top_k highest logits [R, top_k] and their ids, ties to the lower id."""
    prefix = best_prefix(blocks, maxima, top_k, top_k)
    tied = prefix.logits[:, top_k - 1] == -torch.inf
    if tied.any():  # a tie across the frontier left fewer than top_k above it
        prefix = best_prefix(blocks, maxima, maxima.shape[1], top_k)
    return prefix.logits[:, :top_k], prefix.ids[:, :top_k]


def best_scores(scores: Tensor, ids: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """`best_first`, which sorts twice, for scores that hardly ever tie."""
    best, order = scores.topk(min(top_k + 1, scores.shape[1]), dim=-1)
    if (best[:, 1:] == best[:, :-1]).any():
        return best_first(scores, ids, top_k)
    return best[:, :top_k], ids.gather(-1, order[:, :top_k])


def noisy_round(
    prefix: Prefix, log_z: Tensor, top_k: int, top_p: Tensor, noise: RowNoise
) -> tuple[Tensor, Tensor, Tensor]:
    """Best noisy scores and ids [R, top_k] within a prefix, and the rows [R] that nothing outside it can change."""
    low, high = noise_bounds(noise.kind)
    log_probs = prefix.logits - log_z
    candidate = nucleus_mask(log_probs, top_p, top_k)
    if not prefix.whole:
        candidate &= prefix.logits > prefix.frontier
    # At least top_k scores reach the K-th clean log-prob plus the least noise: draw noise above that line only.
    reach = log_probs + high * noise.scale >= log_probs[:, top_k - 1 : top_k] + low * noise.scale
    width = max(top_k, int((candidate & reach).sum(-1).max()))  # both are prefixes: the widest row decides
    ids = prefix.ids[:, :width]
    scores = torch.where(candidate[:, :width], log_probs[:, :width] + noise.at(ids), -torch.inf)
    # What is no candidate goes behind candidates of probability zero, whose scores are -inf too.
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
    """Groups that the rows still pending need: scores [R, top_k] so far, maxima [R, S], log_z [R, 1]."""
    if not len(scores):
        return groups
    # The K-th best score only grows, so the groups that could beat today's are enough; none found yet reads as all.
    _, high = noise_bounds(noise.kind)
    line = scores[:, -1:] - high * noise.scale.max()
    needed = int((maxima - log_z >= line).sum(-1).max())
    return min(max(needed, groups + 1), groups * GROWTH, maxima.shape[1])


def noisy_top_k(
    blocks: Tensor, maxima: Tensor, log_z: Tensor, top_k: int, top_p: float | Tensor, noise: RowNoise
) -> tuple[Tensor, Tensor]:
    """Scores and ids [B, top_k] of the noisy rule, exact for every row."""
    rows = len(maxima)
    scores = blocks.new_empty(rows, top_k)
    ids = torch.empty(rows, top_k, dtype=torch.int64, device=blocks.device)
    pending = torch.arange(rows, device=blocks.device)
    top_p = torch.as_tensor(top_p, dtype=torch.float64, device=blocks.device).expand(rows)
    groups = max(FIRST_GROUPS, top_k)
    while len(pending):
        if len(pending) < rows:
            inputs = blocks[pending], maxima[pending], log_z[pending], top_p[pending], noise.rows(pending)
        else:
            inputs = blocks, maxima, log_z, top_p, noise
        prefix = best_prefix(inputs[0], inputs[1], groups, top_k)
        found, found_ids, done = noisy_round(prefix, inputs[2], top_k, inputs[3], inputs[4])
        scores[pending[done]], ids[pending[done]] = found[done], found_ids[done]
        pending = pending[~done]
        groups = next_groups(found[~done], inputs[1][~done], inputs[2][~done], noise, groups)
    return scores, ids


def sorted_step(
    prefix: Prefix, log_z: Tensor, noisy: Tensor, top_k: int, top_p: float | Tensor, noise: NoiseSpec
) -> tuple[Tensor, Tensor]:
    """Scores and ids [B, top_k] from the sorted vocabulary of B rows, of which noisy [B] get noise."""
    if noise.kind == "none":
        return prefix.logits[:, :top_k] - log_z, prefix.ids[:, :top_k]
    drawn, column = row_noise(noise, prefix.logits), noisy.unsqueeze(-1)
    drawn = drawn._replace(scale=torch.where(column, drawn.scale, 0.0))
    if drawn.exponential is not None:  # an unused draw may be NaN
        drawn = drawn._replace(exponential=torch.where(column, drawn.exponential, 1.0))
    return noisy_round(prefix, log_z, top_k, torch.as_tensor(top_p, dtype=torch.float64), drawn)[:2]


def grouped_step(
    logits: Tensor,
    blocks: Tensor,
    maxima: Tensor,
    log_z: Tensor,
    noisy: Tensor,
    top_k: int,
    top_p: float | Tensor,
    noise: NoiseSpec,
) -> tuple[Tensor, Tensor]:
    """Scores and ids [B, top_k] from the groups of the vocabulary of B rows, of which noisy [B] get noise."""
    rows = len(logits)
    scores = logits.new_empty(rows, top_k)
    ids = torch.empty(rows, top_k, dtype=torch.int64, device=logits.device)
    drawn = row_noise(noise, logits)
    for index, is_noisy in ((noisy.nonzero().squeeze(-1), True), ((~noisy).nonzero().squeeze(-1), False)):
        if not len(index):
            continue
        whole = len(index) == rows
        part_blocks, part_maxima = (blocks, maxima) if whole else (blocks[index], maxima[index])
        if is_noisy:
            part_top_p = top_p[index] if isinstance(top_p, Tensor) and top_p.ndim else top_p
            found = noisy_top_k(part_blocks, part_maxima, log_z[index], top_k, part_top_p, drawn.rows(index))
            scores[index], ids[index] = found
        else:
            best, ids[index] = clean_top_k(part_blocks, part_maxima, top_k)
            scores[index] = best - log_z[index]
    return scores, ids


def mixture(ids: Tensor, weights: Tensor, embedding: Tensor) -> Tensor:
    """`mix`, rounding included, of rows so few that all their components may be in memory at once."""
    parts = F.embedding(ids, embedding).to(weights.dtype).mul_(weights.unsqueeze(-1))
    first, *others = parts.unbind(1)
    out = first.clone()
    for part in others:
        out += part
    return out.to(embedding.dtype)


def latent_step_from_logits_eager(
    logits: Tensor,
    embedding: Tensor,
    *,
    top_k: int,
    top_p: float | Tensor,
    tau: float | Tensor,
    noise: NoiseSpec,
    latent_mask: Tensor | None,
    end_token_id: int | None,
) -> LatentStep:
    """`latent_step_from_logits_ref` on float32 or float64 logits [B, V], by bounded noise instead of a sort."""
    small = len(logits) > 0 and logits.shape[1] <= GROUP * max(FIRST_GROUPS, top_k)
    if small:
        prefix = whole_prefix(logits)
        top_token = prefix.ids[:, 0]
    else:
        blocks = grouped(logits)
        maxima = blocks.amax(1)
        top_token = highest(logits, blocks, maxima)
    is_latent = torch.ones_like(top_token, dtype=torch.bool) if latent_mask is None else latent_mask.clone()
    if end_token_id is not None:
        is_latent &= top_token != end_token_id
    noisy = is_latent if noise.kind != "none" else torch.zeros_like(is_latent)
    log_z = logits.logsumexp(-1, keepdim=True)
    if small:
        scores, ids = sorted_step(prefix, log_z, noisy, top_k, top_p, noise)
    else:
        scores, ids = grouped_step(logits, blocks, maxima, log_z, noisy, top_k, top_p, noise)
    tau = torch.where(noisy, torch.as_tensor(tau, dtype=logits.dtype, device=logits.device), 1.0).unsqueeze(-1)
    weights = (scores / tau).softmax(-1)
    return LatentStep(ids, scores.float(), weights.float(), mixture(ids, weights, embedding), top_token, is_latent)
