"""One decoding step of a batch of rows, and the record of what the rows emit.

A step feeds the elements that the rows emitted last, then chooses and records their next elements. An element is a
latent mixture or a text token. On a GPU, steps are captured in CUDA graphs: nothing in a step waits for the host, and
batch sizes and spans are rounded up to few sizes. On a CPU, a step has exactly the rows and the span that it needs.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from latent_grpo.config import LatentSampling
from latent_grpo.model import backbone, body, embedding_scale, embedding_table, eos_ids, head_of
from latent_grpo.rollout.slot_cache import SlotCache
from latent_grpo.rollout.step_graphs import StepGraphs, bucket, captures
from latent_grpo.rollout.trajectory import Rollout
from latent_kernels import LatentStepOptions, decoding_step, philox_uniform

CHECK_EVERY = 8  # captured steps between checks for finished rows, each of which synchronises with the device


@dataclass
class Slots:
    """The state of S slots, each of which holds one row. The batch is the first slots."""

    row: Tensor  # [S] int64, index of the response in the record
    stream: Tensor  # [S] int64, noise stream
    draws: Tensor  # [S, T] float64, uniform draws of the text steps; [S, 0] where a step needs none
    step: Tensor  # [S] int64, number of emitted elements
    start: Tensor  # [S] int64, cache position of the prompt's first token, behind its padding
    last: Tensor  # [S] int64, cache position that the last emitted element is written to
    in_latent: Tensor  # [S] bool
    done: Tensor  # [S] bool
    hidden: Tensor  # [S, D], hidden state that predicts the next element
    embeds: Tensor  # [S, D], embedding of the last emitted element

    def first(self, count: int) -> Slots:
        """Return views of the first slots."""
        return self.select(slice(count))

    def select(self, index: Tensor | slice) -> Slots:
        """Return the slots `index`: views for a slice, copies for a tensor."""
        return Slots(*(getattr(self, name)[index] for name in SLOT_FIELDS))

    def put(self, target: Tensor | slice, values: Slots) -> None:
        """Overwrite the slots `target`."""
        for name in SLOT_FIELDS:
            getattr(self, name)[target] = getattr(values, name)


SLOT_FIELDS = tuple(field.name for field in fields(Slots))


class Record:
    """Everything that R rows emit in at most T steps of K components.

    The tensors are flat [R * T + 1, ...] so that one index per row addresses an element. Idle rows write into the last
    element, which is never read: a captured step must write something for every row of the batch.
    """

    def __init__(self, rows: int, limit: int, components: int, device: torch.device) -> None:
        self.rows, self.limit = rows, limit
        self.token = torch.zeros(rows * limit + 1, dtype=torch.int64, device=device)
        self.ids = torch.zeros(rows * limit + 1, components, dtype=torch.int64, device=device)
        self.scores = torch.zeros(rows * limit + 1, components, device=device)
        self.logprob = torch.zeros(rows * limit + 1, device=device)
        self.length = torch.zeros(rows + 1, dtype=torch.int64, device=device)
        self.latent_length = torch.zeros(rows, dtype=torch.int64, device=device)

    def clear(self) -> None:
        """Zero everything, for a new rollout."""
        for values in (self.token, self.ids, self.scores, self.logprob, self.length, self.latent_length):
            values.zero_()

    def rollout(self, prompt_ids: Tensor, prompt_mask: Tensor, index: Tensor, is_eos: Tensor, tau: float) -> Rollout:
        """Return copies of the record as a rollout, cut to the longest response.

        index [R] is the prompt of each row, is_eos [V] marks the tokens that end a text.
        """
        length = self.length[:-1]
        steps = max(1, int(length.max())) if self.rows else 1

        def rows(values: Tensor) -> Tensor:
            return values[:-1].unflatten(0, (self.rows, self.limit))[:, :steps].clone()

        step = torch.arange(steps, device=length.device)
        mask, is_latent = step < length.unsqueeze(-1), step < self.latent_length.unsqueeze(-1)
        token, text = rows(self.token), mask & ~is_latent
        last = (length - 1).clamp_min(0).unsqueeze(-1)
        finished = (is_eos[token.gather(1, last)] & text.gather(1, last)).squeeze(-1)
        return Rollout(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            prompt_index=index,
            token=token,
            ids=rows(self.ids),
            scores=rows(self.scores),
            is_latent=is_latent,
            mask=mask,
            logprob=rows(self.logprob),
            finished=finished,
            tau=tau,
        )


class Decoder:
    """The slots, the cache and the record of rollouts of `rows` rows.

    At most `slots` rows are decoded at a time. `capacity` is the number of tokens of a row, prompt included.
    """

    def __init__(self, model: Any, sampling: LatentSampling, rows: int, slots: int, capacity: int) -> None:
        self.sampling, self.slots = sampling, slots
        self._model = weakref.ref(model)  # `_KEPT` holds decoders, and a strong reference would keep the model alive
        self.table, self.scale, self.head = embedding_table(model), embedding_scale(model), head_of(model)
        device, limit = self.table.device, sampling.max_new_tokens
        self.graphs = StepGraphs(device) if captures(device, sampling) else None
        # A captured step reads the seed from the device, so that another rollout can change it.
        self.seed = torch.tensor(sampling.seed, device=device) if self.graphs else sampling.seed
        # Text needs two components: the token, and an UNUSED_ID that marks the step as text.
        components = sampling.latent_top_k if sampling.latent else 2
        eos = eos_ids(model) if sampling.eos_token_id is None else sampling.eos_token_id
        self.is_eos = torch.zeros(len(self.head.weight), dtype=torch.bool, device=device)
        self.is_eos[[eos] if isinstance(eos, int) else list(eos)] = True

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(slots, *shape, dtype=dtype, device=device)

        width, dtype = self.table.shape[1], self.table.dtype
        self.state = Slots(
            row=zeros(),
            stream=zeros(),
            # A kernel draws for itself. For PyTorch on a CPU, all draws of a row at once cost as much as one.
            draws=zeros(limit if sampling.temperature and self.graphs is None else 0, dtype=torch.float64),
            step=zeros(),
            start=zeros(),
            last=zeros(),
            in_latent=zeros(dtype=torch.bool),
            done=~zeros(dtype=torch.bool),
            hidden=zeros(width, dtype=dtype),
            embeds=zeros(width, dtype=dtype),
        )
        self.cache = SlotCache(backbone(model).config, slots, capacity, dtype, device)
        self.record = Record(rows, limit, components, device)

    @property
    def model(self) -> Any:
        """The model. The caller that decodes with it keeps it alive."""
        return self._model()

    def start(self, seed: int) -> None:
        """Prepare for a new rollout with noise of `seed`."""
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
        """Put rows with prefilled prompts into the slots from `first` on, and emit their first elements.

        Args:
            first: the first slot.
            rows: [N], indices of the rows in the record.
            streams: [N], their noise streams.
            hidden: [P, D], the hidden state of each prompt's last token.
            mask: [P, Lp], the attention mask of the prompts.
            cache: the key-value cache of the P prompts.
            index: [N], the prompt of each row.
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
        self.emit(state.select(new))

    def move(self, target: Tensor, source: Tensor) -> None:
        """Copy the slots `source` to the slots `target`."""
        self.cache.move(target, source, int(self.state.last[source].max()))
        self.state.put(target, self.state.select(source))

    def step(self, count: int, furthest: int) -> None:
        """Feed the last elements of the first `count` slots, and emit their next elements.

        On a GPU this takes CHECK_EVERY steps. `furthest` is the largest cache position that a row writes to in the
        first of them.
        """
        if self.graphs is None:
            return self.exact_step(self.state.first(count), furthest)
        count = min(bucket(count), self.slots)
        span = min(_span(furthest + CHECK_EVERY), self.cache.capacity)
        state = self.state.first(count)

        def step() -> None:
            self.advance(state, state.last, span)
            self.emit(state)

        for _ in range(CHECK_EVERY):
            self.graphs.run((count, span), step)

    def exact_step(self, state: Slots, furthest: int) -> None:
        """Take one step of exactly these rows."""
        # With one cache position for all rows, the cache is written through slices and needs no index tensors.
        same = bool((state.last == furthest).all())
        self.advance(state, furthest if same else state.last, furthest + 1)
        self.emit(state)

    def advance(self, state: Slots, cache_position: Tensor | int, span: int) -> None:
        """Compute the hidden states behind the last emitted elements, and write the elements into the cache.

        `cache_position` [B], or one for all rows, is where they are written. All positions are below `span`.
        """
        mask, cache = self.cache.view(len(state.row), cache_position, span)
        position_ids = (state.last - state.start).unsqueeze(-1)
        state.hidden.copy_(body(self.model, state.embeds.unsqueeze(1), mask, position_ids, cache)[:, -1])

    def emit(self, state: Slots) -> None:
        """Choose and record the next element of every unfinished row."""
        sampling, record = self.sampling, self.record
        step = decoding_step(
            state.hidden,
            self.head.weight,
            self.table,
            self.step_options(state),
            temperature=sampling.temperature,
            text_top_k=sampling.top_k,
            text_top_p=sampling.top_p,
            uniform=self.uniform(state),
            **self.head.options(),
        )
        embeds = step.embedding if self.scale == 1.0 else step.embedding * self.scale
        active = ~state.done
        index = torch.where(active, state.row * record.limit + state.step, len(record.token) - 1)
        for values, of_step in (
            (record.token, step.token),
            (record.ids, step.ids),
            (record.scores, step.scores),
            (record.logprob, step.logprob),
        ):
            values.index_copy_(0, index, of_step)
        # In place, here and below: a captured step works on the same tensors in every replay.
        state.embeds.copy_(torch.where(active.unsqueeze(-1), embeds, state.embeds))
        # The cache position of finished rows advances too. So rows that started together share one position, and
        # `exact_step` can write them with one slice.
        state.last.add_(1).clamp_max_(self.cache.capacity - 1)
        state.step.add_(active)
        state.done.logical_or_((self.is_eos[step.token] & ~step.is_latent) | (state.step >= record.limit))
        if sampling.latent:
            state.in_latent.logical_and_(step.is_latent)
            record.latent_length.index_add_(0, state.row, (active & step.is_latent).long())
        # A slot that is no longer in use may still name a row, whose length it must not overwrite.
        record.length.index_copy_(0, torch.where(active, state.row, record.rows), state.step)

    def step_options(self, state: Slots) -> LatentStepOptions:
        """Return the options of the rows' next latent step. No row takes one if all is text."""
        sampling = self.sampling
        rows = LatentStepOptions(
            top_k=self.record.ids.shape[1],
            noise="none",
            seed=self.seed,
            step=state.step,
            row_ids=state.stream,
            latent_mask=state.in_latent,
        )
        if not sampling.latent:
            return rows
        return replace(
            rows,
            top_p=sampling.latent_top_p,
            tau=sampling.tau,
            noise=sampling.noise,
            noise_scale=sampling.noise_scale,
            noise_delta=sampling.noise_delta if sampling.noise != "none" else 0.0,  # evaluation has no noise
            end_token_id=sampling.end_token_id,
            end_rule=sampling.end_rule,
            min_latent_steps=sampling.min_latent_steps,
            max_latent_steps=sampling.max_latent_steps,
            method=sampling.method,
        )

    def uniform(self, state: Slots) -> Tensor | None:
        """Return the draws of the rows' next text tokens [B], or None where a step needs none."""
        if not state.draws.shape[1]:
            return None
        # An idle row may have taken all its steps. Its token is not recorded, but its index must be in range.
        step = state.step.clamp_max(self.record.limit - 1).unsqueeze(-1)
        return state.draws.gather(1, step).squeeze(-1)


