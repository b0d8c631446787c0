"""One decoding step of the rows in flight, and the record of what they emit.

A step feeds what the rows emitted last, then chooses and records their next elements. On a GPU nothing in it asks the
host: steps are captured in CUDA graphs, over batches and spans rounded up to few sizes. On a CPU a step is cut to the
rows and the span at hand.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from latent_grpo.config import LatentSampling
from latent_grpo.model import body, embedding_table, head_logits, lm_head
from latent_grpo.rollout.slot_cache import SlotCache
from latent_grpo.rollout.step_graphs import StepGraphs, bucket, captures
from latent_grpo.rollout.text_sampler import sample_text
from latent_grpo.rollout.trajectory import UNUSED, Rollout
from latent_kernels import latent_logprob_from_logits, latent_step_with_logits, philox_uniform

# What the rows of a batch are in: all in their latent run, all in text, or some in either.
LATENT, TEXT, MIXED = "latent", "text", "mixed"
CHECK_EVERY = 8  # captured steps between questions to the device; rows that finish meanwhile rest


@dataclass
class Slots:
    """One entry a slot; the first rows of each are the batch."""

    row: Tensor  # [S] the response, an index of the record
    stream: Tensor  # [S] of the noise
    draws: Tensor  # [S, T] float64, the uniform draws of text steps; empty for greedy text
    step: Tensor  # [S] elements emitted
    start: Tensor  # [S] first token of the prompt in the cache, after its padding
    last: Tensor  # [S] where the element emitted last is written in the cache
    in_latent: Tensor  # [S] bool
    done: Tensor  # [S] bool
    hidden: Tensor  # [S, D] of the token before the element emitted next
    embeds: Tensor  # [S, D] of the element emitted last

    def first(self, count: int) -> Slots:
        """Views of the first slots."""
        return Slots(*(getattr(self, f.name)[:count] for f in fields(self)))

    def select(self, index: Tensor) -> Slots:
        """Copies of the slots `index`."""
        return Slots(*(getattr(self, f.name)[index] for f in fields(self)))

    def put(self, target: Tensor | slice, values: Slots) -> None:
        """Overwrite the slots `target`."""
        for field in fields(self):
            getattr(self, field.name)[target] = getattr(values, field.name)


class Record:
    """What R rows emitted in at most T steps, flat; the element behind the last takes what rows at rest emit."""

    def __init__(self, rows: int, limit: int, width: int, device: torch.device) -> None:
        self.rows, self.limit = rows, limit
        self.token = torch.zeros(rows * limit + 1, dtype=torch.int64, device=device)
        self.ids = torch.zeros(rows * limit + 1, width, dtype=torch.int64, device=device)
        self.scores = torch.zeros(rows * limit + 1, width, device=device)
        self.logprob = torch.zeros(rows * limit + 1, device=device)
        self.length = torch.zeros(rows + 1, dtype=torch.int64, device=device)
        self.latent_length = torch.zeros(rows, dtype=torch.int64, device=device)

    def clear(self) -> None:
        """As if new."""
        for values in (self.token, self.ids, self.scores, self.logprob, self.length, self.latent_length):
            values.zero_()

    def rollout(self, prompt_ids: Tensor, prompt_mask: Tensor, index: Tensor, is_eos: Tensor, tau: float) -> Rollout:
        """The rollout, trimmed to the longest response. index [R] names the rows' prompts, is_eos [V] ends a text."""
        length = self.length[:-1]
        steps = max(1, int(length.max())) if self.rows else 1

        def rows(x: Tensor) -> Tensor:
            return x[:-1].unflatten(0, (self.rows, self.limit))[:, :steps].clone()

        place = torch.arange(steps, device=length.device)
        mask, is_latent = place < length.unsqueeze(-1), place < self.latent_length.unsqueeze(-1)
        token, ids = rows(self.token), rows(self.ids)
        text = mask & ~is_latent
        ids[text] = _hard(token[text], ids.shape[-1])
        last = (length - 1).clamp_min(0).unsqueeze(-1)
        finished = (is_eos[token.gather(1, last)] & text.gather(1, last)).squeeze(-1)
        return Rollout(
            prompt_ids=prompt_ids, prompt_mask=prompt_mask, prompt_index=index, token=token, ids=ids,
            scores=rows(self.scores).masked_fill_(~is_latent.unsqueeze(-1), 0.0), is_latent=is_latent, mask=mask,
            logprob=rows(self.logprob),
            finished=finished, tau=tau,
        )  # fmt: skip


