"""`latent-grpo probes`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from latent_grpo.commands.options import Parser


def probes_parser(prog: str) -> Parser:
    """Return the parser of `probes`."""
    about = (
        "Small experiments on each mechanism of the method, with predictions: signs and directions of latent "
        "gradients, noise, first-token selection, masking. Minutes on a CPU."
    )
    parser = Parser(prog=prog, description=about)
    parser.add_argument("--out", default="runs/probes", help="Folder, new or empty. [default: runs/probes]")
    parser.add_argument("--seed", type=int, default=0, help="Seed of problems, model and noise. [default: 0]")
    parser.add_argument(
        "--world",
        choices=("graph", "arithmetic"),
        default="graph",
        help="The task: reachability in graphs, or word problems. [default: graph]",
    )
    return parser


def run(prog: str, argv: Sequence[str]) -> int:
    """Run the probes."""
    args = probes_parser(prog).parse_args(argv)
    from latent_grpo.study.probes import probes

    probes(Path(args.out), world=args.world, seed=args.seed)
    return 0
