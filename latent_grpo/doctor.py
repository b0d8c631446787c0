"""`latent-grpo doctor`: what this machine and a model can do, checked and not assumed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from latent_grpo.config import LatentGRPOConfig, LatentSampling
from latent_grpo.generation import generate_latent
from latent_grpo.loss import replay_logprob
from latent_grpo.model import (
    embedding_table,
    encode_prompts,
    end_marker_ids,
    eos_ids,
    lm_head,
    load_model,
    load_tokenizer,
)
from latent_grpo.planner import DEFAULT_PROMPT_LENGTH, make_plan, read_model_size

PARITY_BOUND = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}
GIB = 2**30


def doctor(model_path: str | None, end_marker: str, dtype: str) -> int:
    """Print a table of checks; 0 if all passed, 1 if one failed."""
    checks = environment()
    if model_path:
        checks += model_checks(model_path, end_marker, dtype)
    table = Table(title="latent-grpo doctor")
    for column in ("check", "result", ""):
        table.add_column(column)
    for name, result, passed in checks:
        table.add_row(name, result, "[green]ok[/]" if passed else "[red]failed[/]")
    Console().print(table)
    return 0 if all(passed for *_, passed in checks) else 1


def show_plan(path: str, args: LatentGRPOConfig) -> int:
    """Print what training with these options takes of memory, by phase and part; 1 where it does not fit, else 0."""
    device = "cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu"
    size = read_model_size(path, args)
    plan = make_plan(size, args, device)
    table = Table(title=f"Memory of training {path}: {size.parameters / 1e6:.0f}M parameters, {args.dtype}")
    for column in ("GiB", "rollout", "update"):
        table.add_column(column, justify="left" if column == "GiB" else "right")
    for part in dict.fromkeys([*plan.rollout, *plan.update]):
        table.add_row(part, *(f"{x[part] / GIB:.2f}" if part in x else "-" for x in (plan.rollout, plan.update)))
    table.add_section()
    table.add_row("together", *(f"{sum(phase.values()) / GIB:.2f}" for phase in (plan.rollout, plan.update)))
    Console().print(table)
    print(
        f"{args.generation_batch_size} responses a rollout, {args.per_device_train_batch_size} in a pass, prompts of "
        f"{args.max_prompt_length or DEFAULT_PROMPT_LENGTH} and responses of {args.max_completion_length} tokens"
    )
    if device == "cpu":
        return 0
    free = torch.cuda.mem_get_info()[0]
    print(f"free on {torch.cuda.get_device_name()}: {free / GIB:.2f} GiB")
    return 0 if plan.peak <= free else 1


def environment() -> list[tuple[str, str, bool]]:
    """Versions and devices."""
    rows = [("Python", platform.python_version(), True)]
    for package in ("torch", "transformers", "datasets", "triton"):
        try:
            rows.append((package, importlib.metadata.version(package), True))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "not installed", package == "triton"))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else f"none; {torch.get_num_threads()} CPU threads"
    return [*rows, ("GPU", gpu, True)]


def model_checks(path: str, end_marker: str, dtype: str) -> list[tuple[str, str, bool]]:
    """Compatibility (checked while loading), end marker, parity of a sampled trajectory with its replay, memory."""
    tokenizer = load_tokenizer(path)
    ids = end_marker_ids(tokenizer, end_marker)
    model = load_model(path, dtype)
    spelled = " ".join(repr(tokenizer.decode([i])) for i in ids)
    gap = parity(model, tokenizer, ids[0])
    parameters = sum(p.numel() for p in model.parameters())
    vocab, width = lm_head(model).shape
    tied = lm_head(model).data_ptr() == embedding_table(model).data_ptr()
    return [
        (
            "model",
            f"{type(model).__name__}, {parameters / 1e6:.0f}M, V {vocab}, D {width}, {'tied' if tied else 'untied'}",
            True,
        ),
        ("end marker", f"{end_marker!r} = {spelled}; a latent run ends at id {ids[0]}", True),
        ("rollout/replay gap", f"{gap:.1e} (bound {PARITY_BOUND[dtype]:g})", gap <= PARITY_BOUND[dtype]),
        ("training memory", f"{training_bytes(model) / GIB:.2f} GiB of parameters, gradients and AdamW state", True),
    ]


def parity(model: Any, tokenizer: Any, end_id: int) -> float:
    """Largest |log-prob sampled - log-prob replayed| over a few short responses."""
    prompts = encode_prompts(tokenizer, ["What is 12 + 30?", "A longer question: what is 7 times 6?"], model.device)
    sampling = LatentSampling(
        latent_top_k=min(10, len(lm_head(model))),
        max_new_tokens=8,
        end_token_id=end_id,
        eos_token_id=eos_ids(model, tokenizer),
    )
    rollout = generate_latent(model, *prompts, sampling, num_generations=2)
    with torch.no_grad():
        return float((replay_logprob(model, rollout, sampling.temperature) - rollout.logprob).abs().max())


def training_bytes(model: Any) -> int:
    """Parameters, and gradient and two AdamW moments of all but the frozen embedding table."""
    table = embedding_table(model)
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = total - table.numel() * table.element_size()
    return total + 3 * trained
