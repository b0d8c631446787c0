"""Rollouts: latent and text responses of ours against `transformers`' `generate` sampling text, token for token.

Same model with random weights, same prompts, same number of rows and of new tokens; no row ends early. The times eager
column is that of `generate` over the provider's: above 1, a latent step costs less than its text step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.common import Operator, Outputs, Parameters, Problem, Provider, Shape
from latent_grpo import LatentSampling, generate_latent
from latent_grpo.loss import replay_logprob
from latent_grpo.rollout import Rollout

TEMPERATURE, TOP_P, LATENT_TOP_K = 1.0, 0.95, 10
SEED = 0
END = 0  # the end marker, which no row emits: its head row is zero, and the highest of the other logits is positive
LOGPROB_GAP = {torch.float32: 1e-4, torch.bfloat16: 0.25, torch.float16: 0.05}  # to the replay, mean over the steps

# Layers, heads, key-value heads, inner width; hidden width and vocabulary are the shape's.
MODELS = {
    "tiny": (3, 4, 4, 384),
    "smollm2": (30, 9, 3, 1536),
    "llama-1b": (16, 32, 8, 8192),
    "qwen-7b": (28, 28, 4, 18944),
}
# Rows, prompt tokens, new tokens.
ON_A_CPU = {"tiny": [(64, 16, 32)], "smollm2": [(8, 64, 64)]}
ON_A_GPU = [(1, 128, 512), (32, 128, 512), (256, 128, 512)]


def cases(shape: Shape, device: torch.device) -> list[Parameters]:
    """Models small enough for the device; none for shapes that are no model's."""
    if shape.name not in MODELS:
        return []
    sizes = ON_A_GPU if device.type == "cuda" and shape.name != "tiny" else ON_A_CPU.get(shape.name, [])
    return [
        {"model": shape.name, "hidden": shape.hidden, "vocab": shape.vocab, "rows": rows, "prompt": prompt, "new": new}
        for rows, prompt, new in sizes
    ]


def make_model(parameters: Parameters, device: torch.device, dtype: torch.dtype) -> Any:
    """A Llama of the shape's sizes with random weights, tied embeddings and none for END, in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, heads, kv_heads, inner = MODELS[parameters["model"]]
    config = LlamaConfig(
        vocab_size=parameters["vocab"], hidden_size=parameters["hidden"], intermediate_size=inner,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=True,
        max_position_embeddings=4096, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype).eval()
    model.get_input_embeddings().weight.data[END] = 0.0
    return model


def least_bytes(model: Any, parameters: Parameters) -> int:
    """Bytes of all decoding steps: the weights once a step (embeddings as the head alone), and the cache so far."""
    config, new = model.config, parameters["new"]
    itemsize = model.dtype.itemsize
    weights = sum(p.numel() for p in model.parameters()) * itemsize
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize
    cached = parameters["rows"] * token * (parameters["prompt"] * new + new * (new - 1) // 2)
    return int(weights * new + cached)


def build(parameters: Parameters, device: torch.device, dtype: torch.dtype, compile: bool) -> Problem:
    """Outputs: the number of new tokens of every row [rows]; of ours also their log-probs [rows, new]."""
    model = make_model(parameters, device, dtype)
    rows, new = parameters["rows"], parameters["new"]
    prompts = torch.randint(1, parameters["vocab"], (rows, parameters["prompt"]), device=device)
    mask = torch.ones_like(prompts)

    def generate(**options: Any) -> Outputs:
        out: Tensor = model.generate(
            prompts, attention_mask=mask, do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=TOP_P,
            max_new_tokens=new, min_new_tokens=None, eos_token_id=None, pad_token_id=0, **options,
        )  # fmt: skip
        return (torch.full((rows,), out.shape[1] - parameters["prompt"]),)

    def ours(latent: bool) -> Provider:
        sampling = LatentSampling(
            latent=latent, max_new_tokens=new, temperature=TEMPERATURE, top_p=TOP_P, top_k=0,
            latent_top_k=LATENT_TOP_K, latent_top_p=TOP_P, seed=SEED, end_token_id=END, eos_token_id=(),
        )  # fmt: skip

        def sample() -> Rollout:
            return generate_latent(model, prompts, mask, sampling)

        def run() -> Outputs:
            rollout = sample()
            return rollout.lengths, rollout.logprob

        def check_replay(outputs: Outputs) -> str | None:
            rollout = sample()  # the same: its noise is that of the seed
            if not bool((rollout.is_latent == latent).all()):
                return "steps are not all of the kind asked for"
            with torch.no_grad():
                gap = (replay_logprob(model, rollout, TEMPERATURE) - outputs[1]).abs().mean().item()
            if not gap <= LOGPROB_GAP[dtype]:
                return f"log-probs are off those of the replay by {gap:.2g}, more than {LOGPROB_GAP[dtype]:g}"
            return check(outputs)

        return Provider("ours-latent" if latent else "ours-text", run, check=check_replay)

    def check(outputs: Outputs) -> str | None:
        return None if bool((outputs[0] == new).all()) else f"rows have {outputs[0].tolist()} new tokens, not {new}"

    static = Provider("generate-static", lambda: generate(cache_implementation="static"), optional=True)
    return Problem(
        [Provider("generate", generate), *([static] if compile else []), ours(latent=False), ours(latent=True)],
        check,
        least_bytes(model, parameters),
        2 * rows * new * sum(p.numel() for p in model.parameters()),
    )


ROLLOUT = Operator("rollout", cases, build, baseline="generate")
