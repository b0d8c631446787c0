"""`latent-grpo inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from latent_grpo.commands.options import Parser
from latent_grpo.errors import require


def inspect_parser(prog: str) -> Parser:
    """Return the parser of `inspect`."""
    parser = Parser(prog=prog, description="Show a run: curves, alarms, responses.")
    parser.add_argument("run", help="Output folder of sft or train.")
    parser.add_argument(
        "--samples", type=int, default=3, help="Responses shown. They need --log_completions in training. [default: 3]"
    )
    parser.add_argument("--step", type=int, help="Step of the responses. [default: the last one logged]")
    parser.add_argument("--top", type=int, default=4, help="Components shown of every mixture, at most 4. [default: 4]")
    parser.add_argument("--all", action="store_true", help="Show every metric, not only the main ones.")
    parser.add_argument("--png", help="Also draw the curves into this file.")
    return parser


def run(prog: str, argv: Sequence[str]) -> int:
    """Show curves, alarms and responses of a run."""
    args = inspect_parser(prog).parse_args(argv)
    from latent_grpo.watching.inspect_run import inspect_run

    require(args.samples >= 0, "samples", args.samples, "give 0 (none) or more")
    require(args.top >= 1, "top", args.top, "give 1 or more")
    picture = Path(args.png) if args.png else None
    inspect_run(
        Path(args.run), samples=args.samples, step=args.step, top=args.top, every_metric=args.all, picture=picture
    )
    return 0
