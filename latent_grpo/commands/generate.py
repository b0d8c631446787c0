"""`latent-grpo generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console

from latent_grpo.commands.from_run import require_model
from latent_grpo.commands.options import Parser, complete_sampling, load_for_sampling, sampling_flags


def generate_parser(prog: str) -> Parser:
    """Return the parser of `generate`."""
    parser = Parser(prog=prog, description="Answer a prompt and show each latent step as its mixture.")
    sampling_flags(parser)
    parser.add_argument("--prompt", required=True, help="The question.")
    parser.add_argument("--sample", action="store_true", help="Sample with noise. Without it: noise-free and greedy.")
    parser.add_argument("--top", type=int, default=4, help="Components shown of every mixture. [default: 4]")
    return parser


def run(prog: str, argv: Sequence[str]) -> int:
    """Answer one prompt and show every latent step as its mixture."""
    args = generate_parser(prog).parse_args(argv)
    complete_sampling(args)
    require_model(args.model)
    # Below the parser, because these imports take seconds.
    from latent_grpo.model import embedding_table
    from latent_grpo.prompts import check_prompts, encode_prompts
    from latent_grpo.rollout.generate import generate_latent
    from latent_grpo.rollout.trajectory import visible_text
    from latent_grpo.watching.responses import Response, mixtures, print_response

    model, tokenizer, sampling, prompt_format = load_for_sampling(args)
    check_prompts(tokenizer, [{"prompt": args.prompt}], prompt_format, len(embedding_table(model)))
    if not args.sample:
        sampling = replace(sampling, noise="none", temperature=0.0)
    ids, mask = encode_prompts(tokenizer, [args.prompt], model.device, prompt_format=prompt_format)
    rollout = generate_latent(model, ids, mask, sampling)
    text = visible_text(tokenizer, rollout, prompt_format.end_marker)[0]
    response = Response(text, bool(rollout.finished[0]), mixtures(tokenizer, rollout, 0))
    print_response(Console(highlight=False), response, top=args.top)
    return 0