class Decoder:
    """Slots, cache and record of rollouts of `rows` rows, at most `slots` of them at a time, of `capacity` tokens each,
    prompt included."""

    def __init__(self, model: Any, sampling: LatentSampling, rows: int, slots: int, capacity: int) -> None:
        self.sampling, self.slots = sampling, slots
        self._model = weakref.ref(model)  # a decoder that is kept for a model must not keep the model
        self.table, self.head = embedding_table(model), lm_head(model)
        device, limit = self.table.device, sampling.max_new_tokens
        self.graphs = StepGraphs(device) if captures(device, sampling) else None
        self.seed = torch.tensor(sampling.seed, device=device) if self.graphs else sampling.seed
        width = sampling.latent_top_k if sampling.latent else 2
        eos = sampling.eos_token_id if sampling.eos_token_id is not None else model.generation_config.eos_token_id
        self.is_eos = torch.zeros(len(self.head), dtype=torch.bool, device=device)
        self.is_eos[[eos] if isinstance(eos, int) else list(eos or ())] = True

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(slots, *shape, dtype=dtype, device=device)

        self.state = Slots(
            row=zeros(), stream=zeros(), draws=zeros(limit if sampling.temperature else 0, dtype=torch.float64),
            step=zeros(), start=zeros(), last=zeros(), in_latent=zeros(dtype=torch.bool),
            done=~zeros(dtype=torch.bool), hidden=zeros(self.table.shape[1], dtype=self.table.dtype),
            embeds=zeros(self.table.shape[1], dtype=self.table.dtype),
        )  # fmt: skip
        self.cache = SlotCache(model.base_model.config, slots, capacity, self.table.dtype, device)
        self.record = Record(rows, limit, width, device)

    @property
    def model(self) -> Any:
        """The model, which whoever decodes with it keeps alive."""
        return self._model()

    def start(self, seed: int) -> None:
        """Make ready for a new rollout, with noise of `seed`."""
        self.sampling = replace(self.sampling, seed=seed)
        if isinstance(self.seed, Tensor):
            self.seed.fill_(seed)
        else:
            self.seed = seed
        self.state.done.fill_(True)
        self.record.clear()

    def fill(
        self,
        first: int,
        rows: Tensor,
        streams: Tensor,
        hidden: Tensor,
        mask: Tensor,
        cache: DynamicCache,
        index: Tensor,
    ) -> None:
        """Put rows, whose prompts are computed, into the slots from `first` on, and take their first step.

        hidden [P, D], mask [P, Lp] and cache are of P prompts; row i continues prompt index[i].
        """
        count, draws = len(rows), self.state.draws.shape[1]
        new = slice(first, first + count)
        self.cache.fill(cache, mask, index, first)
        state, steps = self.state, torch.arange(draws, device=rows.device)
        state.row[new], state.stream[new], state.step[new] = rows, streams, 0
        if draws:
            drawn = philox_uniform(streams.repeat_interleave(draws), seed=self.sampling.seed, step=steps.repeat(count))
            state.draws[new] = drawn.view(count, draws)
        state.start[new], state.last[new] = (mask.shape[1] - mask.sum(-1))[index], mask.shape[1] - 1
        state.in_latent[new], state.done[new] = self.sampling.latent, False
        state.hidden[new] = hidden[index]
        part = Slots(*(getattr(state, f.name)[new] for f in fields(state)))
        self.emit(part, LATENT if self.sampling.latent else TEXT)

    def move(self, target: Tensor, source: Tensor) -> None:
        """Copy the slots `source` to the slots `target`."""
        self.cache.move(target, source, int(self.state.last[source].max()))
        self.state.put(target, self.state.select(source))

    def step(self, count: int, kind: str, furthest: int) -> None:
        """Feed what the first `count` slots emitted last, and emit their next elements; on a GPU CHECK_EVERY times.

        `furthest` is the largest place that one of them writes to.
        """
        if self.graphs is None:
            return self.exact_step(self.state.first(count), kind, furthest)
        count = min(bucket(count), self.slots)
        span = min(_span(furthest + CHECK_EVERY), self.cache.capacity)
        state = self.state.first(count)

        def step() -> None:
            self.advance(state, state.last, span)
            self.emit(state, kind)

        for _ in range(CHECK_EVERY):
            self.graphs.run((count, span, kind), step)

    def exact_step(self, state: Slots, kind: str, furthest: int) -> None:
        """A step of the rows at hand, latent and text ones apart."""
        same = bool((state.last == furthest).all())
        self.advance(state, furthest if same else state.last, furthest + 1)
        if kind != MIXED:
            return self.emit(state, kind)
        for kind, rows in ((LATENT, state.in_latent), (TEXT, ~state.in_latent)):
            index = rows.nonzero().squeeze(-1)
            part = state.select(index)
            self.emit(part, kind)
            state.put(index, part)

    def advance(self, state: Slots, place: Tensor | int, span: int) -> None:
        """Hidden states of the elements that the rows emitted last, written at `place`; none is beyond `span`."""
        mask, cache = self.cache.view(len(state.row), place, span)
        where = (state.last - state.start).unsqueeze(-1)
        state.hidden.copy_(body(self.model, state.embeds.unsqueeze(1), mask, where, cache)[:, -1])

    def emit(self, state: Slots, kind: str) -> None:
        """Choose the next element of every row of `kind` and record it; rows of another kind rest, as finished do."""
        sampling, vectors = self.sampling, state.embeds
        if kind == TEXT:
            logits = head_logits(state.hidden, self.head)
            token, latent = self.text(state, logits), torch.zeros_like(state.done)
            ids, scores, embeds = _hard(token, 2), self.record.scores.new_zeros(len(token), 2), self.table[token]
        else:
            found, logits = latent_step_with_logits(
                state.hidden, self.head, self.table, top_k=sampling.latent_top_k, top_p=sampling.latent_top_p,
                tau=sampling.tau, noise=sampling.noise, noise_scale=sampling.noise_scale, seed=self.seed,
                step=state.step, row_ids=state.stream, latent_mask=state.in_latent,
                end_token_id=sampling.end_token_id,
            )  # fmt: skip
            latent, token, scores = found.is_latent, found.top_token, found.scores
            if kind == MIXED:
                token = torch.where(state.in_latent, token, self.text(state, logits))
            column = latent.unsqueeze(-1)
            ids = torch.where(column, found.ids, _hard(token, found.ids.shape[1]))
            embeds = torch.where(column, found.embedding, self.table[token])
        logprob = latent_logprob_from_logits(logits, ids, scores, temperature=sampling.temperature or 1.0)
        active = ~state.done & state.in_latent if kind == LATENT else ~state.done
        at = torch.where(active, state.row * self.record.limit + state.step, len(self.record.token) - 1)
        self.record.token.index_copy_(0, at, token)
        self.record.logprob.index_copy_(0, at, logprob.float())
        if kind != TEXT:
            self.record.ids.index_copy_(0, at, ids)
            self.record.scores.index_copy_(0, at, scores)
        vectors.copy_(torch.where(active.unsqueeze(-1), embeds, vectors))
        # A finished row goes on writing, so that rows of one age keep one place in the cache.
        state.last.add_(active | state.done).clamp_max_(self.cache.capacity - 1)
        state.step.add_(active)
        state.done.logical_or_(active & ((self.is_eos[token] & ~latent) | (state.step >= self.record.limit)))
        if kind != TEXT:
            state.in_latent.logical_and_(latent)
            self.record.latent_length.index_add_(0, state.row, (active & latent).long())
        # A slot that is no longer in use may still name a row.
        self.record.length.index_copy_(0, torch.where(active, state.row, self.record.rows), state.step)

    def text(self, state: Slots, logits: Tensor) -> Tensor:
        """A text token a row [B]."""
        if not state.draws.shape[1]:
            return sample_text(logits, self.sampling, logits.new_empty(len(logits)))
        step = state.step.clamp_max(self.record.limit - 1).unsqueeze(-1)
        return sample_text(logits, self.sampling, state.draws.gather(1, step).squeeze(-1))


