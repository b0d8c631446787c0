"""Rollouts: latent and text responses of ours against `transformers`' `generate` sampling text, token for token.

Same model, same prompts, same number of rows and of new tokens; no row ends early. The times eager column is that of
`generate` over the provider's: above 1, a latent step costs less than its text step. Models have random weights;
`python -m bench.rollout --model DIR` times a trained one.

`rollout_ragged` is what dropping finished rows saves, `rollout_prefix` what sharing a prompt's prefill leaves of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from bench.harness.cases import DTYPES, Operator, Outputs, Parameters, Problem, Provider, Settings, Shape
from bench.harness.report import print_rows, write_json
from bench.harness.run import run_benchmarks
from latent_grpo import LatentSampling, generate_latent
from latent_grpo.model import load_model
from latent_grpo.rollout.trajectory import Rollout
from latent_grpo.update.replay import replay_logprob

TEMPERATURE, TOP_K, TOP_P, LATENT_TOP_K = 0.6, 30, 0.95, 10  # of the recipes
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
    """A Llama of the shape's sizes with random weights, tied embeddings, in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, heads, kv_heads, inner = MODELS[parameters["model"]]
    config = LlamaConfig(
        vocab_size=parameters["vocab"], hidden_size=parameters["hidden"], intermediate_size=inner,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=True,
        max_position_embeddings=4096, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype).eval()


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
    return compare_with_generate(make_model(parameters, device, dtype), parameters, compile)


def compare_with_generate(
    model: Any, parameters: Parameters, compile: bool, latent_top_k: int = LATENT_TOP_K
) -> Problem:
    """The problem for a model, which is left without an EOS."""
    device, dtype, rows, new = model.device, model.dtype, parameters["rows"], parameters["new"]
    model.get_input_embeddings().weight.data[END] = 0.0
    model.generation_config.eos_token_id = None
    prompts = torch.randint(1, parameters["vocab"], (rows, parameters["prompt"]), device=device)
    mask = torch.ones_like(prompts)

    def generate(**options: Any) -> Outputs:
        out: Tensor = model.generate(
            prompts, attention_mask=mask, do_sample=True, temperature=TEMPERATURE, top_k=TOP_K, top_p=TOP_P,
            max_new_tokens=new, min_new_tokens=None, eos_token_id=None, pad_token_id=0, **options,
        )  # fmt: skip
        return (torch.full((rows,), out.shape[1] - parameters["prompt"]),)

    def ours(latent: bool) -> Provider:
        sampling = LatentSampling(
            latent=latent, max_new_tokens=new, temperature=TEMPERATURE, top_p=TOP_P, top_k=TOP_K,
            latent_top_k=latent_top_k, latent_top_p=TOP_P, seed=SEED, end_token_id=END, eos_token_id=(),
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


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m bench.rollout`: a trained model; exit code 1 where a provider is wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.rollout", description="Rollouts of a trained model.")
    parser.add_argument("--model", required=True, metavar="DIR", help="a model folder")
    for name, default, text in (
        ("rows", 8, "responses at once"), ("prompt", 64, "tokens of a prompt"), ("new", 64, "new tokens"),
        ("repeats", 5, "rounds"), ("latent_top_k", LATENT_TOP_K, "components of a latent step"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    parser.add_argument("--compile", action="store_true", help="also time generate with a compiled static cache")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write environment and rows as JSON")
    options = parser.parse_args(arguments)
    model = load_model(options.model, options.dtype).eval()
    shape = Shape(Path(options.model).resolve().name, model.config.hidden_size, model.config.vocab_size, "trained")
    case = {"model": shape.name, "hidden": shape.hidden, "vocab": shape.vocab}
    case |= {name: getattr(options, name) for name in ("rows", "prompt", "new")}
    operator = Operator(
        "rollout", lambda shape, device: [case],
        lambda parameters, device, dtype, compile: compare_with_generate(
            model, parameters, compile, options.latent_top_k
        ),
        baseline="generate",
    )  # fmt: skip
    settings = Settings(
        model.device, model.dtype, repeats=options.repeats, compile=options.compile, memory=False
    )  # fmt: skip
    report = run_benchmarks([operator], [shape], settings, lambda report, rows: print_rows(Console(width=140), rows))
    if options.json is not None:
        write_json(report, options.json)
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
