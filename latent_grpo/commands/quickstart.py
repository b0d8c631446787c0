"""`latent-grpo quickstart`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from latent_grpo.commands.options import Parser


def quickstart_parser(prog: str) -> Parser:
    """Return the parser of `quickstart`."""
    about = "A warm start, Latent-GRPO and evaluation of a tiny model on made-up problems: minutes on a CPU."
    parser = world_parser(prog, about, "runs/quickstart", "Folder for checkpoints, metrics and curves.")
    parser.add_argument(
        "--loss_on",
        choices=("all", "latent", "text"),
        help="Steps that carry the policy loss. [default: a run with all of them, and one with the latent ones]",
    )
    return parser


def world_parser(prog: str, about: str, out: str, holds: str) -> Parser:
    """Return a parser of what is made on the spot: world, seed, and the output folder. holds: what that is for."""
    parser = Parser(prog=prog, description=about)
    parser.add_argument("--out", default=out, help=f"{holds} [default: {out}]")
    parser.add_argument("--seed", type=int, default=0, help="Seed of problems, model, sampling and noise. [default: 0]")
    parser.add_argument(
        "--world",
        choices=("graph", "arithmetic"),
        default="graph",
        help="The task: reachability in graphs, or word problems. [default: graph]",
    )
    return parser


def run(prog: str, argv: Sequence[str]) -> int:
    """Run the whole job on a made-up task."""
    args = quickstart_parser(prog).parse_args(argv)
    from latent_grpo.quickstart.run import quickstart

    quickstart(Path(args.out), seed=args.seed, loss_on=args.loss_on, world=args.world)
    return 0
