"""`freeze_embeddings=False` gives the embedding table its whole gradient, of the head and of the inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models import independent_logprob, prompts, tiny
from torch import Tensor

from latent_grpo import LatentGRPOConfig, LatentSampling, Rollout, generate_latent
from latent_grpo.update.loss import update_loss
from latent_grpo.update.optimizer import Updater

OTHERS = ("gemma2", "granite", "gptj", "gpt2")
KINDS = [("llama", {}), ("llama", {"tie_word_embeddings": False}), *((kind, {}) for kind in OTHERS)]


def sampled(model: Any, latent: bool) -> Rollout:
    """Return six responses, of which some contain the padding token as text and in mixtures."""
    options = dict(latent_top_k=4, max_new_tokens=9, max_latent_steps=5, end_token_id=3, eos_token_id=(2,))
    rollout = generate_latent(model, *prompts(), LatentSampling(latent=latent, **options), num_generations=2)
    text = rollout.mask & ~rollout.is_latent
    text[:, -1] = False
    row, step = (int(x) for x in text.nonzero()[-2])
    rollout.token[row, step] = rollout.ids[row, step, 0] = model.config.pad_token_id or 0
    return rollout


def expected_gradients(model: Any, rollout: Rollout, advantages: Tensor) -> dict[str, Tensor]:
    """Return the gradients of the mean over steps of -advantage * log-prob, by the model's own forward pass."""
    own = [independent_logprob(model, rollout, row, 0.6) for row in range(len(rollout.token))]
    loss = -sum((advantages[row, : len(x)] * x).sum() for row, x in enumerate(own)) / rollout.mask.sum()
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: value for name, value in zip(names, found, strict=True) if value is not None}


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("latent", [True, False], ids=["latent", "text"])
@pytest.mark.parametrize(("kind", "options"), KINDS, ids=["tied", "untied", *OTHERS])
def test_the_gradients_are_those_of_the_models_own_forward(
    kind: str, options: dict[str, Any], latent: bool, recomputed: bool
) -> None:
    model = tiny(kind, **options)
    rollout = sampled(model, latent)
    advantages = torch.randn(rollout.mask.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        own = [independent_logprob(model, rollout, row, 0.6) for row in range(len(rollout.token))]
    old = torch.zeros(rollout.mask.shape)
    for row, values in enumerate(own):
        old[row, : len(values)] = values
    args = LatentGRPOConfig(temperature=0.6, gradient_checkpointing=recomputed, margin_gradient="none", delta=3.0)
    Updater(model, args, 1, freeze_embeddings=False)
    # Every ratio is 1, so the clipped loss has the gradient of -advantage * log-prob.
    loss, _ = update_loss(model, rollout, old, advantages, rollout.mask, None, args, 0.0)
    loss.backward()
    expected = expected_gradients(model, rollout, advantages)
    actual = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()), msg=name)
    table = model.get_input_embeddings().weight.grad
    assert float(table[rollout.ids[rollout.is_latent] if latent else rollout.token[rollout.mask]].abs().max()) > 0


def test_a_frozen_table_keeps_a_tied_head_and_its_bias() -> None:
    tied, untied = tiny("llama_bias"), tiny("llama_bias")
    tied.lm_head.weight = tied.get_input_embeddings().weight
    for model, trained in ((tied, False), (untied, True)):
        Updater(model, LatentGRPOConfig(), 1, freeze_embeddings=True)
        assert not model.get_input_embeddings().weight.requires_grad
        assert model.lm_head.weight.requires_grad == model.lm_head.bias.requires_grad == trained
