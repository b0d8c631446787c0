"""Sampling of responses: a latent run, the end marker, the visible answer, EOS.

This module decides which rows are decoded when. A prompt is prefilled once and copied to the slots of its responses. A
batch is always the first slots: when 10% of it has finished, the last live rows move into the free slots. Rows that did
not fit at first are put into slots that have become free. Noise and text draws come from row streams (seed, step, row),
so no trajectory depends on this schedule.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from latent_grpo.architecture import check_length
from latent_grpo.config import LatentSampling
from latent_grpo.model import body, check_compatible, embed, positions
from latent_grpo.rollout.decoder import Decoder, decoder_for
from latent_grpo.rollout.trajectory import Rollout

COMPACT_BELOW = 0.9  # finished rows leave the batch when the live share of it is at most this
REFILL_ABOVE = 0.25  # waiting rows are prefilled when the free share of the slots is above this


@torch.no_grad()
def generate_latent(
    model: Any,
    input_ids: Tensor,  # [P, Lp]
    attention_mask: Tensor,  # [P, Lp]
    sampling: LatentSampling,
    *,
    num_generations: int = 1,
    row_ids: Tensor | None = None,
    max_rows: int | None = None,
) -> Rollout:
    """Sample G = `num_generations` responses to each of P prompts, with `model` in evaluation mode.

    A latent response is a run of latent steps (Eq. 1, 12-14), the end marker, then text up to EOS or the limit. The run
    ends at the step whose highest logit is the end marker (`sampling.end_rule` and the bounds of its length decide).
    With `sampling.latent=False` every step is a text step.

    Args:
        model: a causal LM that `check_compatible` accepts. Its training mode is restored afterwards.
        input_ids: [P, Lp] int64, the prompts, padded on the left.
        attention_mask: [P, Lp], 0 on padding.
        sampling: the options of both kinds of step, the seed and the limit `max_new_tokens` in steps.
        num_generations: responses per prompt.
        row_ids: [P * G] int64, the noise stream of each row (default 0, 1, ...). A row of the same prompt, stream and
            seed has the same trajectory in every batch, apart from rounding.
        max_rows: rows decoded at a time (default: all). The others wait for a free slot. This bounds the memory of the
            cache and changes no trajectory.

    Returns:
        A `Rollout` of R = P * G rows, prompt by prompt, on the device of the model. Its `logprob` is that of the
        sampled steps at the sampling temperature, or at temperature 1 for greedy text.

    Raises:
        ValueError: latent responses need `sampling.end_token_id`, or `max_rows` is below 1.
        ModelError: `check_compatible` refuses the model, it has layers that keep no key-value cache per token, or
            rows are too long for it.
    """
    if sampling.latent and sampling.end_token_id is None:
        raise ValueError("latent sampling needs end_token_id; set it to the first id of end_marker_ids(...)")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows is {max_rows}; give 1 or more, or None for all rows at once")
    check_compatible(model)
    check_length(model.config, int(attention_mask.sum(-1).max()) + sampling.max_new_tokens)
    rows = len(input_ids) * num_generations
    streams = torch.arange(rows, device=input_ids.device) if row_ids is None else row_ids
    prompt_index = torch.arange(rows, device=input_ids.device) // num_generations
    was_training = model.training
    model.eval()
    # With inference_mode a step of a small model is one fifteenth faster than with only no_grad.
    with torch.inference_mode():
        tokens = input_ids.shape[1] + sampling.max_new_tokens
        decoder = decoder_for(model, sampling, rows, min(rows, max_rows or rows), tokens)
        schedule = _Schedule(decoder, input_ids, attention_mask, streams, prompt_index)
        while schedule.next_batch():
            decoder.step(schedule.count, schedule.furthest)
    model.train(was_training)
    tau = 1.0 if sampling.noise == "none" else sampling.tau  # the latent step does not apply tau without noise
    return decoder.record.rollout(input_ids, attention_mask, prompt_index, decoder.is_eos, tau)


class _Schedule:
    """Which rows are in the decoder's slots. The first `count` slots are the batch; `waiting` rows have no slot yet.

    `furthest` is the largest cache position of the batch, for `Decoder.step`.
    """

    def __init__(
        self, decoder: Decoder, prompt_ids: Tensor, prompt_mask: Tensor, streams: Tensor, prompt_index: Tensor
    ) -> None:
        self.decoder, self.prompt_ids, self.prompt_mask = decoder, prompt_ids, prompt_mask
        self.streams, self.prompt_index = streams, prompt_index
        self.waiting = torch.arange(len(streams), device=streams.device)
        self.count, self.furthest = 0, 0

    def next_batch(self) -> bool:
        """Drop finished rows, put waiting rows into free slots, and return whether any row is left to decode."""
        self.drop()
        slots = self.decoder.slots
        # One prefill of many rows costs less than many of a few rows, so rows wait until enough slots are free.
        while len(self.waiting) and (self.count == 0 or slots - self.count > REFILL_ABOVE * slots):
            free = slots - self.count
            rows, self.waiting = self.waiting[:free], self.waiting[free:]
            self.prefill(rows)
            self.drop()  # the first element may have been the last one
        return self.count > 0

    def prefill(self, rows: Tensor) -> None:
        """Compute each prompt of the rows once, put the rows into the next slots, and emit their first elements."""
        prompts, index = self.prompt_index[rows].unique(return_inverse=True)
        mask = self.prompt_mask[prompts]
        mask = mask[:, mask.shape[1] - int(mask.sum(-1).max()) :]  # without padding that all of them share
        ids = self.prompt_ids[prompts, -mask.shape[1] :]
        cache = DynamicCache()  # without a configuration it keeps tokens beyond a sliding window, which masks hide
        decoder = self.decoder
        hidden = body(decoder.model, embed(decoder.model, ids), mask, positions(mask), cache)[:, -1]
        decoder.fill(self.count, rows, self.streams[rows], hidden, mask, cache, index)
        self.count += len(rows)

    def drop(self) -> None:
        """Describe the batch, and take finished rows out of it once they are at least 10% of it."""
        if not self.count:
            return
        state = self.decoder.state
        done, last = state.done[: self.count], state.last[: self.count]
        live = ~done
        # One tensor, so that both numbers cost one wait for the device.
        live_count, self.furthest = torch.stack([live.sum(), last.max()]).tolist()
        if live_count == self.count or live_count > COMPACT_BELOW * self.count:
            return
        # As many live rows lie behind the first `live_count` slots as there are finished rows in them.
        target = done[:live_count].nonzero().squeeze(-1)
        source = live[live_count:].nonzero().squeeze(-1) + live_count
        if len(target):
            self.decoder.move(target, source)
        done[live_count:] = True  # the slots behind the batch hold copies of rows that are live in it
        self.count = live_count
