"""The page of model types that were tried, each as a tiny random model: `python docs/models.py FILE`."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from latent_grpo import LatentSampling, Rollout, generate_latent
from latent_grpo.architecture import check_architecture
from latent_grpo.decoding_proof import check_decoding
from latent_grpo.errors import ModelError
from latent_grpo.model import check_compatible
from latent_grpo.update.replay import replay_logprob

COMMAND = "python docs/models.py docs/models.md"
BOUND = 1e-4  # nats
VOCABULARY, END, EOS = 96, 7, (1, 2, 3, 4, 5, 6)
PROMPTS = (3, 9, 6)  # tokens
GENERATIONS, ROWS_AT_ONCE, STEPS, LATENT_STEPS, TEMPERATURE = 2, 4, 10, 5, 0.7
SPREAD = 0.3  # of the random weights: large, so that mistakes show
# Options by name; a configuration takes those that it has. The window is shorter than the sequences.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "sliding_window": 6,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4),
    "num_key_value_heads": 2,
    "head_dim": 12,
    **dict.fromkeys(("n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "first_k_dense_replace"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "rotary_dim": 4,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0),
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
}
# Latent attention: keys and values of different sizes.
MLA: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": 8}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 32,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
# What is tried: model types, or a type and options of a variant.
PLAIN = """
    llama mistral ministral ministral3 mixtral qwen2 qwen2_moe qwen3 qwen3_moe gemma gemma2 gemma3_text cohere cohere2
    granite granite_swa granitemoe granitemoeshared phi phi3 phimoe gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese
    gptj codegen opt mpt ctrl biogpt xglm stablelm starcoder2 olmo olmo2 olmo3 olmoe flex_olmo persimmon glm glm4
    glm4_moe gpt_oss smollm3 exaone4 exaone_moe nemotron ernie4_5 ernie4_5_moe hunyuan_v1_dense hunyuan_v1_moe apertus
    arcee aria_text bitnet cwm diffllama doge jais2 jetmoe laguna mimo_v2_flash minimax_m2 modernbert-decoder nanochat
    seed_oss solar_open vaultgemma afmoe hy_v3 hyperclovax internlm3 bloom llama4_text openai-gpt xlnet bert
    bert-generation gemma4_text bart t5 mamba falcon_mamba falcon_h1 jamba zamba
    rwkv recurrent_gemma qwen3_next qwen3_5_text minimax nemotron_h olmo_hybrid lfm3
    bailing_hybrid kimi_linear xlstm deepseek_v32 deepseek_v4 glm_moe_dsa
"""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, one key head": ("llama", {"num_key_value_heads": 1}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "llama, dynamic": ("llama", {"rope_parameters": DYNAMIC}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "mistral, long window": ("mistral", {"sliding_window": 48}),
    "qwen2, window in some layers": ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
    "phi3, longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}),
    "falcon": ("falcon", {}),
    "falcon, new decoder": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, ALiBi": ("falcon", {"alibi": True}),
    "llama, with a sliding_window": ("llama", {"sliding_window": 24}),
    "gemma3n_text": ("gemma3n_text", {"num_kv_shared_layers": 0, "layer_types": ["full_attention"] * 4}),
    "mamba2": ("mamba2", {"num_heads": 8, "head_dim": 8}),
    "bamba": ("bamba", {"mamba_n_heads": 8, "mamba_d_head": 8}),
    "granitemoehybrid": ("granitemoehybrid", {"mamba_n_heads": 8, "mamba_d_head": 8}),
    "zamba2": ("zamba2", {"num_hidden_layers": 54}),
    "lfm2_moe": ("lfm2_moe", {"layer_types": ["conv", "full_attention"] * 2}),
    "llama4_text, chunks": ("llama4_text", {"attention_chunk_size": 24}),
    "lfm2, convolutions": ("lfm2", {"layer_types": ["conv", "full_attention"] * 2}),
    "deepseek_v2": ("deepseek_v2", MLA),
    "deepseek_v3": ("deepseek_v3", MLA),
    "glm4_moe_lite": ("glm4_moe_lite", MLA),
    "minicpm3": ("minicpm3", MLA),
    "youtu": ("youtu", MLA),
    "dots1": ("dots1", {}),
    "helium": ("helium", {"head_dim": 8}),
}
MODELS = {**{kind: (kind, {}) for kind in PLAIN.split()}, **VARIANTS}


class Outcome(NamedTuple):
    """What became of a model: the largest differences in nats, or the words of the refusal."""

    replayed: float = 0.0  # between sampled and replayed log-probs
    alone: float = 0.0  # between sampled log-probs and those of the model's own forward pass over one row
    refusal: str | None = None


def tiny_config(kind: str, options: dict[str, Any]) -> Any:
    """Return a configuration of a model type with SIZES and `options`."""
    default = CONFIG_MAPPING[kind]()
    renamed = getattr(type(default), "attribute_map", {})
    own = {name for name in default.to_dict() if name not in renamed}
    return type(default)(**{**{name: value for name, value in SIZES.items() if name in own}, **options})


def tiny_model(config: Any) -> Any:
    """Return a model in float32 whose weights are all random, those of norms near what they are at the start."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(SPREAD * noise if weight.ndim > 1 else weight + 0.1 * noise)
    model.tie_weights()
    return model


def outcome(kind: str, options: dict[str, Any]) -> Outcome:
    """Return what becomes of a tiny random model of a type."""
    config = tiny_config(kind, options)
    try:
        check_architecture(config)  # before there are weights, as for a model that is loaded
        model = tiny_model(config)
        check_compatible(model)
        check_decoding(model)
    except ModelError as error:
        return Outcome(refusal=str(error))
    replayed, alone = zip(*(gaps(model, latent) for latent in (True, False)), strict=True)
    return Outcome(max(replayed), max(alone))


