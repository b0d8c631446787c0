"""`latent-grpo generate`."""

from __future__ import annotations

from collections.abc import Sequence

from latent_grpo.commands.options import Parser, load_for_sampling, sampling_flags


def generate_parser(prog: str) -> Parser:
    """Flags of `generate`."""
    parser = Parser(
        prog=prog, description="Answer a prompt, each latent step shown as its mixture.", allow_abbrev=False
    )
    sampling_flags(parser)
    parser.add_argument("--prompt", required=True, help="the question")
    parser.add_argument("--sample", action="store_true", help="with noise; default is noise-free and greedy")
    parser.add_argument("--top", type=int, default=4, help="components shown of every mixture")
    return parser


def command_generate(prog: str, argv: Sequence[str]) -> int:
    """Answer one prompt and show every latent step as its mixture."""
    args = generate_parser(prog).parse_args(argv)
    from dataclasses import replace

    from latent_grpo.model import encode_prompts
    from latent_grpo.rollout.generate import generate_latent
    from latent_grpo.watching.responses import print_response

    model, tokenizer, sampling = load_for_sampling(args)
    if not args.sample:
        sampling = replace(sampling, noise="none", temperature=0.0)
    rollout = generate_latent(model, *encode_prompts(tokenizer, [args.prompt], model.device), sampling)
    print_response(tokenizer, rollout, 0, args.end_marker, top=args.top)
    return 0
