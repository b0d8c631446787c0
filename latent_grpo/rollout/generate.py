"""Sampling of responses: a latent run, the end marker, the visible answer, EOS.

Which rows are decoded when: prompts are prefilled once and copied to the slots of their rollouts; slots of finished
rows are filled by moving the last rows down, so that a batch is always the first slots, and rows that did not fit go
into the slots that became free. Noise and text draws come from row streams (seed, step, row), so none of this changes a
trajectory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from latent_grpo.config import LatentSampling
from latent_grpo.model import body, positions
from latent_grpo.rollout.decoder import LATENT, MIXED, TEXT, Decoder, decoder_for
from latent_grpo.rollout.trajectory import Rollout

COMPACT_BELOW = 0.9  # live share of the batch under which finished rows leave it
REFILL_ABOVE = 0.25  # free share of the slots above which waiting rows are prefilled


@torch.no_grad()
def generate_latent(
    model: Any,
    input_ids: Tensor,  # [P, Lp], left-padded
    attention_mask: Tensor,  # [P, Lp]
    sampling: LatentSampling,
    *,
    num_generations: int = 1,
    row_ids: Tensor | None = None,
    max_rows: int | None = None,
) -> Rollout:
    """Sample `num_generations` responses to every prompt (SPEC 2 and 3), with `model` in evaluation mode.

    Rows are ordered prompt by prompt. row_ids [P * num_generations] int64 names their noise streams (default arange).
    At most `max_rows` rows are decoded at once (default: all); the rest wait for a free slot. That bounds the memory
    of the cache and changes no trajectory.
    Raises ValueError where a latent response is asked for without `sampling.end_token_id`, or max_rows is below 1.
    """
    if sampling.latent and sampling.end_token_id is None:
        raise ValueError("latent sampling needs end_token_id: the first id of the end marker, see end_marker_ids")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows is {max_rows}: give 1 or more, or None for all rows at once")
    rows = len(input_ids) * num_generations
    streams = torch.arange(rows, device=input_ids.device) if row_ids is None else row_ids
    prompt_index = torch.arange(rows, device=input_ids.device) // num_generations
    was_training = model.training
    model.eval()
    with torch.inference_mode():  # a small model's step is one part in fifteen faster than with no_grad alone
        tokens = input_ids.shape[1] + sampling.max_new_tokens
        decoder = decoder_for(model, sampling, rows, min(rows, max_rows or rows), tokens)
        schedule = _Schedule(decoder, input_ids, attention_mask, streams, prompt_index)
        while schedule.next_batch():
            decoder.step(schedule.count, schedule.kind, schedule.furthest)
    model.train(was_training)
    tau = 1.0 if sampling.noise == "none" else sampling.tau
    return decoder.record.rollout(input_ids, attention_mask, prompt_index, decoder.is_eos, tau)


class _Schedule:
    """Which rows are in the decoder's slots: the first `count` slots are the batch, `waiting` rows are not in yet."""

    def __init__(
        self, decoder: Decoder, prompt_ids: Tensor, prompt_mask: Tensor, streams: Tensor, prompt_index: Tensor
    ) -> None:
        self.decoder, self.prompt_ids, self.prompt_mask = decoder, prompt_ids, prompt_mask
        self.streams, self.prompt_index = streams, prompt_index
        self.waiting = torch.arange(len(streams), device=streams.device)
        self.count, self.kind, self.furthest = 0, TEXT, 0

    def next_batch(self) -> bool:
        """Finished rows leave, waiting ones come in once enough slots are free; whether any row is in flight."""
        self.drop()
        slots = self.decoder.slots
        while len(self.waiting) and (self.count == 0 or slots - self.count > REFILL_ABOVE * slots):
            free = slots - self.count
            rows, self.waiting = self.waiting[:free], self.waiting[free:]
            self.prefill(rows)
            self.drop()
        return self.count > 0

    def prefill(self, rows: Tensor) -> None:
        """Compute the prompts of the rows, each once, put the rows into the next slots, and take their first step."""
        prompts, index = self.prompt_index[rows].unique(return_inverse=True)
        mask = self.prompt_mask[prompts]
        mask = mask[:, mask.shape[1] - int(mask.sum(-1).max()) :]
        ids = self.prompt_ids[prompts, -mask.shape[1] :]
        cache = DynamicCache()  # keeps all tokens, those beyond a sliding window too: masks hide them
        decoder = self.decoder
        hidden = body(decoder.model, decoder.table[ids], mask, positions(mask), cache)[:, -1]
        decoder.fill(self.count, rows, self.streams[rows], hidden, mask, cache, index)
        self.count += len(rows)

    def drop(self) -> None:
        """Move the last rows into the slots of finished ones, once those are a tenth of the batch; what rows are in."""
        state = self.decoder.state.first(self.count)
        if not self.count:
            return
        going = ~state.done
        live, latent, self.furthest = torch.stack(
            [going.sum(), (going & state.in_latent).sum(), state.last.max()]
        ).tolist()
        self.kind = TEXT if latent == 0 else LATENT if latent == live else MIXED
        if live == self.count or live > COMPACT_BELOW * self.count:
            return
        target = state.done[:live].nonzero().squeeze(-1)
        source = going[live:].nonzero().squeeze(-1) + live
        if len(target):
            self.decoder.move(target, source)
        state.done[live:] = True
        self.count = live
