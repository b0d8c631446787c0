"""`latent-grpo encode`."""

from __future__ import annotations

from collections.abc import Sequence

from latent_grpo.commands.options import (
    SEVERAL_PROCESSES,
    load_dataset_rows,
    parse_config,
    require_given,
    require_sources,
)
from latent_grpo.config import EncodeConfig


def run(prog: str, argv: Sequence[str]) -> int:
    """Train encoder and decoder, and write the soft labels of the data."""
    about = f"The first stage of Latent-SFT: soft labels for sft, made from chains of thought. {SEVERAL_PROCESSES}"
    args = parse_config(prog, EncodeConfig, about, argv)
    require_given(model_name_or_path=args.model_name_or_path, dataset=args.dataset)
    require_sources(args.dataset)
    # Below the parser, because these imports take seconds.
    from latent_grpo.model import load_tokenizer, precision_line
    from latent_grpo.parallel.process_group import process_group, rank
    from latent_grpo.sft.encode import encode

    rows = load_dataset_rows(args, args.dataset, args.dataset_split, args.limit)
    tokenizer = load_tokenizer(args.model_name_or_path)
    with process_group():
        if rank() == 0:
            print(precision_line(args.model_name_or_path, args.dtype, args.device))
        results = encode(args, rows, tokenizer)
        if rank() == 0:
            for phase, values in results.items():
                shares = f"read back {values['latent/read_back']:.3f}, answers {values['latent/read_answers']:.3f}"
                print(f"{phase}: loss {values['loss']:.4f}, {shares}")
            kept = [phase for phase in args.phases if phase not in (*results, "labels")]
            if kept:
                print(f"finished before: {', '.join(kept)}")
            print(f"saved {args.output_dir}")
    return 0
