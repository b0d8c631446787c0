"""One small call of every operator, by name, for the rules that all operators follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import latent_kernels as kernels


class Call(NamedTuple):
    """An operator with arguments that it accepts, and the names of those that are differentiable."""

    operator: Callable[..., Any]
    arguments: dict[str, Any]
    differentiable: tuple[str, ...]


def leaves(result: Any) -> list[Tensor]:
    """Return the tensors of a result."""
    return [result] if isinstance(result, Tensor) else [leaf for part in result for leaf in leaves(part)]


def calls() -> dict[str, Call]:
    """Return a call of every operator with every tensor that it takes. All of them are new."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows, vocab, width, components = 3, 20, 6, 3
    ids = torch.tensor([[4, -100, -100], [1, 2, 3], [9, 9, 0]])
    scores = draw(rows, components)
    hidden, head, bias, table = draw(rows, width), draw(vocab, width), draw(vocab), draw(vocab, 5)
    step = dict(embedding=table, top_k=components, top_p=torch.full((rows,), 0.9), tau=torch.full((rows,), 0.8))
    step |= dict(noise_scale=torch.full((rows,), 0.7), exponential=draw(rows, vocab).exp())
    step |= dict(latent_mask=torch.ones(rows, dtype=torch.bool), row_ids=torch.arange(rows))
    text = dict(latent_mask=torch.tensor([True, False, True]), temperature=0.7, text_top_k=5, text_top_p=0.9)
    text |= dict(uniform=torch.full((rows,), 0.3, dtype=torch.float64))
    logprob = dict(ids=ids, scores=scores, advantages=draw(rows), temperature=0.7)
    loss = dict(old_logprob=draw(1, rows), advantages=draw(1, rows), mask=torch.ones(1, rows))
    loss |= dict(ref_logprob=draw(1, rows), kl_coef=0.1)
    group = dict(rewards=draw(rows), group_ids=torch.zeros(rows, dtype=torch.int64), mean_logprob=draw(rows))
    group |= dict(invalid_mask=torch.tensor([False, False, True]))
    noise = dict(noise_scale=torch.full((rows,), 0.7), exponential=draw(rows, vocab).exp(), row_ids=torch.arange(rows))
    projected = dict(hidden=hidden, weight=head, bias=bias)
    of_head = dict(hidden=hidden, lm_head=head, bias=bias)
    wide = dict(hidden=hidden[None], lm_head=head, bias=bias, ids=ids[None], scores=scores[None])
    mix = dict(ids=ids, scores=scores, embedding=table, tau=torch.full((rows,), 0.8))
    return {
        "latent_step": Call(kernels.latent_step, of_head | step, ()),
        "latent_step_from_logits": Call(kernels.latent_step_from_logits, dict(logits=draw(rows, vocab)) | step, ()),
        "latent_step_with_logits": Call(kernels.latent_step_with_logits, of_head | step, ()),
        "decoding_step": Call(kernels.decoding_step, of_head | step | text, ()),
        "mix_embeddings": Call(kernels.mix_embeddings, mix, ("scores", "embedding")),
        "latent_logprob": Call(kernels.latent_logprob, of_head | logprob, ("hidden", "lm_head", "bias")),
        "latent_logprob_from_logits": Call(
            kernels.latent_logprob_from_logits, dict(logits=draw(rows, vocab)) | logprob, ("logits",)
        ),
        "group_advantages": Call(kernels.group_advantages, group, ()),
        "policy_loss": Call(kernels.policy_loss, dict(logprob=draw(1, rows)) | loss, ("logprob",)),
        "fused_policy_loss": Call(kernels.fused_policy_loss, wide | loss, ("hidden", "lm_head", "bias")),
        "project_with_noise": Call(kernels.project_with_noise, projected | noise, ("hidden", "weight", "bias")),
        "philox_uniform": Call(kernels.philox_uniform, dict(row_ids=torch.arange(rows), seed=1, step=2), ()),
    }


NAMES = tuple(calls())
