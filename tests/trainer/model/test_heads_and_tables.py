"""Heads and tables as models have them: sampled, replayed and independent log-probs are the same numbers."""

from __future__ import annotations

import pytest
import torch
from support.models import ARCHITECTURES, independent_logprob, prompts, tiny

from latent_grpo import LatentSampling, generate_latent
from latent_grpo.model import embed, embedding_scale, head_logits, head_of
from latent_grpo.update.replay import replay_logprob

EXACT = 1e-4  # nats between log-probs of the same steps


@pytest.mark.parametrize("latent", [True, False], ids=["latent", "text"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_sampled_replayed_and_independent_log_probs_agree(kind: str, latent: bool) -> None:
    model = tiny(kind)
    sampling = LatentSampling(
        latent=latent,
        latent_top_k=4,
        max_new_tokens=10,
        max_latent_steps=6,
        end_token_id=3,
        eos_token_id=(2,),
        temperature=0.7,
    )
    rollout = generate_latent(model, *prompts(), sampling, num_generations=2)
    assert bool(rollout.is_latent.any()) == latent
    with torch.no_grad():
        replayed = replay_logprob(model, rollout, 0.7)
        for row in range(len(rollout.token)):
            own = independent_logprob(model, rollout, row, 0.7)
            assert float((rollout.logprob[row, : len(own)] - own).abs().max()) < EXACT
            assert float((replayed[row, : len(own)] - own).abs().max()) < EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_token_is_fed_with_the_bits_of_the_models_own_module(kind: str, dtype: torch.dtype) -> None:
    model, ids = tiny(kind, dtype=dtype), torch.arange(48)
    assert torch.equal(embed(model, ids), model.get_input_embeddings()(ids))
    if not kind.startswith("gemma"):  # by its version, transformers scales the embeddings of Gemma and Gemma 2 later
        assert (embedding_scale(model) != 1.0) == (kind == "biogpt")


@pytest.mark.parametrize(
    ("kind", "scale", "softcap", "biased"),
    [
        ("gemma", 1.0, None, False),
        ("gemma2", 1.0, 4.0, False),
        ("gemma3_text", 1.0, 4.0, False),
        ("cohere", 0.25, None, False),
        ("cohere2", 0.25, None, False),
        ("granite", 1 / 3, None, False),
        ("phi", 1.0, None, True),
        ("gptj", 1.0, None, True),
        ("llama", 1.0, None, False),
        ("llama_bias", 1.0, None, True),
    ],
)
def test_a_head_has_the_numbers_of_its_model(kind: str, scale: float, softcap: float | None, biased: bool) -> None:
    model = tiny(kind)
    head = head_of(model)
    assert head.logit_scale == pytest.approx(scale, rel=1e-7)
    assert (head.softcap, head.bias is not None) == (softcap, biased)
    assert head.weight is model.get_output_embeddings().weight


def test_hidden_states_that_are_scaled_before_a_biased_head_are_scaled_here() -> None:
    model = tiny("llama_bias")
    model.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0] / 7.0,))
    ids = prompts()[0][:1]
    hidden = model.model(input_ids=ids).last_hidden_state[0]
    torch.testing.assert_close(head_logits(hidden, head_of(model)), model(input_ids=ids).logits[0])
    assert head_of(model).logit_scale == 1 / 7.0
    head = head_of(model)  # a decoder that is kept for the next rollout keeps its head
    with torch.no_grad():
        model.lm_head.bias.add_(torch.arange(48))
        torch.testing.assert_close(head_logits(hidden, head), model(input_ids=ids).logits[0])


def test_a_head_follows_the_parameters_of_its_model() -> None:
    model = tiny("llama_bias")
    before = head_of(model).bias
    with torch.no_grad():
        model.lm_head.bias.add_(1.0)
    assert head_of(model).bias is before
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(48))
    assert head_of(model).bias is model.lm_head.bias
