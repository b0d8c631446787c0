"""`latent-grpo doctor`: what this machine and a model can do, checked rather than assumed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from latent_grpo.commands.memory_plan import GIB, parameter_bytes, read_model_size, show_plan
from latent_grpo.commands.options import (
    Parser,
    add_flags_named,
    load_dataset_rows,
    parse_config,
    prompt_flags,
    prompt_options,
    require_given,
)
from latent_grpo.commands.prompt_view import show_row, spelled
from latent_grpo.config import LatentGRPOConfig, LatentSampling
from latent_grpo.decoding_proof import check_decoding
from latent_grpo.errors import ModelError
from latent_grpo.model import (
    check_vocabulary,
    choose_device,
    choose_dtype,
    embedding_table,
    end_marker_ids,
    eos_ids,
    lm_head,
    load_model,
    load_tokenizer,
    precision_line,
)
from latent_grpo.prompts import PromptFormat, encode_prompts, resolve_format
from latent_grpo.rollout.generate import generate_latent
from latent_grpo.update.replay import replay_logprob
from latent_grpo.watching.environment import environment, package_version

QUESTION = "What is 12 + 30?"  # shown where no data is given
RESPONSES, LIMIT = 8, 128  # sampled to see whether they end, and their longest length
PARITY_BOUND = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}


def doctor(args: argparse.Namespace) -> int:
    """Print a prompt as the model gets it, and a table of checks. Return 0 if all passed, 1 if one failed."""
    checks = environment_checks()
    console = Console()
    if args.model:
        tokenizer = load_tokenizer(args.model)
        prompt_format = resolve_format(prompt_options(args), args.model)
        rows = load_dataset_rows(args, args.data, args.dataset_split, None) if args.data else [{"prompt": QUESTION}]
        print(precision_line(args.model, args.dtype, None))
        dtype = choose_dtype(args.dtype, choose_device(None))
        checks += model_checks(args.model, tokenizer, prompt_format, dtype, rows)
        show_row(console, tokenizer, prompt_format, rows[0])
    table = Table(title="latent-grpo doctor")
    for column in ("check", "result", ""):
        table.add_column(column)
    for name, result, passed in checks:
        table.add_row(name, result, "[green]ok[/]" if passed else "[red]failed[/]")
    console.print(table)
    return 0 if all(passed for *_, passed in checks) else 1


def environment_checks() -> list[tuple[str, str, bool]]:
    """Return versions and devices, a row each."""
    on_gpu = torch.cuda.is_available()
    here = environment("cuda" if on_gpu else "cpu")
    rows = [("Python", here["python"], True)]
    for package in ("torch", "transformers", "datasets", "triton"):
        version = package_version(package)
        rows.append((package, version or "not installed", version is not None or package == "triton"))
    return [*rows, ("GPU", here["device"] if on_gpu else f"none; {here['threads']} CPU threads", True)]


def model_checks(
    path: str, tokenizer: Any, prompt_format: PromptFormat, dtype: str, data: list[Any]
) -> list[tuple[str, str, bool]]:
    """Check compatibility (while loading), vocabulary, end marker, and parity of a trajectory with its replay."""
    ids = end_marker_ids(tokenizer, prompt_format.end_marker)
    model = load_model(path, dtype)
    check_decoding(model)
    check_vocabulary(model, tokenizer, prompt_format, True, data)
    gap = parity(model, tokenizer, prompt_format, ids[0])
    parameters = sum(p.numel() for p in model.parameters())
    vocab, width = lm_head(model).shape
    tied = lm_head(model).data_ptr() == embedding_table(model).data_ptr()
    return [
        (
            "model",
            f"{type(model).__name__}, {parameters / 1e6:.0f}M, V {vocab}, D {width}, {'tied' if tied else 'untied'}",
            True,
        ),
        (
            "end marker",
            f"{prompt_format.end_marker!r} = {spelled(tokenizer, ids)}; a latent run ends at id {ids[0]}",
            True,
        ),
        ("rollout/replay gap", f"{gap:.1e} (bound {PARITY_BOUND[dtype]:g})", gap <= PARITY_BOUND[dtype]),
        ("responses that end", ending(model, tokenizer, prompt_format, ids[0], data), True),
        ("training memory", training_memory(path, dtype), True),
    ]


def parity(model: Any, tokenizer: Any, prompt_format: PromptFormat, end_id: int) -> float:
    """Return the largest |log-prob sampled - log-prob replayed| over a few short responses."""
    questions = [QUESTION, "A longer question: what is 7 times 6?"]
    prompts = encode_prompts(tokenizer, questions, model.device, prompt_format=prompt_format)
    sampling = LatentSampling(
        latent_top_k=min(10, len(lm_head(model))),
        max_new_tokens=8,
        end_token_id=end_id,
        eos_token_id=eos_ids(model, tokenizer),
    )
    rollout = generate_latent(model, *prompts, sampling, num_generations=2)
    with torch.no_grad():
        return float((replay_logprob(model, rollout, sampling.temperature) - rollout.logprob).abs().max())


def ending(model: Any, tokenizer: Any, prompt_format: PromptFormat, end_id: int, rows: list[Any]) -> str:
    """Return in words how many of RESPONSES sampled responses, to as many prompts if there are so many, end."""
    prompts = [row["prompt"] for row in rows[:RESPONSES]] if len(rows) >= RESPONSES else [rows[0]["prompt"]]
    ids, mask = encode_prompts(tokenizer, prompts, model.device, prompt_format=prompt_format)
    room = getattr(model.config, "max_position_embeddings", None) or LIMIT + ids.shape[1]
    limit = max(2, min(LIMIT, room - ids.shape[1]))
    sampling = LatentSampling(
        latent_top_k=min(10, len(lm_head(model))),
        max_new_tokens=limit,
        end_token_id=end_id,
        eos_token_id=eos_ids(model, tokenizer),
    )
    rollout = generate_latent(model, ids, mask, sampling, num_generations=RESPONSES // len(prompts))
    ended, runs = int(rollout.finished.sum()), int((rollout.mask & ~rollout.is_latent).any(-1).sum())
    text = f"{ended} of {RESPONSES} within {limit} steps; {runs} latent runs end"
    return text if ended else f"{text}: train a warm start (sft), or raise max_completion_length"


def training_memory(path: str, dtype: str) -> str:
    """Return the bytes of parameters, gradients and optimizer state while training, in words."""
    args = LatentGRPOConfig(dtype=dtype)  # type: ignore[arg-type]
    try:
        parts = parameter_bytes(read_model_size(path, args), args)
    except ModelError as error:
        return str(error)
    return f"{sum(parts.values()) / GIB:.2f} GiB of {', '.join(parts)}"


def doctor_parser(prog: str, plan: bool = False) -> Parser:
    """Return the parser of `doctor`. With `plan` it leaves out the flags that `train` has too."""
    about = (
        "Check the environment and, with --model, a model and how prompts are put to it. With --plan: predict the "
        "memory of training. Further flags are then those of train (--config F, --generation_batch_size N, ...); no "
        "weights are read then."
    )
    parser = Parser(prog=prog, description=about)
    parser.add_argument("--model", metavar="STR", help="Model folder or Hub name to check.")
    parser.add_argument("--plan", action="store_true", help="Predict the memory of training instead of checking.")
    if not plan:
        parser.add_argument("--data", metavar="SOURCE", help="Data whose prompts are checked; the first one is shown.")
        add_flags_named(parser, ("dtype", "dataset_split", "prompt_column", "answer_column", "chain_column"))
        prompt_flags(parser)
    return parser


def run(prog: str, argv: Sequence[str]) -> int:
    """Check the environment and a model, or predict the memory of training."""
    plan = "--plan" in argv
    parser = doctor_parser(prog, plan)
    if not plan:
        args = parser.parse_args(argv)
        return doctor(args)
    args, rest = parser.parse_known_args(argv)
    config = parse_config(prog, LatentGRPOConfig, parser.description or "", rest)
    path = args.model or config.model_name_or_path
    require_given(model=path)
    return show_plan(path, config)
