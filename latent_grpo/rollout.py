"""Sampling of responses: a latent run, the end marker, the visible answer, EOS; and the record that training replays.

Prompts are prefilled once and their cache repeated for the rollouts of a group. Noise and text draws come from row
streams (seed, step, row), so a row's trajectory does not depend on the batch it ran in. Finished rows leave the batch
once a quarter of it is idle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from latent_grpo.config import LatentSampling
from latent_grpo.model import body, embedding_table, head_logits, lm_head, positions
from latent_kernels import latent_logprob_from_logits, latent_step_from_logits, philox_uniform

UNUSED = -100
COMPACT_BELOW = 0.75  # live share of the batch under which finished rows are dropped from it


@dataclass
class Rollout:
    """Responses of R rows to P prompts, T steps at most, K components a step. All on one device."""

    prompt_ids: Tensor  # [P, Lp] left-padded
    prompt_mask: Tensor  # [P, Lp]
    prompt_index: Tensor  # [R] the row's prompt
    token: Tensor  # [R, T] emitted id; on a latent step the highest raw logit's
    ids: Tensor  # [R, T, K]; a text step holds its token and -100
    scores: Tensor  # [R, T, K] float32
    is_latent: Tensor  # [R, T] bool
    mask: Tensor  # [R, T] bool, steps of the response, EOS included
    logprob: Tensor  # [R, T] float32 when sampled
    finished: Tensor  # [R] bool, EOS before the limit
    tau: float  # temperature of the mixture weights

    def select(self, rows: Tensor) -> Rollout:
        """A part of the rows, with only their prompts, padding trimmed."""
        prompts, index = self.prompt_index[rows].unique(return_inverse=True)
        prompt_mask = self.prompt_mask[prompts]
        left = prompt_mask.shape[1] - int(prompt_mask.sum(-1).max())
        steps = max(1, int(self.mask[rows].sum(-1).max()))
        part = {
            name: getattr(self, name)[rows, :steps]
            for name in ("token", "ids", "scores", "is_latent", "mask", "logprob")
        }
        return Rollout(
            prompt_ids=self.prompt_ids[prompts, left:], prompt_mask=prompt_mask[:, left:], prompt_index=index,
            finished=self.finished[rows], tau=self.tau, **part,
        )  # fmt: skip

    @property
    def latent_steps(self) -> Tensor:
        """Latent steps of every response [R]."""
        return self.is_latent.sum(-1)

    @property
    def lengths(self) -> Tensor:
        """Steps of every response [R]."""
        return self.mask.sum(-1)


def concatenate(rollouts: list[Rollout]) -> Rollout:
    """One rollout of several, prompts left-padded and responses right-padded to the longest."""
    prompt_width = max(r.prompt_ids.shape[1] for r in rollouts)
    steps = max(r.mask.shape[1] for r in rollouts)

    def left(x: Tensor) -> Tensor:
        return F.pad(x, (prompt_width - x.shape[1], 0))

    def right(x: Tensor, value: float) -> Tensor:
        return F.pad(x, (0, 0) * (x.ndim - 2) + (0, steps - x.shape[1]), value=value)

    offsets = torch.tensor([0, *(len(r.prompt_ids) for r in rollouts)]).cumsum(0).tolist()
    return Rollout(
        prompt_ids=torch.cat([left(r.prompt_ids) for r in rollouts]),
        prompt_mask=torch.cat([left(r.prompt_mask) for r in rollouts]),
        prompt_index=torch.cat([r.prompt_index + offset for r, offset in zip(rollouts, offsets, strict=False)]),
        token=torch.cat([right(r.token, 0) for r in rollouts]),
        ids=torch.cat([right(r.ids, 0) for r in rollouts]),
        scores=torch.cat([right(r.scores, 0) for r in rollouts]),
        is_latent=torch.cat([right(r.is_latent, False) for r in rollouts]),
        mask=torch.cat([right(r.mask, False) for r in rollouts]),
        logprob=torch.cat([right(r.logprob, 0) for r in rollouts]),
        finished=torch.cat([r.finished for r in rollouts]),
        tau=rollouts[0].tau,
    )


def sample_text(logits: Tensor, sampling: LatentSampling, row_ids: Tensor, step: int) -> Tensor:
    """One token a row [B] from float32 logits [B, V]: temperature, then top-k, then top-p; greedy at temperature 0.

    By inverting the distribution function at the row stream's uniform draw, so one draw a row whatever the vocabulary.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    count = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    best, ids = logits.topk(count, dim=-1)
    probs = (best / sampling.temperature).softmax(-1, dtype=torch.float64)
    mass = probs.cumsum(-1)
    probs = probs.masked_fill(mass - probs >= sampling.top_p, 0.0)
    mass = probs.cumsum(-1)
    draw = philox_uniform(row_ids, seed=sampling.seed, step=step).unsqueeze(-1) * mass[:, -1:]
    place = torch.searchsorted(mass, draw, right=True).clamp_max(count - 1)
    # A draw that rounds onto the last candidate's mass must not fall on one that the nucleus removed.
    place = torch.minimum(place, (probs > 0).sum(-1, keepdim=True) - 1)
    return ids.gather(-1, place).squeeze(-1)


