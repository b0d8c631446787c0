"""Rollouts: our latent and text responses against text sampled by `generate` of transformers, token for token.

All providers have the same model, prompts, number of rows and number of new tokens. No row ends early. The column
`times eager` is the time of `generate` over the time of the provider: above 1, a step costs less than a text step of
`generate`. Models have random weights; `python -m bench.rollout --model DIR` times a trained one.
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

from bench.harness.cases import DTYPES, Operator, Outputs, Parameters, Problem, Provider, Shape
from bench.harness.report import print_rows, write_json
from bench.harness.run import Settings, run_benchmarks
from latent_grpo import LatentSampling, generate_latent
from latent_grpo.model import load_model
from latent_grpo.rollout.trajectory import Rollout
from latent_grpo.update.replay import replay_logprob

TEMPERATURE, TOP_K, TOP_P, LATENT_TOP_K = 0.6, 30, 0.95, 10  # of the recipes
SEED = 0
END = 0  # the end marker; no row emits it, because its head row is zero and the highest other logit is positive
LOGPROB_GAP = {torch.float32: 1e-4, torch.bfloat16: 0.25, torch.float16: 0.05}  # to the replay, mean over steps

# Layers, heads, key-value heads, inner width. Hidden width and vocabulary are those of the shape.
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
    """Return the sizes that suit the device if the shape is that of a model, otherwise no case."""
    if shape.name not in MODELS:
        return []
    sizes = ON_A_GPU if device.type == "cuda" and shape.name != "tiny" else ON_A_CPU.get(shape.name, [])
    return [
        {"model": shape.name, "hidden": shape.hidden, "vocab": shape.vocab, "rows": rows, "prompt": prompt, "new": new}
        for rows, prompt, new in sizes
    ]


def make_model(parameters: Parameters, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a Llama with random weights and tied embeddings, in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, heads, kv_heads, inner = MODELS[parameters["model"]]
    config = LlamaConfig(
        vocab_size=parameters["vocab"],
        hidden_size=parameters["hidden"],
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype).eval()


def least_bytes(model: Any, parameters: Parameters) -> int:
    """Return the least bytes of all decoding steps: per step all weights once, and the cache so far.

    The tied embeddings count once, as the head.
    """
    config, new = model.config, parameters["new"]
    itemsize = model.dtype.itemsize
    weights = sum(p.numel() for p in model.parameters()) * itemsize
    # Keys and values of one token. Step t reads the cache of the prompt and of t tokens.
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize
    cached = parameters["rows"] * token * (parameters["prompt"] * new + new * (new - 1) // 2)
    return int(weights * new + cached)


def build(parameters: Parameters, device: torch.device, dtype: torch.dtype, compile: bool) -> Problem:
    """Build a case. Outputs: number of new tokens per row [rows]; for our providers also log-probs [rows, new]."""
    return compare_with_generate(make_model(parameters, device, dtype), parameters, compile)


def compare_with_generate(
    model: Any, parameters: Parameters, compile: bool, latent_top_k: int = LATENT_TOP_K
) -> Problem:
    """Build the problem for a model. The model is changed: it has no EOS afterwards and never emits END."""
    device, dtype, rows, new = model.device, model.dtype, parameters["rows"], parameters["new"]
    model.get_input_embeddings().weight.data[END] = 0.0
    model.generation_config.eos_token_id = None
    prompts = torch.randint(1, parameters["vocab"], (rows, parameters["prompt"]), device=device)
    mask = torch.ones_like(prompts)

    def generate(**options: Any) -> Outputs:
        options |= {"temperature": TEMPERATURE, "top_k": TOP_K, "top_p": TOP_P, "max_new_tokens": new}
        options |= {"min_new_tokens": None, "eos_token_id": None, "pad_token_id": 0}
        sequences: Tensor = model.generate(prompts, attention_mask=mask, do_sample=True, **options)
        return (torch.full((rows,), sequences.shape[1] - parameters["prompt"]),)

    def our_provider(latent: bool) -> Provider:
        sampling = sampling_of(latent, new, latent_top_k)

        def sample() -> Rollout:
            return generate_latent(model, prompts, mask, sampling)

        def run() -> Outputs:
            rollout = sample()
            return rollout.lengths, rollout.logprob

        def check_replay(outputs: Outputs) -> str | None:
            rollout = sample()  # the same rollout again: its noise is a function of the seed
            if not bool((rollout.is_latent == latent).all()):
                return "some steps are not of the requested kind"
            with torch.no_grad():
                gap = (replay_logprob(model, rollout, TEMPERATURE) - outputs[1]).abs().mean().item()
            if not gap <= LOGPROB_GAP[dtype]:
                return f"log-probs differ from those of the replay by {gap:.2g}, more than {LOGPROB_GAP[dtype]:g}"
            return check(outputs)

        return Provider("ours-latent" if latent else "ours-text", run, check=check_replay)

    def check(outputs: Outputs) -> str | None:
        same_length = bool((outputs[0] == new).all())
        return None if same_length else f"rows have {outputs[0].tolist()} new tokens, expected {new}"

    static = Provider("generate-static", lambda: generate(cache_implementation="static"), optional=True)
    baseline = [Provider("generate", generate), *([static] if compile else [])]
    return Problem(
        [*baseline, our_provider(latent=False), our_provider(latent=True)],
        check,
        bytes_moved=least_bytes(model, parameters),
        flops=2 * rows * new * sum(p.numel() for p in model.parameters()),
    )


def sampling_of(latent: bool, new: int, latent_top_k: int) -> LatentSampling:
    """Return the options of responses of `new` steps, all latent or all text."""
    return LatentSampling(
        latent=latent,
        max_new_tokens=new,
        temperature=TEMPERATURE,
        top_p=TOP_P,
        top_k=TOP_K,
        latent_top_k=latent_top_k,
        latent_top_p=TOP_P,
        seed=SEED,
        end_token_id=END,
        eos_token_id=(),
    )


ROLLOUT = Operator("rollout", cases, build, baseline="generate")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `python -m bench.rollout` on a trained model. Return 0, or 1 if a provider is wrong."""
    options = _parser().parse_args(arguments)
    model = load_model(options.model, options.dtype).eval()
    shape = Shape(Path(options.model).resolve().name, model.config.hidden_size, model.config.vocab_size, "trained")
    case = {"model": shape.name, "hidden": shape.hidden, "vocab": shape.vocab}
    case |= {name: getattr(options, name) for name in ("rows", "prompt", "new")}

    def build_trained(parameters: Parameters, device: torch.device, dtype: torch.dtype, compile: bool) -> Problem:
        return compare_with_generate(model, parameters, compile, options.latent_top_k)

    operator = Operator("rollout", lambda shape, device: [case], build_trained, baseline="generate")
    settings = Settings(model.device, model.dtype, repeats=options.repeats, compile=options.compile, memory=False)
    report = run_benchmarks([operator], [shape], settings, lambda report, rows: print_rows(Console(width=140), rows))
    if options.json is not None:
        write_json(report, options.json)
    return 1 if report.wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.rollout", description="Rollouts of a trained model.")
    parser.add_argument("--model", required=True, metavar="DIR", help="a model folder")
    for name, default, text in (
        ("rows", 8, "responses at once"),
        ("prompt", 64, "tokens per prompt"),
        ("new", 64, "new tokens per response"),
        ("repeats", 5, "rounds"),
        ("latent_top_k", LATENT_TOP_K, "components of a latent step"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="storage dtype (default: float32)")
    parser.add_argument("--compile", action="store_true", help="also time `generate` with a compiled static cache")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write environment and rows as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