# The decoder of each model's last rollout, with a key of everything that its graphs depend on.
_KEPT: weakref.WeakKeyDictionary[Any, tuple[Any, Decoder]] = weakref.WeakKeyDictionary()


def decoder_for(model: Any, sampling: LatentSampling, rows: int, slots: int, tokens: int) -> Decoder:
    """Return a decoder for rows of `tokens` tokens, ready for a new rollout.

    On a GPU this is the decoder of the model's last rollout if that one fits, because its captured graphs are worth
    keeping. The graphs read the tensors that they were captured with, so the key holds the addresses of the weights.
    """
    if not captures(model.device, sampling):
        return Decoder(model, sampling, rows, slots, tokens)
    addresses = tuple(parameter.data_ptr() for parameter in model.parameters())
    key = (repr(replace(sampling, seed=0)), rows, slots, _span(tokens), addresses)
    kept = _KEPT.get(model)
    if kept is None or kept[0] != key:
        _KEPT.pop(model, None)  # free its memory before the next decoder takes as much
        kept = key, Decoder(model, sampling, rows, slots, _span(tokens))
        _KEPT[model] = kept
    decoder = kept[1]
    decoder.start(sampling.seed)
    return decoder


def _span(tokens: int) -> int:
    """Round `tokens` up to one of a few widths of the mask, so that few CUDA graphs are captured."""
    # From 32 on, every bucket is a multiple of 8, which attention can read without a copy.
    return bucket(max(tokens, 32))
