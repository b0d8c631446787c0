"""How the responses of an update are cut into micro-batches: like lengths together, so that cost follows tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from latent_grpo.rollout import Rollout


def micro_batches(rollout: Rollout, rows: Tensor, size: int, tokens: int | None = None) -> list[Tensor]:
    """Parts of `rows` [n] that are replayed together: at most `size` responses or, where given, `tokens` tokens each.

    Where one part does not take them all, the responses to a prompt stay together, since a part computes its prompts
    once, and prompts are ordered by their longest response. Tokens are counted with padding: distinct prompts times the
    longest, and responses times the longest. A response longer than `tokens` is a part of its own.
    """
    if tokens is None and len(rows) <= size:
        return [rows]
    lengths, prompts = rollout.lengths[rows], rollout.prompt_index[rows]
    longest = lengths.new_zeros(int(prompts.max()) + 1).scatter_reduce_(0, prompts, lengths, "amax")[prompts]
    order = (longest * (len(longest) + int(prompts.max()) + 1) + prompts).argsort(stable=True)
    if tokens is None:
        return list(rows[order].split(size))
    prompt_lengths = rollout.prompt_mask.sum(-1)[prompts]
    figures = torch.stack([lengths, prompts, prompt_lengths], 1)[order].tolist()
    cuts, first = [0], 0
    for end in range(1, len(figures) + 1):
        part = figures[first:end]
        padded = len({p for _, p, _ in part}) * max(w for _, _, w in part) + len(part) * max(n for n, _, _ in part)
        if padded > tokens and end - first > 1:
            first = end - 1
            cuts.append(first)
    return [rows[order[a:b]] for a, b in zip(cuts, [*cuts[1:], len(figures)], strict=True)]
