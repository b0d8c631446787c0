"""What configurations tell: layers that are refused, and lengths."""

from __future__ import annotations

import warnings

import pytest
from transformers import CONFIG_MAPPING, AutoConfig

from latent_grpo.architecture import (
    _WARNED,
    check_architecture,
    check_context,
    check_length,
    check_own_masks,
    check_prompt_lengths,
)
from latent_grpo.errors import DataError, ModelError
from latent_grpo.prompts import PromptFormat

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 48,
    "short_factor": [1.0] * 48,
    "long_factor": [2.0] * 48,
}
# Versions of transformers describe these layers in different words.
STATE = "recurrent|linear_attention|mamba|hybrid"
HYBRIDS = (
    "mamba",
    "mamba2",
    "falcon_mamba",
    "rwkv",
    "recurrent_gemma",
    "jamba",
    "bamba",
    "zamba",
    "falcon_h1",
    "granitemoehybrid",
    "qwen3_next",
    "minimax",
)
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


def config(kind, **options):
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {kind}")
    return AutoConfig.for_model(kind, **options)


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        *((kind, {}, STATE) for kind in HYBRIDS),
        ("lfm2", {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}, "conv"),
        ("deepseek_v32", {}, "indexed_attention"),
        ("bloom", {}, "ALiBi"),
        ("falcon", {"alibi": True}, "ALiBi"),
        ("t5", {}, "encoder and a decoder"),
        ("bart", {}, "encoder and a decoder"),
    ],
)
def test_layers_that_rows_of_unequal_length_cannot_share_are_refused(kind, options, named):
    with pytest.raises(ModelError, match=named) as refusal:
        check_architecture(config(kind, **options))
    assert "\n" not in str(refusal.value)
    assert kind in str(refusal.value)
    assert "use a decoder" in str(refusal.value)


@pytest.mark.parametrize(
    "kind", ["llama", "qwen3", "gemma2", "gemma3_text", "gpt2", "deepseek_v3", "gpt_oss", "falcon"]
)
def test_attention_with_keys_and_values_is_accepted(kind):
    check_architecture(config(kind))


@pytest.mark.parametrize(
    ("kind", "options", "limit", "named"),
    [
        ("gpt2", {"n_positions": 48}, 48, "table of position embeddings"),
        ("opt", {"max_position_embeddings": 48}, 48, "table of position embeddings"),
        ("gptj", {"n_positions": 48}, 48, "table of position embeddings"),
        ("mpt", {"max_seq_len": 48}, 48, "table of position embeddings"),
        ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 48}, 48, "longrope"),
        ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 48}, 48, "dynamic"),
        ("llama4_text", {"attention_chunk_size": 48}, 48, "chunks"),
        ("llama4_text", {"floor_scale": 49}, 48, "scaled by places"),
        ("gpt_neo", {"window_size": 48}, 48, "local layers"),
    ],
)
def test_lengths_are_refused_from_where_a_row_depends_on_others(kind, options, limit, named):
    given = config(kind, **options)
    check_length(given, limit)
    with pytest.raises(ModelError, match=named) as refusal:
        check_length(given, limit + 1)
    assert f"{limit + 1} tokens" in str(refusal.value)
    assert "shorten" in str(refusal.value)


def test_untrained_rotary_positions_are_warned_of_once():
    given = config("llama", max_position_embeddings=48)
    _WARNED.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_length(given, 48)
        assert not caught
        check_length(given, 49)
        check_length(given, 60)
    assert [str(w.message) for w in caught] == [
        "prompt and response have up to 49 tokens, but max_position_embeddings of the model is 48: positions beyond it "
        "are untrained"
    ]


def test_masks_of_encode_need_layers_that_see_all_tokens():
    check_own_masks(config("llama"), 10_000)
    for kind, name in (
        ("mistral", "sliding_window"),
        ("gemma2", "sliding_window"),
        ("llama4_text", "attention_chunk_size"),
    ):
        given = config(kind, **{name: 48})
        check_own_masks(given, 48)
        with pytest.raises(ModelError, match=rf"49 tokens.*see 48 \({name}\)"):
            check_own_masks(given, 49)


def test_prompts_are_measured_only_for_models_with_a_limit(tokenizer):
    rows, shape = [{"prompt": "1 + 2"}, {"prompt": "1 + 2 + 3 + 4"}], PromptFormat()
    longest = max(map(len, shape.ids(tokenizer, [row["prompt"] for row in rows])))
    limited = config("gpt2", n_positions=longest + 8)
    check_prompt_lengths(limited, tokenizer, rows, shape, 8)
    with pytest.raises(ModelError, match=f"up to {longest + 9} tokens"):
        check_prompt_lengths(limited, tokenizer, rows, shape, 9)
    check_prompt_lengths(config("llama", max_position_embeddings=4), None, rows, shape, 9)


def test_a_prompt_beyond_the_context_is_refused_with_its_row() -> None:
    llama = config("llama", max_position_embeddings=48)
    check_context(llama, {"dataset": [3, 47], "eval_dataset": []}, None)
    with pytest.raises(DataError, match=r"^eval_dataset, row 2: the prompt has 48 tokens, .* context is 48; remove"):
        check_context(llama, {"dataset": [3], "eval_dataset": [3, 48]}, None)
    check_context(llama, {"dataset": [3, 48]}, 47)  # long_prompts says what becomes of it
