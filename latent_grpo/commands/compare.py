"""`latent-grpo compare`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from latent_grpo.commands.options import FAILURE, parse_config
from latent_grpo.config import LatentGRPOConfig, LatentSFTConfig
from latent_grpo.study.config import CompareConfig


def run(prog: str, argv: Sequence[str]) -> int:
    """Compare methods and ablations over several seeds."""
    about = (
        "Warm starts, Latent-GRPO, SofT-GRPO, Multiplex Thinking, text GRPO and the paper's ablations over several "
        "seeds, by default on the quickstart's graph world. Given again, it does only the runs that have no result yet."
    )
    args = parse_config(prog, CompareConfig, about, argv)
    given = {"sft_config": LatentSFTConfig, "grpo_config": LatentGRPOConfig}
    sft, grpo = (
        parse_config(prog, config, "", ["--config", path]) if (path := getattr(args, name)) else None
        for name, config in given.items()
    )
    # Below the parser, because these imports take seconds.
    from latent_grpo.model import precision_line
    from latent_grpo.study.compare import claim_folder, make_plan, run_all
    from latent_grpo.study.compare_report import cells, write_report

    plan = make_plan(args, sft, grpo)
    if not plan.embedded:
        print(precision_line(plan.sft.model_name_or_path, plan.sft.dtype, plan.sft.device))
    claim_folder(plan)
    failures = run_all(plan)
    summary = write_report(plan, failures)
    console = Console(highlight=False)
    if summary:
        caption = "mean ± standard deviation over seeds; difference: of Pass@1 to Latent-GRPO, seed by seed"
        console.print(cells(summary, ablations=False, short=True).rich("Methods", caption))
        ablations = cells(summary, ablations=True, short=True)
        if ablations.rows:
            console.print(ablations.rich("Ablations of Latent-GRPO", caption))
        print(f"comparison.md, comparison.json and comparison.png are in {args.output_dir}/")
    for failed, reason in failures.items():
        print(f"failed: {failed}: {reason}", file=sys.stderr)
    return FAILURE if failures else 0
