"""Small models and sampling options for tests of rollouts."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from latent_grpo import LatentSampling, generate_latent

VOCAB, END, EOS = 120, 7, tuple(range(30, 50))
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.15,
)


def make_model(kind: str):
    """Make a small model with the weights of a fixed seed: "llama-tied" or "qwen2-untied"."""
    torch.manual_seed(3)
    if kind == "qwen2-untied":
        return Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=False)).eval()
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()


def ending_early(model, prompts, **options) -> LatentSampling:
    """Return options with which some rows end their latent run early.

    The end marker is the top token of the first row at step 2 of a rollout without an early end.
    """
    base = LatentSampling(
        latent_top_k=4, max_new_tokens=10, end_token_id=END, eos_token_id=EOS, temperature=1.0, seed=5, **options
    )
    probe = generate_latent(model, *prompts, base, num_generations=4)
    return replace(base, end_token_id=int(probe.token[0, 2]))
