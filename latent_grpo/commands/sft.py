"""`latent-grpo sft`."""

from __future__ import annotations

from collections.abc import Sequence

from latent_grpo.commands.options import SEVERAL_PROCESSES, parse_config, require_given, require_sources
from latent_grpo.config import LatentSFTConfig


def run(prog: str, argv: Sequence[str]) -> int:
    """Train the warm start and save it."""
    about = f"The warm start, in which a model learns to reason in latent steps. {SEVERAL_PROCESSES}"
    args = parse_config(prog, LatentSFTConfig, about, argv)
    require_given(model_name_or_path=args.model_name_or_path, dataset=args.dataset)
    require_sources(args.dataset)
    # Below the parser, because these imports take seconds.
    from latent_grpo.data.rows import load_training_rows
    from latent_grpo.model import load_model, load_tokenizer, precision_line
    from latent_grpo.parallel.process_group import process_group, rank
    from latent_grpo.sft import LatentSFTTrainer

    rows = load_training_rows(args)
    tokenizer = load_tokenizer(args.model_name_or_path)
    with process_group():
        if rank() == 0:
            print(precision_line(args.model_name_or_path, args.dtype, args.device))
        model = load_model(args.model_name_or_path, args.dtype, args.device)
        values = LatentSFTTrainer(model, args, rows, tokenizer).train()
        if rank() == 0:
            print(f"saved {args.output_dir} (loss {values['loss']:.4f})")
    return 0