@torch.no_grad()
def generate_latent(
    model: Any,
    input_ids: Tensor,  # [P, Lp], left-padded
    attention_mask: Tensor,  # [P, Lp]
    sampling: LatentSampling,
    *,
    num_generations: int = 1,
    row_ids: Tensor | None = None,
) -> Rollout:
    """Sample `num_generations` responses to every prompt (SPEC 2 and 3), with `model` in evaluation mode.

    Rows are ordered prompt by prompt. row_ids [P * num_generations] int64 names their noise streams (default arange).
    Raises ValueError where a latent response is asked for without `sampling.end_token_id`.
    """
    if sampling.latent and sampling.end_token_id is None:
        raise ValueError("latent sampling needs end_token_id: the first id of the end marker, see end_marker_ids")
    was_training = model.training
    model.eval()
    run = _Run(model, input_ids, attention_mask, sampling, num_generations, row_ids)
    for step in range(sampling.max_new_tokens):
        embeds = run.emit(step)
        if step + 1 == sampling.max_new_tokens or not run.live():
            break
        run.advance(embeds)
    model.train(was_training)
    return run.result()


class _Run:
    """State of one decoding loop. `rows` are the rows still in the batch; outputs are indexed by the original row."""

    def __init__(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        sampling: LatentSampling,
        repeats: int,
        row_ids: Any,
    ) -> None:
        device = input_ids.device
        self.model, self.sampling = model, sampling
        self.table, self.head = embedding_table(model), lm_head(model)
        eos = sampling.eos_token_id if sampling.eos_token_id is not None else model.generation_config.eos_token_id
        self.eos = torch.tensor([eos] if isinstance(eos, int) else list(eos or ()), device=device)
        count, limit, width = len(input_ids) * repeats, sampling.max_new_tokens, max(2, sampling.latent_top_k)
        self.rows = torch.arange(count, device=device)
        self.row_ids = self.rows if row_ids is None else row_ids
        self.in_latent = torch.full((count,), sampling.latent, device=device)
        self.done = torch.zeros(count, dtype=torch.bool, device=device)
        self.out = Rollout(
            prompt_ids=input_ids,
            prompt_mask=attention_mask,
            prompt_index=self.rows // repeats,
            token=torch.zeros(count, limit, dtype=torch.int64, device=device),
            ids=torch.zeros(count, limit, width, dtype=torch.int64, device=device),
            scores=torch.zeros(count, limit, width, device=device),
            is_latent=torch.zeros(count, limit, dtype=torch.bool, device=device),
            mask=torch.zeros(count, limit, dtype=torch.bool, device=device),
            logprob=torch.zeros(count, limit, device=device),
            finished=torch.zeros(count, dtype=torch.bool, device=device),
            tau=1.0 if sampling.noise == "none" else sampling.tau,
        )
        self.cache = DynamicCache(config=model.config)
        where = positions(attention_mask)
        self.hidden = body(model, self.table[input_ids], attention_mask, where, self.cache)[:, -1]
        self.mask, self.position = attention_mask, where[:, -1]
        if repeats > 1:
            self.keep_prompts(self.out.prompt_index)

    def keep_prompts(self, index: Tensor) -> None:
        """Make row i of the batch what row index[i] is now."""
        self.cache.batch_select_indices(index)
        self.hidden, self.mask, self.position = self.hidden[index], self.mask[index], self.position[index]

    def emit(self, step: int) -> Tensor:
        """Choose every row's next element, record it, and return its embedding [B, D]."""
        sampling = self.sampling
        logits = head_logits(self.hidden, self.head)
        width = self.out.ids.shape[-1]
        ids = torch.full((len(self.rows), width), UNUSED, device=logits.device)
        scores = torch.zeros(ids.shape, device=logits.device)
        token = torch.zeros_like(self.rows)
        embeds = torch.empty(len(self.rows), self.table.shape[1], dtype=self.table.dtype, device=logits.device)
        latent = torch.zeros_like(self.in_latent)
        running = self.in_latent.nonzero().squeeze(-1)
        if len(running):
            found = latent_step_from_logits(
                logits[running], self.table, top_k=sampling.latent_top_k, top_p=sampling.latent_top_p, tau=sampling.tau,
                noise=sampling.noise, noise_scale=sampling.noise_scale, seed=sampling.seed, step=step,
                row_ids=self.row_ids[running], end_token_id=sampling.end_token_id,
            )  # fmt: skip
            ids[running], scores[running] = found.ids, found.scores
            embeds[running], token[running], latent[running] = found.embedding, found.top_token, found.is_latent
            self.in_latent = latent
        text = (~latent).nonzero().squeeze(-1)
        if len(text):
            drawn = sample_text(logits[text], sampling, self.row_ids[text], step)
            # A row that ends its latent run emits the end marker, which its highest logit is.
            ended = torch.isin(text, running)
            token[text] = torch.where(ended, token[text], drawn)
            ids[text] = F.pad(token[text].unsqueeze(-1), (0, width - 1), value=UNUSED)
            scores[text], embeds[text] = 0.0, self.table[token[text]]
        logprob = latent_logprob_from_logits(logits, ids, scores, temperature=sampling.temperature or 1.0)
        self.record(step, token, ids, scores, latent, logprob)
        return embeds

    def record(self, step: int, token: Tensor, ids: Tensor, scores: Tensor, latent: Tensor, logprob: Tensor) -> None:
        """Write one step of the rows that were still going."""
        going = (~self.done).nonzero().squeeze(-1)
        rows, out = self.rows[going], self.out
        out.token[rows, step], out.ids[rows, step], out.scores[rows, step] = token[going], ids[going], scores[going]
        out.is_latent[rows, step], out.mask[rows, step] = latent[going], True
        out.logprob[rows, step] = logprob[going].float()
        ended = ~latent & ~self.done & torch.isin(token, self.eos)
        out.finished[self.rows[ended]] = True
        self.done = self.done | ended

    def live(self) -> bool:
        """Whether any row is still going."""
        return not bool(self.done.all())

    def advance(self, embeds: Tensor) -> None:
        """Feed the embeddings [B, D] of the rows that are still going (of all rows while few have finished)."""
        going = (~self.done).nonzero().squeeze(-1)
        if len(going) < COMPACT_BELOW * len(self.rows):
            self.keep_prompts(going)
            embeds, self.rows, self.row_ids = embeds[going], self.rows[going], self.row_ids[going]
            self.in_latent, self.done = self.in_latent[going], self.done[going]
        self.mask = F.pad(self.mask, (0, 1), value=1)
        self.position = self.position + 1
        self.hidden = body(self.model, embeds.unsqueeze(1), self.mask, self.position.unsqueeze(-1), self.cache)[:, -1]

    def result(self) -> Rollout:
        """The record, trimmed to the longest response."""
        return self.out.select(torch.arange(len(self.out.mask), device=self.out.mask.device))


def visible_text(tokenizer: Any, rollout: Rollout, end_marker: str) -> list[str]:
    """The text of every response: its text tokens, and in latent mode only what follows the end marker."""
    texts = []
    for token, latent, mask in zip(
        rollout.token.tolist(), rollout.is_latent.tolist(), rollout.mask.tolist(), strict=True
    ):
        hard = [t for t, is_latent, used in zip(token, latent, mask, strict=True) if used and not is_latent]
        text = tokenizer.decode(hard, skip_special_tokens=False)
        if any(latent):
            text = text.split(end_marker, 1)[-1]
        for special in (tokenizer.eos_token, tokenizer.pad_token):
            text = text.replace(special, "") if special else text
        texts.append(text.strip())
    return texts


def mixture_entropy(rollout: Rollout) -> Tensor:
    """Entropy of every step's mixture weights [R, T] in nats; 0 on text steps."""
    weights = (rollout.scores / rollout.tau).softmax(-1)
    entropy = -(weights * weights.clamp_min(1e-30).log()).sum(-1)
    return torch.where(rollout.is_latent, entropy, 0.0)
