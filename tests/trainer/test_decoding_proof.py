"""The proof that rows of unequal length are decoded as each is alone: what it accepts, and mistakes that it finds."""

from __future__ import annotations

import pytest
import torch
from support.trainers import ROWS
from transformers import AutoConfig, AutoModelForCausalLM

from latent_grpo import LatentGRPOConfig, LatentGRPOTrainer, LatentSampling, LatentSFTConfig, LatentSFTTrainer
from latent_grpo.decoding_proof import check_decoding
from latent_grpo.errors import ModelError
from latent_grpo.model import check_compatible
from latent_grpo.quickstart.toy_task import worked_examples
from latent_grpo.rollout import slot_cache
from latent_grpo.rollout.decoder import Decoder
from latent_grpo.rollout.generate import generate_latent

SIZE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def tiny(kind, dtype=torch.float32, **options):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZE, "initializer_range": 0.3, **options})
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 24}])
def test_a_model_that_is_proved_is_left_as_it_was(dtype, options):
    model = tiny("mistral", dtype, **options)
    model.train()
    model.lm_head.eval()
    state, window = torch.get_rng_state(), model.config.sliding_window
    check_decoding(model)
    assert model.training
    assert not model.lm_head.training
    assert model.config.sliding_window == window
    assert torch.equal(torch.get_rng_state(), state)


def one_more(window):
    """Return a `SlotCache.__init__` that takes windows to be one token longer than they are."""

    def init(self, config, *rest):
        window(self, config, *rest)
        self.sliding_window += 1

    return init


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_window_that_is_one_token_too_long_is_found(dtype, monkeypatch):
    monkeypatch.setattr(slot_cache.SlotCache, "__init__", one_more(slot_cache.SlotCache.__init__))
    with pytest.raises(ModelError, match="sampled, are off its own forward pass by"):
        check_decoding(tiny("mistral", dtype, sliding_window=24))


def test_positions_that_count_the_padding_are_found(monkeypatch):
    advance = Decoder.advance

    def shifted(self, state, *rest):
        start = state.start.clone()
        state.start.zero_()
        advance(self, state, *rest)
        state.start.copy_(start)

    monkeypatch.setattr(Decoder, "advance", shifted)
    with pytest.raises(ModelError, match="sampled, are off its own forward pass by"):
        check_decoding(tiny("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64))


def test_a_window_that_the_class_does_not_use_has_a_remedy():
    model = tiny("llama")
    model.config.sliding_window = 24
    with pytest.raises(ModelError, match="sliding_window 24 of its configuration, set it to null"):
        check_decoding(model)
    model.config.sliding_window = None
    check_decoding(model)


def test_what_a_class_raises_becomes_one_line(monkeypatch):
    model = tiny("llama")
    check_compatible(model)

    def fails(*_, **__):
        raise RuntimeError("sizes do not match\nsecond line")

    monkeypatch.setattr(Decoder, "advance", fails)
    with pytest.raises(ModelError) as refusal:
        check_decoding(model)
    assert "sizes do not match" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        ("bloom", {"n_layer": 2, "n_head": 4}, "ALiBi"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "'conv'"),
        ("rwkv", {"attention_hidden_size": 32}, "recurrent"),
    ],
)
def test_objects_are_refused_by_every_way_in(kind, options, named, tokenizer, tmp_path):
    model = tiny(kind, **{**options, "vocab_size": len(tokenizer)})
    prompt = torch.ones(1, 3, dtype=torch.int64)
    grpo = LatentGRPOConfig(
        output_dir=str(tmp_path / "grpo"), generation_batch_size=8, num_generations=4, latent_top_k=2
    )
    sft = LatentSFTConfig(output_dir=str(tmp_path / "sft"))
    for way_in in (
        lambda: LatentGRPOTrainer(model, "accuracy", grpo, ROWS, None, tokenizer),
        lambda: LatentSFTTrainer(model, sft, worked_examples(ROWS[:4], seed=0), tokenizer),
        lambda: generate_latent(model, prompt, prompt, LatentSampling(latent=False, eos_token_id=1)),
    ):
        with pytest.raises(ModelError, match=named):
            way_in()


@pytest.mark.parametrize(
    ("kind", "options", "numbers"),
    [
        ("llama", {}, 2 * 2 * 2 * 8),  # layers, keys and values, heads, head size
        ("llama", {"num_key_value_heads": 1, "head_dim": 20}, 2 * 2 * 20),
        ("gpt_bigcode", {"n_embd": 32, "n_layer": 2, "n_head": 4, "multi_query": True}, 2 * 2 * 8),
        (
            "deepseek_v3",  # four heads, with keys of 12 + 8 and values of 10
            {
                "num_key_value_heads": 4,
                "q_lora_rank": 16,
                "kv_lora_rank": 16,
                "qk_nope_head_dim": 12,
                "qk_rope_head_dim": 8,
                "v_head_dim": 10,
                "first_k_dense_replace": 2,
            },
            2 * 4 * (20 + 10),  # or, in newer versions of transformers, what these are computed from
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_of_a_cache_is_what_the_model_keeps(kind, options, numbers, dtype):
    model = tiny(kind, dtype, **options)
    kept = slot_cache.token_bytes(model) // dtype.itemsize
    assert kept == numbers or (kind, kept) == ("deepseek_v3", 2 * (16 + 8))
    bytes_of_ten = 10 * kept * dtype.itemsize
    assert slot_cache.rows_within(3.5 * bytes_of_ten / 2**30, model, 10) == 3
    with pytest.raises(ModelError, match="raise rollout_memory"):
        slot_cache.rows_within(0.5 * bytes_of_ten / 2**30, model, 10)
