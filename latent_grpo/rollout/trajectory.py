"""The record of sampled responses, which rewards, metrics and training read."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Rollout:
    """R responses to P prompts, of at most T steps with K components each. All tensors are on one device.

    A latent step is the mixture of the embeddings of `ids` with the weights softmax(scores / tau) (Eq. 1).
    """

    prompt_ids: Tensor  # [P, Lp] int64, left-padded
    prompt_mask: Tensor  # [P, Lp], 0 on padding
    prompt_index: Tensor  # [R] int64, the prompt of each row
    token: Tensor  # [R, T] int64; the emitted token, or the token of the highest raw logit for a latent step
    ids: Tensor  # [R, T, K] int64; a text step has its token, then -100
    scores: Tensor  # [R, T, K] float32; 0 for text steps
    is_latent: Tensor  # [R, T] bool
    mask: Tensor  # [R, T] bool, steps of the response, EOS included
    logprob: Tensor  # [R, T] float32, at sampling time
    finished: Tensor  # [R] bool, True if EOS came before the limit
    tau: float  # temperature of the mixture weights

    def select(self, rows: Tensor) -> Rollout:
        """Return the rows with these indices [r], with only their prompts and without padding that all share."""
        prompts, index = self.prompt_index[rows].unique(return_inverse=True)
        prompt_mask = self.prompt_mask[prompts]
        left = prompt_mask.shape[1] - int(prompt_mask.sum(-1).max())
        # Keep two steps, if the batch has two, although these responses may have one. The replay of a single step takes
        # one forward pass, but ranks with longer rows would wait in the collectives of a second pass.
        steps = min(self.mask.shape[1], max(2, int(self.mask[rows].sum(-1).max())))
        names = ("token", "ids", "scores", "is_latent", "mask", "logprob")
        return Rollout(
            prompt_ids=self.prompt_ids[prompts, left:],
            prompt_mask=prompt_mask[:, left:],
            prompt_index=index,
            finished=self.finished[rows],
            tau=self.tau,
            **{name: getattr(self, name)[rows, :steps] for name in names},
        )

    def to(self, device: torch.device | str) -> Rollout:
        """Return a copy on `device`."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "tau"}
        return Rollout(**moved, tau=self.tau)

    @property
    def latent_steps(self) -> Tensor:
        """The number of latent steps of each response [R]."""
        return self.is_latent.sum(-1)

    @property
    def lengths(self) -> Tensor:
        """The number of steps of each response [R]."""
        return self.mask.sum(-1)


def concatenate(rollouts: list[Rollout]) -> Rollout:
    """Join rollouts with one tau. Prompts are left-padded and responses right-padded to the longest."""
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


def visible_text(tokenizer: Any, rollout: Rollout, end_marker: str) -> list[str]:
    """Return the visible text of each response: what follows the end marker of its latent run, without special tokens.

    The run may have no latent step: a marker that begins the response leaves the text too. A text response, whose chain
    stands before the marker, keeps both, as TRL's completions do. So does a latent response that never writes the whole
    marker. The token that ends a response is no part of the text, whether it is a special token or not.
    """
    marker = tokenizer.encode(end_marker, add_special_tokens=False)
    texts = []
    columns = (rollout.token, rollout.is_latent, rollout.mask, rollout.finished)
    for token, latent, mask, finished in zip(*(column.tolist() for column in columns), strict=True):
        ids = [t for t, is_latent, used in zip(token, latent, mask, strict=True) if used and not is_latent]
        ids = ids[:-1] if finished else ids
        span = marker_span(tokenizer, ids, end_marker, marker)
        if span is not None and (any(latent) or not tokenizer.decode(ids[: span[0]]).strip()):
            texts.append(text_behind(tokenizer, ids, span, end_marker).strip())
        else:
            texts.append(text_with_marker(tokenizer, ids, end_marker, marker).strip())
    return texts


def marker_span(tokenizer: Any, ids: list[int], end_marker: str, marker: list[int]) -> tuple[int, int] | None:
    """Return where the first whole end marker stands among `ids`: its first token, and the one behind its last.

    marker: the ids of the end marker. Other tokens may spell it, as one that holds its last letter and a line break.
    None: it does not occur.
    """
    for start in range(len(ids) - len(marker) + 1):
        if marker and ids[start : start + len(marker)] == marker:
            return start, start + len(marker)
    words = end_marker.strip() or end_marker

    def holds(part: list[int]) -> bool:
        return words in tokenizer.decode(part, skip_special_tokens=False)

    if not words or not holds(ids):
        return None
    # A longer part holds whatever a shorter one holds, so both ends can be found by bisection.
    end = bisect_left(range(len(ids)), True, key=lambda n: holds(ids[:n]))
    return bisect_left(range(end), True, key=lambda n: not holds(ids[n:end])) - 1, end


def text_behind(tokenizer: Any, ids: list[int], span: tuple[int, int], end_marker: str) -> str:
    """Return the text of `ids` behind the end marker at `span`, without special tokens."""
    start, end = span
    rest = tokenizer.decode(ids[start:end], skip_special_tokens=False).partition(end_marker.strip() or end_marker)[2]
    # Decoded with the marker, because a tokenizer may drop the space at the start of what it decodes.
    written = tokenizer.decode(ids[start:end], skip_special_tokens=True)
    whole = tokenizer.decode(ids[start:], skip_special_tokens=True)
    behind = (
        whole[len(written) :] if whole.startswith(written) else tokenizer.decode(ids[end:], skip_special_tokens=True)
    )
    return str(rest + behind)


def text_with_marker(tokenizer: Any, ids: list[int], end_marker: str, marker: list[int]) -> str:
    """Return the text of `ids` without special tokens, except for an end marker that is one.

    Without the marker, nothing would tell reasoning from answer.
    """
    if len(marker) != 1 or tokenizer.decode(marker, skip_special_tokens=True):
        return str(tokenizer.decode(ids, skip_special_tokens=True))
    cuts = [-1, *(place for place, token in enumerate(ids) if token == marker[0]), len(ids)]
    parts = [ids[before + 1 : after] for before, after in pairwise(cuts)]
    return end_marker.join(tokenizer.decode(part, skip_special_tokens=True) for part in parts)


def latent_share(rollout: Rollout) -> Tensor:
    """Return the share of latent steps among all steps of the responses to each prompt [P] float32."""
    latent, steps = (torch.zeros(len(rollout.prompt_ids), device=rollout.mask.device) for _ in range(2))
    latent.index_add_(0, rollout.prompt_index, rollout.latent_steps.float())
    steps.index_add_(0, rollout.prompt_index, rollout.lengths.float())
    return latent / steps.clamp_min(1)


def mixture_entropy(rollout: Rollout) -> Tensor:
    """Return the entropy of each step's mixture weights [R, T] in nats; 0 for text steps.

    The weights of a repeated id, which "multiplex" may draw, are added up.
    """
    weights, ids = (rollout.scores / rollout.tau).softmax(-1), rollout.ids
    merged = torch.zeros_like(weights)
    for k in range(ids.shape[-1]):  # K passes need less memory than [R, T, K, K]
        merged += weights[..., k : k + 1] * (ids == ids[..., k : k + 1])
    entropy = -(weights * merged.clamp(1e-30, 1.0).log()).sum(-1)
    return torch.where(rollout.is_latent, entropy, 0.0)
