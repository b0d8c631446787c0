"""The record of sampled responses that rewards, metrics and training read."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


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
        # Two steps at least, where there are: ranks replay in step, and one step alone needs no second forward pass.
        steps = min(self.mask.shape[1], max(2, int(self.mask[rows].sum(-1).max())))
        part = {
            name: getattr(self, name)[rows, :steps]
            for name in ("token", "ids", "scores", "is_latent", "mask", "logprob")
        }
        return Rollout(
            prompt_ids=self.prompt_ids[prompts, left:], prompt_mask=prompt_mask[:, left:], prompt_index=index,
            finished=self.finished[rows], tau=self.tau, **part,
        )  # fmt: skip

    def to(self, device: torch.device | str) -> Rollout:
        """The same on `device`."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "tau"}
        return Rollout(**moved, tau=self.tau)

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
