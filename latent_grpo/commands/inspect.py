"""`latent-grpo inspect`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latent_grpo.commands.options import Parser, add_flags_named, load_dataset_rows
from latent_grpo.errors import require
from latent_grpo.watching.run_check import check_run


def inspect_parser(prog: str) -> Parser:
    """Return the parser of `inspect`."""
    parser = Parser(prog=prog, description="Show a run: curves, alarms, responses, a prompt as the model gets it.")
    parser.add_argument("run", help="Output folder of sft or train.")
    parser.add_argument(
        "--samples", type=int, default=3, help="Responses shown. They need --log_completions in training. [default: 3]"
    )
    parser.add_argument("--step", type=int, help="Step of the responses. [default: the last one logged]")
    parser.add_argument("--top", type=int, default=4, help="Components shown of every mixture, at most 4. [default: 4]")
    parser.add_argument("--all", action="store_true", help="Show every metric, not only the main ones.")
    parser.add_argument("--png", help="Also draw the curves into this file.")
    parser.add_argument("--html", metavar="FILE", help="Also write curves and logged responses into this file, a page.")
    parser.add_argument("--data", metavar="SOURCE", help="Show the prompt of its first row. [default: a logged one]")
    add_flags_named(parser, ("dataset_split", "prompt_column", "answer_column", "chain_column"))
    return parser


def run(prog: str, argv: Sequence[str]) -> int:
    """Show curves, alarms and responses of a run, and a prompt as the model gets it."""
    args = inspect_parser(prog).parse_args(argv)
    check_run(Path(args.run))
    # Below the checks, because these imports take seconds.
    from latent_grpo.watching.inspect_run import inspect_run

    require(args.samples >= 0, "samples", args.samples, "give 0 (none) or more")
    require(args.top >= 1, "top", args.top, "give 1 or more")
    picture = Path(args.png) if args.png else None
    inspect_run(
        Path(args.run), samples=args.samples, step=args.step, top=args.top, every_metric=args.all, picture=picture
    )
    if args.html:
        from latent_grpo.watching.page import RunPage

        RunPage(args.run).write(args.html)
        print(f"The page is {args.html}. Open it in a browser.")
    show_prompt(Path(args.run), args)
    return 0


def show_prompt(run: Path, args: argparse.Namespace) -> None:
    """Print a prompt with the tokenizer and the format that a run saved; nothing if one of them is missing."""
    from rich.console import Console

    from latent_grpo.commands.prompt_view import show_row
    from latent_grpo.model import load_tokenizer
    from latent_grpo.prompts import read_format
    from latent_grpo.saving.checkpoint import checkpoints_in

    folders = [path for path in (*checkpoints_in(run), run) if (path / "tokenizer_config.json").is_file()]
    row = load_dataset_rows(args, args.data, args.dataset_split, 1)[0] if args.data else logged_row(run, args.step)
    if folders and row is not None:
        folder = str(folders[-1])
        show_row(Console(highlight=False), load_tokenizer(folder), read_format(folder), row)


def logged_row(run: Path, step: int | None) -> dict[str, Any] | None:
    """Return the prompt of the first logged response of a step, by default of the last one, as a row; None without."""
    from latent_grpo.watching.response_log import completion_steps, read_responses

    logged = completion_steps(run)
    responses = read_responses(run, logged[-1] if step is None else step, 1) if logged else []
    prompt = responses[0].prompt if responses else None
    if prompt is None:
        return None
    # The log keeps messages as JSON.
    return {"prompt": json.loads(prompt) if prompt.startswith('[{"role"') else prompt}
