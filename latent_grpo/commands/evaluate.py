"""`latent-grpo eval`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from latent_grpo.commands.options import Parser, add_flags_named, load_for_sampling, sampling_flags
from latent_grpo.errors import ConfigError, require

COLUMNS = ("prompt_column", "answer_column", "chain_column")
SOURCES = (
    "Benchmarks by name (gsm8k-aug, gsm-hard, svamp, multiarith, math-500, aime24, aime25, gpqa-diamond), "
    "low-difficulty or high-difficulty (the first or last four of them), JSON, JSONL or Parquet files, Hub names. "
    "gsm8k=FILE takes a file for a benchmark; any LABEL=SOURCE names a row of the table."
)


def eval_parser(prog: str) -> Parser:
    """Return the parser of `eval`."""
    about = (
        "Evaluate a model: Pass@1 noise-free, pass@k under noise, reasoning steps, with 95% bootstrap intervals. "
        "Under torchrun the problems are split over the ranks; the results are those of one process."
    )
    parser = Parser(prog=prog, description=about)
    sampling_flags(parser)
    parser.add_argument(
        "--noise", choices=("one_sided", "two_sided"), default="one_sided", help="Noise of pass@k. [default: one_sided]"
    )
    data = parser.add_argument_group("What is evaluated")
    data.add_argument("--data", nargs="+", required=True, metavar="SOURCE", help=SOURCES)
    data.add_argument("--split", default="test", help="Split of Hub data sets that are no benchmarks. [default: test]")
    data.add_argument("--limit", type=int, help="Use only the first rows of each data set.")
    add_flags_named(data, COLUMNS)
    tries = parser.add_argument_group("How it is evaluated")
    tries.add_argument("--pass-at", "--pass_at", default="1", help="Comma-separated k, as 1,8,32. [default: 1]")
    tries.add_argument(
        "--num_samples",
        type=int,
        help="Sampled responses per problem for pass@k. [default: the largest k, or none where that is 1]",
    )
    tries.add_argument("--batch_size", type=int, default=64, help="Responses decoded together. [default: 64]")
    tries.add_argument("--out", help="Write OUT.json (with every response) and OUT.md.")
    return parser


def run(prog: str, argv: Sequence[str]) -> int:
    """Evaluate a model on benchmarks by name, files or Hub data."""
    args = eval_parser(prog).parse_args(argv)
    tries = checked_tries(args)
    from latent_grpo.parallel.process_group import process_group

    with process_group():
        return run_evaluation(args, tries)


def checked_tries(args: argparse.Namespace) -> list[int]:
    """Return the k of --pass-at. Raise ConfigError for numbers that cannot be evaluated."""
    require(args.batch_size >= 1, "batch_size", args.batch_size, "give 1 or more")
    try:
        tries = [int(k) for k in args.pass_at.split(",")]
    except ValueError as error:
        raise ConfigError(f"pass-at is {args.pass_at!r}: give whole numbers, as 1,8,32") from error
    require(min(tries) >= 1, "pass-at", args.pass_at, "give 1 or more")
    enough = args.num_samples is None or args.num_samples >= max(tries)
    require(enough, "num_samples", args.num_samples, f"pass@{max(tries)} needs at least {max(tries)}")
    return tries


def run_evaluation(args: argparse.Namespace, tries: list[int]) -> int:
    """Evaluate on every rank and report from rank 0."""
    from dataclasses import asdict

    from latent_grpo.data.benchmarks import load_benchmarks
    from latent_grpo.evaluation import evaluate
    from latent_grpo.parallel.process_group import rank
    from latent_grpo.saving.atomic_files import require_writable, write_json, write_whole
    from latent_grpo.watching.environment import environment
    from latent_grpo.watching.tables import evaluation_cells, evaluation_document, mean_over_data

    out = None if args.out is None else Path(args.out)
    if out is not None:
        out = out.with_suffix("") if out.suffix in (".json", ".md") else out
        require_writable(out)
    columns = {name: getattr(args, name) for name in COLUMNS}
    data = load_benchmarks(args.data, split=args.split, limit=args.limit, **columns)
    model, tokenizer, sampling, prompt_format = load_for_sampling(args)
    sampling.noise = args.noise
    results = {
        label: evaluate(
            model,
            tokenizer,
            rows,
            sampling,
            pass_at=tries,
            num_samples=args.num_samples,
            batch_size=args.batch_size,
            prompt_format=prompt_format,
            label=label,
            show_progress=True,
        )
        for label, rows in data.items()
    }
    if rank() > 0:
        return 0
    caption = (
        "Pass@1 noise-free, pass@k under noise, tokens before the answer; second line: 95% intervals over problems"
    )
    Console().print(evaluation_cells(results, short=True).rich("Evaluation", caption))
    if out is not None:
        record = {
            "model": args.model,
            "data": args.data,
            "pass_at": tries,
            "prompt_format": asdict(prompt_format),
            "sampling": asdict(sampling),
            "environment": environment(model.device),
            "mean": mean_over_data(results),
            "results": results,
        }
        write_json(Path(f"{out}.json"), record)
        write_whole(Path(f"{out}.md"), evaluation_document(record))
        print(f"wrote {out}.json and {out}.md")
    return 0
