"""`latent-grpo train`."""

from __future__ import annotations

from collections.abc import Sequence

from latent_grpo.commands.options import (
    SEVERAL_PROCESSES,
    load_dataset_rows,
    parse_config,
    require_given,
    require_sources,
)
from latent_grpo.config import LatentGRPOConfig


def run(prog: str, argv: Sequence[str]) -> int:
    """Train with Latent-GRPO, or with text GRPO, and save the model."""
    about = f"Latent-GRPO (arXiv 2604.27998); text GRPO with --latent False. {SEVERAL_PROCESSES}"
    args = parse_config(prog, LatentGRPOConfig, about, argv)
    require_given(model_name_or_path=args.model_name_or_path, dataset=args.dataset)
    # A recipe names evaluation data that a run without evaluations need not load.
    wanted = args.eval_dataset if args.eval_steps else None
    require_sources(args.dataset, wanted)
    # Below the parser, because these imports take seconds.
    from latent_grpo.data.rows import load_training_rows
    from latent_grpo.model import precision_line
    from latent_grpo.parallel.process_group import process_group, rank
    from latent_grpo.trainer import LatentGRPOTrainer

    rows = load_training_rows(args, keep_columns=True)
    evaluation = load_dataset_rows(args, wanted, "test", args.eval_limit) if wanted else None
    with process_group():
        if rank() == 0:
            print(precision_line(args.model_name_or_path, args.dtype, args.device))
        trainer = LatentGRPOTrainer(args.model_name_or_path, None, args, rows, evaluation)
        values = trainer.train()
        if rank() == 0:
            print(f"saved {args.output_dir} (reward {values.get('reward', float('nan')):.3f})")
    return 0