def _span(tokens: int) -> int:
    """A width of masks that holds `tokens`, one of few and a multiple of 8, which attention can read without a copy."""
    return bucket(max(tokens, 32))


_KEPT: weakref.WeakKeyDictionary[Any, tuple[Any, Decoder]] = weakref.WeakKeyDictionary()


def decoder_for(model: Any, sampling: LatentSampling, rows: int, slots: int, tokens: int) -> Decoder:
    """A decoder of at least `tokens` tokens a row: on a GPU that of the model's last rollout where it will do.

    Its graphs are worth keeping; they read the tensors that they were captured with.
    """
    if not captures(model.device, sampling):
        return Decoder(model, sampling, rows, slots, tokens)
    places = tuple(p.data_ptr() for p in model.parameters())
    key = (repr(replace(sampling, seed=0)), rows, slots, _span(tokens), places)
    kept = _KEPT.get(model)
    if kept is None or kept[0] != key:
        _KEPT.pop(model, None)  # before there are two
        kept = key, Decoder(model, sampling, rows, slots, _span(tokens))
        _KEPT[model] = kept
    decoder = kept[1]
    decoder.start(sampling.seed)
    return decoder


def _hard(token: Tensor, width: int) -> Tensor:
    """Components [B, width] of text steps."""
    return F.pad(token.unsqueeze(-1), (0, width - 1), value=UNUSED)
