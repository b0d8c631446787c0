"""`latent-grpo doctor`: what this machine and a model can do, checked and not assumed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from latent_grpo.commands.memory_plan import GIB
from latent_grpo.commands.options import Parser, parse_config, require_given
from latent_grpo.config import LatentSampling
from latent_grpo.model import (
    embedding_table,
    encode_prompts,
    end_marker_ids,
    eos_ids,
    lm_head,
    load_model,
    load_tokenizer,
)
from latent_grpo.rollout.generate import generate_latent
from latent_grpo.update.replay import replay_logprob

PARITY_BOUND = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}


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


def doctor_parser(prog: str, plan: bool = False) -> Parser:
    """Flags of `doctor`; with `plan` without those that are then of train."""
    about = (
        "Check the environment and, with --model, a model. With --plan: what training it takes of memory; further "
        "flags are then those of train (--config F, --generation_batch_size N, ...), and no weights are read."
    )
    parser = Parser(prog=prog, description=about, allow_abbrev=False)
    parser.add_argument("--model", default=None, help="model folder or Hub name to check")
    parser.add_argument("--plan", action="store_true", help="predict the memory of training instead of checking")
    if not plan:
        parser.add_argument("--end_marker", default="</think>", help="text whose first token ends a latent run")
        parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="precision")
    return parser


def command_doctor(prog: str, argv: Sequence[str]) -> int:
    """Environment, Triton and GPU, end marker, train/rollout parity, memory estimate."""
    plan = "--plan" in argv
    parser = doctor_parser(prog, plan)
    if plan:
        args, rest = parser.parse_known_args(argv)
        from latent_grpo.commands.memory_plan import show_plan
        from latent_grpo.config import LatentGRPOConfig

        config = parse_config(prog, LatentGRPOConfig, parser.description or "", rest)
        path = args.model or config.model_name_or_path
        require_given(prog, model=path)
        return show_plan(path, config)
    args = parser.parse_args(argv)
    from latent_grpo.commands.doctor import doctor

    return doctor(args.model, args.end_marker, args.dtype)
