"""`latent-grpo probes`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from latent_grpo.commands.options import Parser
from latent_grpo.commands.quickstart import world_parser


def probes_parser(prog: str) -> Parser:
    """Return the parser of `probes`."""
    about = (
        "Small experiments on each mechanism of the method, with predictions: signs and directions of latent "
        "gradients, noise, first-token selection, masking. Minutes on a CPU."
    )
    return world_parser(prog, about, "runs/probes", "Folder, new or empty.")


def run(prog: str, argv: Sequence[str]) -> int:
    """Run the probes."""
    args = probes_parser(prog).parse_args(argv)
    from latent_grpo.study.probes import probes

    probes(Path(args.out), world=args.world, seed=args.seed)
    return 0
