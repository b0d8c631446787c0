"""`latent-grpo eval`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from latent_grpo.commands.from_run import require_model
from latent_grpo.commands.options import (
    LIMIT_FLAG,
    Parser,
    add_flags_named,
    complete_sampling,
    load_for_sampling,
    prompt_options,
    require_sources,
    sampling_flags,
    source_of,
)
from latent_grpo.config import LatentSampling, PromptOptions
from latent_grpo.errors import ConfigError, require

if TYPE_CHECKING:  # they import torch
    from latent_grpo.data.benchmarks import ReleasedRuns
    from latent_grpo.evaluation.protocol import Setting
    from latent_grpo.prompts import PromptFormat

COLUMNS = ("prompt_column", "answer_column", "chain_column")
SOURCES = (
    "Benchmarks by name (gsm8k-aug, gsm-hard, svamp, multiarith, math-500, aime24, aime25, gpqa-diamond), "
    "low-difficulty or high-difficulty (the first or last four of them), JSON, JSONL or Parquet files, Hub names. "
    "gsm8k=FILE takes a file for a benchmark; any LABEL=SOURCE names a row of the table."
)
GREEDY, RELEASED = "greedy", "released"
PROTOCOL = (
    "greedy: Pass@1 and lengths of one noise-free, greedy response, pass@k of samples under noise. released: as the "
    "released scripts, 5 runs on each low-difficulty benchmark, 4 on math-500, 64 on aime24 and aime25, 8 on "
    "gpqa-diamond, each with one sampled response per problem, and means over the runs. Run r of benchmark b has the "
    "seed SEED + 100000 b + r. Where not given, it takes noise none, end_rule noisy, top_k 0 and seed 12345, and the "
    f"benchmark sets {LIMIT_FLAG} (128 or 4096), length_of and, if the model has none, the prompt format. "
    "[default: greedy]"
)
VARIED = ("max_new_tokens", "noise_scale")  # sampling options that data sets or the parts of a sweep have of their own
# What flags are where they are not given, by protocol.
DEFAULTS: dict[str, dict[str, Any]] = {
    GREEDY: {name: getattr(LatentSampling(), name) for name in ("noise", "end_rule", "top_k", "seed")},
    RELEASED: {"noise": "none", "end_rule": "noisy", "top_k": 0, "seed": 12345},
}


def eval_parser(prog: str) -> Parser:
    """Return the parser of `eval`."""
    about = (
        "Evaluate a model: Pass@1, pass@k, reasoning steps and response length, with 95% bootstrap intervals. "
        "Under torchrun the problems are split over the ranks; the results are those of one process."
    )
    # "resolve", so that --noise_scale may be added again: it takes several values here.
    parser = Parser(prog=prog, description=about, conflict_handler="resolve")
    sampling_flags(parser)
    data = parser.add_argument_group("What is evaluated")
    data.add_argument("--data", nargs="+", required=True, metavar="SOURCE", help=SOURCES)
    data.add_argument("--split", default="test", help="Split of Hub data sets that are no benchmarks. [default: test]")
    data.add_argument("--limit", type=int, help="Use only the first rows of each data set.")
    add_flags_named(data, (*COLUMNS, "max_prompt_length", "long_prompts"))
    protocol_flags(parser.add_argument_group("How it is evaluated"))
    parser.set_defaults(**dict.fromkeys(("end_rule", "top_k", "seed", LIMIT_FLAG)))  # None: not given
    return parser


def protocol_flags(tries: Any) -> None:
    """Add the flags of the protocol to a group."""
    tries.add_argument("--protocol", choices=(GREEDY, RELEASED), default=GREEDY, help=PROTOCOL)
    tries.add_argument(
        "--runs", type=int, help="Runs on each data set, in place of their number in the released scripts."
    )
    tries.add_argument(
        "--noise",
        choices=("one_sided", "two_sided", "none"),
        help="Noise of latent steps where a response is sampled. [default: one_sided; with protocol released none]",
    )
    scale = "Factor on the noise. Several values make a sweep, with one table and one figure. [0 or more; default: 1.0]"
    tries.add_argument("--noise_scale", nargs="+", type=float, default=[1.0], metavar="FLOAT", help=scale)
    tries.add_argument(
        "--pass-at",
        "--pass_at",
        help="Comma-separated k, as 1,8,32. [default: 1; with protocol released 1,4,8,16,32,64 up to the runs]",
    )
    tries.add_argument(
        "--num_samples",
        type=int,
        help="Sampled responses per problem for pass@k. [default: the largest k, or none where that is 1]",
    )
    tries.add_argument(
        "--length_of",
        choices=("all", "finished"),
        help="Whose lengths are averaged: all responses, or those that end before the limit. [default: all; with "
        "protocol released finished on low-difficulty benchmarks]",
    )
    tries.add_argument("--batch_size", type=int, default=64, help="Responses decoded together. [default: 64]")
    tries.add_argument("--out", help="Write OUT.json (with every response), OUT.md and, with samples, OUT.svg.")


def run(prog: str, argv: Sequence[str]) -> int:
    """Evaluate a model on benchmarks by name, files or Hub data."""
    args = eval_parser(prog).parse_args(argv)
    complete_sampling(args)
    check(args)
    require_model(args.model)
    require_sources(*map(source_of, args.data))
    from latent_grpo.parallel.process_group import process_group

    with process_group():
        return run_evaluation(args)


def check(args: argparse.Namespace) -> None:
    """Set the flags that the protocol sets, and read `pass_at`. Raise ConfigError for what cannot be evaluated."""
    for name, value in DEFAULTS[args.protocol].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    require(args.batch_size >= 1, "batch_size", args.batch_size, "give 1 or more")
    longest = args.max_prompt_length
    require(longest is None or longest >= 1, "max_prompt_length", longest, "give 1 or more")
    limit, released = args.max_completion_length, args.protocol == RELEASED
    require(limit is None or limit >= 1, LIMIT_FLAG, limit, "give 1 or more")
    text = args.pass_at or "1"
    try:
        tries = [int(k) for k in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"pass-at is {text!r}: give whole numbers, as 1,8,32") from error
    require(min(tries) >= 1, "pass-at", text, "give 1 or more")
    args.pass_at = None if released and args.pass_at is None else tries
    require(args.runs is None or released, "runs", args.runs, "it needs --protocol released")
    require(args.runs is None or args.runs >= 1, "runs", args.runs, "give 1 or more")
    require(args.num_samples is None or not released, "num_samples", args.num_samples, "give --runs in this protocol")
    enough = args.num_samples is None or args.num_samples >= max(tries)
    require(enough, "num_samples", args.num_samples, f"pass@{max(tries)} needs at least {max(tries)}")
    require(min(args.noise_scale) >= 0, "noise_scale", min(args.noise_scale), "give 0 or more")
    if len(args.noise_scale) > 1:
        noisy = args.mode == "latent" and args.noise != "none"
        require(noisy, "noise_scale", args.noise_scale, "several need latent steps and --noise one_sided or two_sided")
        sampled = released or max(tries) > 1 or bool(args.num_samples)
        require(sampled, "noise_scale", args.noise_scale, "several need samples; give --pass-at 1,8 or --num_samples")


def released_plan(args: argparse.Namespace, label: str) -> ReleasedRuns | None:
    """Return the runs on a data set in the protocol released, None in the protocol greedy.

    Raises:
        ConfigError: data that is no benchmark needs --runs, or a k of --pass-at exceeds the runs.
    """
    from dataclasses import replace

    from latent_grpo.data.benchmarks import ReleasedRuns, released_runs

    if args.protocol == GREEDY:
        return None
    plan = released_runs(label)
    known = plan is not None or args.runs is not None
    require(known, "runs", args.runs, f"{label} is no benchmark of the released scripts; give a number")
    plan = plan or ReleasedRuns(args.runs)
    plan = plan if args.runs is None else replace(plan, runs=args.runs)
    most = max(args.pass_at or [1])
    require(most <= plan.runs, "pass-at", most, f"{label} has {plan.runs} runs; give at most that")
    return plan


def setting_for(
    args: argparse.Namespace, plan: ReleasedRuns | None, own_format: PromptFormat, *, keep_format: bool
) -> Setting:
    """Return how a data set is evaluated. own_format, keep_format: as `released_setting` takes them."""
    from latent_grpo.evaluation.protocol import Setting, released_setting

    limit = args.max_completion_length
    if plan is not None:
        chosen = dict(pass_at=args.pass_at, limit=limit, length_of=args.length_of)
        return released_setting(plan, args.seed, own_format, keep_format=keep_format, **chosen)
    limit = LatentSampling().max_new_tokens if limit is None else limit
    chosen = dict(num_samples=args.num_samples, length_of=args.length_of or "all")
    return Setting(limit, args.pass_at, own_format, **chosen)


def checked_rows(args: argparse.Namespace, rows: list[Any], setting: Setting, model: Any, tokenizer: Any) -> list[Any]:
    """Return the rows of a data set whose prompts are short enough. Errors are those of the checks before a run."""
    from latent_grpo.architecture import check_context, check_prompt_lengths
    from latent_grpo.model import embedding_table
    from latent_grpo.prompts import check_prompts, with_short_prompts

    lengths = check_prompts(tokenizer, rows, setting.prompt_format, len(embedding_table(model)))
    check_context(model.config, {"data": lengths}, args.max_prompt_length)
    kept = with_short_prompts(rows, lengths, args.max_prompt_length, args.long_prompts)
    check_prompt_lengths(model.config, tokenizer, kept, setting.prompt_format, setting.max_new_tokens)
    return kept


def run_evaluation(args: argparse.Namespace) -> int:
    """Evaluate on every rank and report from rank 0."""
    from dataclasses import asdict, replace

    from latent_grpo.data.benchmarks import load_benchmarks
    from latent_grpo.evaluation import evaluate
    from latent_grpo.parallel.process_group import rank
    from latent_grpo.prompts import has_format
    from latent_grpo.saving.atomic_files import require_writable
    from latent_grpo.watching.environment import environment
    from latent_grpo.watching.evaluation_report import mean_over_data, print_report, write_report

    out = None if args.out is None else Path(args.out)
    if out is not None:
        out = out.with_suffix("") if out.suffix in (".json", ".md", ".svg") else out
        require_writable(out)
        record_file = f"{out}.json"
        free = not Path(record_file).exists()
        require(free, "out", args.out, f"{record_file!r} holds an evaluation; choose another name or remove it")
    columns = {name: getattr(args, name) for name in COLUMNS}
    as_released = args.protocol == RELEASED or args.prompt_format == "latent-grpo-gpqa"
    data = load_benchmarks(args.data, split=args.split, limit=args.limit, released=as_released, **columns)
    plans = {label: released_plan(args, label) for label in data}
    scales, limit = args.noise_scale, args.max_completion_length or LatentSampling().max_new_tokens
    one = argparse.Namespace(**{**vars(args), "noise_scale": scales[0], LIMIT_FLAG: limit})
    model, tokenizer, sampling, own_format = load_for_sampling(one)
    keep_format = prompt_options(args) != PromptOptions() or has_format(args.model)
    settings = {label: setting_for(args, plan, own_format, keep_format=keep_format) for label, plan in plans.items()}
    # All of them before the first response to any.
    data = {label: checked_rows(args, rows, settings[label], model, tokenizer) for label, rows in data.items()}
    parts = []
    for scale in scales:
        results = {}
        for label, rows in data.items():
            arguments = dict(vars(settings[label]))
            limited = replace(sampling, noise_scale=scale, max_new_tokens=arguments.pop("max_new_tokens"))
            name = label if len(scales) == 1 else f"{label}, noise scale {scale:g}"
            shown = dict(batch_size=args.batch_size, label=name, show_progress=True)
            results[label] = evaluate(model, tokenizer, rows, limited, **arguments, **shown)
        parts.append({"noise_scale": scale, "mean": mean_over_data(results), "results": results})
    if rank() > 0:
        return 0
    record = {
        "model": args.model,
        "protocol": args.protocol,
        "data": args.data,
        "sampling": {name: value for name, value in asdict(sampling).items() if name not in VARIED},
        "settings": {label: asdict(setting) for label, setting in settings.items()},
        "environment": environment(model.device),
        **({"sweep": parts} if len(parts) > 1 else parts[0]),
    }
    print_report(Console(), record)
    if out is not None:
        print(f"wrote {', '.join(map(str, write_report(out, record)))}")
    return 0
