"""`latent-grpo quickstart`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from latent_grpo.commands.options import Parser


def quickstart_parser(prog: str) -> Parser:
    """Flags of `quickstart`."""
    about = "Latent-SFT, Latent-GRPO and evaluation of a tiny model on made-up word problems: minutes on a CPU."
    parser = Parser(prog=prog, description=about, allow_abbrev=False)
    parser.add_argument("--out", default="runs/quickstart", help="folder for checkpoints, metrics and curves")
    parser.add_argument("--seed", type=int, default=0, help="seed of problems, model, sampling and noise")
    parser.add_argument(
        "--loss_on", choices=("all", "latent", "text"), default="all", help="steps carrying the policy loss"
    )
    return parser


def command_quickstart(prog: str, argv: Sequence[str]) -> int:
    """The whole job on an embedded default."""
    args = quickstart_parser(prog).parse_args(argv)
    from latent_grpo.quickstart.run import quickstart

    quickstart(Path(args.out), seed=args.seed, loss_on=args.loss_on)
    return 0
