"""`latent-grpo sft` and `latent-grpo train`."""

from __future__ import annotations

from collections.abc import Sequence

from latent_grpo.commands.options import SEVERAL_PROCESSES, load_dataset_rows, parse_config, require_given


def command_sft(prog: str, argv: Sequence[str]) -> int:
    """Latent-SFT warm start."""
    from latent_grpo.config import LatentSFTConfig
    from latent_grpo.model import load_model, load_tokenizer
    from latent_grpo.parallel.process_group import process_group, rank
    from latent_grpo.sft import LatentSFTTrainer

    about = f"Latent-SFT: the warm start that creates the latent manifold. {SEVERAL_PROCESSES}"
    args = parse_config(prog, LatentSFTConfig, about, argv)
    require_given(prog, model_name_or_path=args.model_name_or_path, dataset=args.dataset)
    rows = load_dataset_rows(args, args.dataset, args.dataset_split, args.limit)
    tokenizer = load_tokenizer(args.model_name_or_path)
    with process_group():
        model = load_model(args.model_name_or_path, args.dtype, args.device)
        values = LatentSFTTrainer(model, args, rows, tokenizer).train()
        if rank() == 0:
            print(f"saved {args.output_dir} (loss {values['loss']:.4f})")
    return 0


def command_train(prog: str, argv: Sequence[str]) -> int:
    """Latent-GRPO, or text GRPO with --latent False."""
    from latent_grpo.config import LatentGRPOConfig
    from latent_grpo.parallel.process_group import process_group, rank
    from latent_grpo.trainer import LatentGRPOTrainer

    about = f"Latent-GRPO (arXiv 2604.27998); text GRPO with --latent False. {SEVERAL_PROCESSES}"
    args = parse_config(prog, LatentGRPOConfig, about, argv)
    require_given(prog, model_name_or_path=args.model_name_or_path, dataset=args.dataset)
    rows = load_dataset_rows(args, args.dataset, args.dataset_split, args.limit)
    evaluation = load_dataset_rows(args, args.eval_dataset, "test", args.eval_limit) if args.eval_dataset else None
    with process_group():
        trainer = LatentGRPOTrainer(args.model_name_or_path, None, args, rows, evaluation)
        values = trainer.train()
        if rank() == 0:
            print(f"saved {args.output_dir} (reward {values.get('reward', float('nan')):.3f})")
    return 0