@torch.no_grad()
def gaps(model: Any, latent: bool) -> tuple[float, float]:
    """Return the differences of `Outcome` for responses to prompts of unequal length, of which some wait for a slot."""
    generator, width = torch.Generator().manual_seed(2), max(PROMPTS)
    mask = torch.stack([torch.arange(width) >= width - length for length in PROMPTS]).long()
    ids = torch.randint(VOCABULARY, mask.shape, generator=generator) * mask
    sampling = LatentSampling(
        latent=latent,
        latent_top_k=5,
        max_latent_steps=LATENT_STEPS,
        max_new_tokens=STEPS,
        end_token_id=END,
        eos_token_id=EOS,
        temperature=TEMPERATURE,
    )
    rollout = generate_latent(model, ids, mask, sampling, num_generations=GENERATIONS, max_rows=ROWS_AT_ONCE)
    replayed = replay_logprob(model, rollout, TEMPERATURE)
    alone = torch.stack([own_logprob(model, rollout, row, text_ids=not latent) for row in range(len(rollout.token))])
    taken = rollout.mask
    return tuple(float((other - rollout.logprob)[taken].abs().max()) for other in (replayed, alone))  # type: ignore[return-value]


def own_logprob(model: Any, rollout: Rollout, row: int, text_ids: bool) -> Tensor:
    """Return the log-probs [T] of a row: alone, not padded, without a cache, by formulas written down once more.

    text_ids: feed token ids, for a row without latent steps. Otherwise feed what the model's module makes of them.
    """
    embed, steps = model.get_input_embeddings(), int(rollout.mask[row].sum())
    prompt = rollout.prompt_ids[rollout.prompt_index[row]][rollout.prompt_mask[rollout.prompt_index[row]].bool()]
    inputs = [embed(prompt)]
    for step in range(steps):
        if rollout.is_latent[row, step]:
            weights = torch.softmax(rollout.scores[row, step] / rollout.tau, -1)
            inputs.append((weights.unsqueeze(-1) * embed(rollout.ids[row, step])).sum(0, keepdim=True))
        else:
            inputs.append(embed(rollout.token[row, step : step + 1]))
    if text_ids:
        logits = model(input_ids=torch.cat([prompt, rollout.token[row, :steps]]).unsqueeze(0), use_cache=False).logits
    else:
        logits = model(inputs_embeds=torch.cat(inputs).unsqueeze(0), use_cache=False).logits
    logprob = torch.zeros(rollout.mask.shape[1])
    for step in range(steps):
        own = logits[0, len(prompt) - 1 + step].double()
        if rollout.is_latent[row, step]:
            margin = rollout.scores[row, step] - torch.log_softmax(own, -1)[rollout.ids[row, step]]
            logprob[step] = (-margin - torch.exp(-margin)).mean()
        else:
            logprob[step] = torch.log_softmax(own / TEMPERATURE, -1)[rollout.token[row, step]]
    return logprob


def tried() -> dict[str, Outcome]:
    """Return the outcome of every model that this version of transformers has."""
    return {name: outcome(*given) for name, given in MODELS.items() if given[0] in CONFIG_MAPPING}


def page(outcomes: dict[str, Outcome]) -> str:
    """Return the page."""
    works = {name: found for name, found in outcomes.items() if found.refusal is None}
    refused = {name: found.refusal for name, found in outcomes.items() if found.refusal is not None}
    lines = [
        HEAD.format(
            command=COMMAND, version=transformers.__version__, tried=len(outcomes), works=len(works), steps=STEPS
        ),
        "| model type | replayed | alone |",
        "| --- | --- | --- |",
        *(f"| {name} | {found.replayed:.0e} | {found.alone:.0e} |" for name, found in sorted(works.items())),
        REFUSED,
        "| model type | why |",
        "| --- | --- |",
        *(f"| {name} | {escaped(words)} |" for name, words in sorted(refused.items())),
    ]
    return "\n".join([*lines, ""])


def escaped(words: str) -> str:
    """Return words for a cell of a table."""
    return words.replace("|", "\\|")


HEAD = """# Models

Written by `{command}` with transformers {version}; do not edit.

Latent steps need a decoder whose layers keep keys and values per token, and a head that ends in a product with a
matrix. A model is proved when it is loaded or given to a trainer, on a few tokens: its embeddings, its head, and
decoding in rows of unequal length. {tried} kinds of models were tried, each as a tiny random one in float32.
{works} work. The others are refused by every command, before the first step, in one line. A model that is not listed
is proved in the same way.

## Lengths

The longest prompt and the response together are bounded

- by the table, for learned position embeddings (GPT-2, OPT);
- where `rope_type` is `dynamic` or `longrope`, by the length beyond which all positions of a batch change with its
  longest row (Phi-3 with 128k: 4,096 tokens);
- by the chunk of layers that attend in chunks (Llama 4: 8,192 tokens);
- by the window of the local layers of GPT-Neo.

Beyond a bound a run is refused before its first step. Other rotary embeddings have no bound: beyond
`max_position_embeddings` there is a warning, since such positions are untrained.

## Models that work

Prompts of unequal length get responses of up to {steps} elements, in latent steps and in text. Fewer rows are decoded
at a time than there are, so rows of all ages share a batch, and some wait for a slot. Sliding windows are shorter than
the sequences. The numbers are the largest differences of log-probs in nats, between what was sampled and

- *replayed*: what the trainer computes again, with its cache of the prompts;
- *alone*: what the model's own forward pass gives, row by row, without padding and without a cache.
"""
REFUSED = """
## Models that are refused
"""


def main(argv: list[str] | None = None) -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    file = parser.parse_args(argv).file
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    file.write_text(page(tried()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded
    sys.exit(main())
