"""`latent-grpo inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from latent_grpo.commands.options import Parser


def inspect_parser(prog: str) -> Parser:
    """Flags of `inspect`."""
    parser = Parser(prog=prog, description="Show a run: curves, alarms, responses.", allow_abbrev=False)
    parser.add_argument("run", help="output folder of sft or train")
    parser.add_argument("--samples", type=int, default=3, help="responses shown (needs --log_completions in training)")
    parser.add_argument("--step", type=int, default=None, help="step of the responses; default: the last one logged")
    parser.add_argument("--top", type=int, default=4, help="components shown of every mixture, up to 4")
    parser.add_argument("--all", action="store_true", help="every metric, not the main ones alone")
    parser.add_argument("--png", default=None, help="also draw the curves into this file")
    return parser


def command_inspect(prog: str, argv: Sequence[str]) -> int:
    """Curves, alarms and responses of a run."""
    args = inspect_parser(prog).parse_args(argv)
    from latent_grpo.config import require
    from latent_grpo.watching.inspect_run import inspect_run

    require(args.samples >= 0, "samples", args.samples, "give 0 (none) or more")
    require(args.top >= 1, "top", args.top, "give 1 or more")
    picture = Path(args.png) if args.png else None
    inspect_run(
        Path(args.run), samples=args.samples, step=args.step, top=args.top, every_metric=args.all, picture=picture
    )
    return 0
