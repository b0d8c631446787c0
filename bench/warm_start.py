"""Soft labels against uniform targets on the quickstart's world, from one start and with as many steps.

    python -m bench.warm_start --seeds 0 1 2 --out DIR

For each seed, a text model is trained on worked examples. `encode` makes soft labels from it. Then three warm starts
take the same number of steps: uniform targets from the text model, soft labels from the text model, and soft labels
from the decoder of `encode`, as published. DIR/warm-start.json and .md hold noise-free Pass@1 on held-out problems, for
mixtures of two and of ten tokens, and the shares of chain tokens that the decoder reads back.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from latent_grpo.config import EncodeConfig, LatentSampling, LatentSFTConfig
from latent_grpo.evaluation import evaluate
from latent_grpo.model import eos_ids, load_model
from latent_grpo.quickstart.toy_task import (
    END_OF_THINKING,
    make_model,
    make_problems,
    make_tokenizer,
    worked_examples,
)
from latent_grpo.saving.atomic_files import write_whole
from latent_grpo.sft import LatentSFTTrainer
from latent_grpo.sft.encode import LABEL_FILE, encode
from latent_grpo.watching.environment import environment
from latent_grpo.watching.metrics import read_metrics

TEXT, SOFT, PUBLISHED = "uniform targets", "soft labels", "soft labels from the decoder"
MIXTURES = (2, 10)  # tokens of a mixture in the evaluation
PHASES = ("encoder", "decoder", "union")


def run_seed(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Return the figures of one seed."""
    folder = options.out / f"seed-{seed}"
    problems = make_problems(options.problems + options.held_out, seed=seed)
    held_out = problems[: options.held_out]
    rows = worked_examples(problems[options.held_out :], seed=seed)
    tokenizer = make_tokenizer()
    common: dict[str, Any] = dict(
        seed=seed,
        answer_template="{answer}",
        max_completion_length=16,
        lr_scheduler_type="linear",
        warmup_ratio=0.05,
        per_device_train_batch_size=64,
        save_steps=0,
        log_table=False,
    )
    text = LatentSFTConfig(
        latent=False, output_dir=str(folder / "text"), max_steps=options.text_steps, learning_rate=3e-3, **common
    )
    LatentSFTTrainer(make_model(tokenizer, seed=seed), text, rows, tokenizer).train()
    stage = EncodeConfig(
        model_name_or_path=text.output_dir,
        output_dir=str(folder / "encode"),
        max_steps=options.encode_steps,
        learning_rate=1e-3,
        read_back_rows=200,
        **common,
    )
    encode(stage, rows, tokenizer)
    labels = dict(targets="soft_labels", soft_labels=str(folder / "encode" / LABEL_FILE), gumbel_scale=1.0)
    decoder = str(folder / "encode" / "union" / "decoder")
    arms: dict[str, tuple[str, dict[str, Any]]] = {
        TEXT: (text.output_dir, {}),
        SOFT: (text.output_dir, labels),
        PUBLISHED: (decoder, labels),
    }
    result: dict[str, Any] = {"seed": seed, "pass_at_1": {}, "read_back": read_back(folder / "encode")}
    for number, (name, (start, given)) in enumerate(arms.items()):
        run = dict(output_dir=str(folder / f"arm-{number}"), max_steps=options.sft_steps, learning_rate=1e-3)
        model = load_model(start)
        LatentSFTTrainer(model, LatentSFTConfig(**common, **run, **given), rows, tokenizer).train()
        result["pass_at_1"][name] = {k: pass_at_1(model, tokenizer, held_out, k) for k in MIXTURES}
    return result


def read_back(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the share of chain tokens read back over the steps of each phase."""
    lines = {phase: read_metrics(folder / phase / "metrics.jsonl") for phase in PHASES}
    name = "latent/read_back"
    return {p: [(row["step"], row[name]) for row in rows if name in row] for p, rows in lines.items()}


def pass_at_1(model: Any, tokenizer: Any, problems: list[Any], top_k: int) -> float:
    """Return the share of problems that the model answers, without noise and with mixtures of `top_k` tokens."""
    end = tokenizer.convert_tokens_to_ids(END_OF_THINKING)
    sampling = LatentSampling(
        latent_top_k=top_k, max_new_tokens=16, end_token_id=end, eos_token_id=eos_ids(model, tokenizer)
    )
    return float(evaluate(model, tokenizer, problems, sampling, batch_size=256)["pass_at_1"])


def page(record: dict[str, Any]) -> str:
    """Return the record as Markdown."""
    results, stamp = record["results"], record["environment"]
    seeds = ", ".join(str(result["seed"]) for result in results)
    lines = [
        "# Soft labels against uniform targets on the quickstart's world",
        "",
        f"Seeds {seeds}; " + ", ".join(f"{name} {value}" for name, value in record["steps"].items()) + ".",
        ", ".join(f"{name} {value}" for name, value in stamp.items()) + f"; {record['seconds']:.0f} s.",
        "",
        f"Noise-free Pass@1 on {record['held_out']} held-out problems, mean over the seeds (each seed).",
        "",
        "| warm start | " + " | ".join(f"mixtures of {k} tokens" for k in MIXTURES) + " |",
        "| --- | ---: | ---: |",
    ]
    for name in (TEXT, SOFT, PUBLISHED):
        columns = [[result["pass_at_1"][name][k] for result in results] for k in MIXTURES]
        cells = [f"{statistics.mean(c):.3f} ({', '.join(f'{value:.3f}' for value in c)})" for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "Share of held-out chain tokens that the decoder reads back, at the first and the last step.", ""]
    lines += ["| phase | first step | last step |", "| --- | ---: | ---: |"]
    for phase in PHASES:
        ends = [[result["read_back"][phase][at][1] for result in results] for at in (0, -1)]
        lines.append(f"| {phase} | {' | '.join(', '.join(f'{x:.3f}' for x in end) for end in ends)} |")
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Return 0 if all is done, 2 for bad arguments."""
    parser = argparse.ArgumentParser(prog="python -m bench.warm_start", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of problems, models and noise")
    parser.add_argument("--out", type=Path, required=True, help="new folder for runs and results")
    parser.add_argument("--problems", type=int, default=20_000, help="problems to train on")
    parser.add_argument("--held_out", type=int, default=1000, help="problems to measure on")
    parser.add_argument("--text_steps", type=int, default=250, help="steps of the text model")
    parser.add_argument("--encode_steps", type=int, default=100, help="steps of each phase of encode")
    parser.add_argument("--sft_steps", type=int, default=200, help="steps of each warm start")
    options = parser.parse_args(arguments)
    if options.out.exists() and any(options.out.iterdir()):
        parser.error(f"--out {options.out} is not empty: give a new folder")
    started = time.time()
    results = []
    for seed in options.seeds:
        results.append(run_seed(options, seed))
        record = {
            "steps": {name: getattr(options, name) for name in ("text_steps", "encode_steps", "sft_steps")},
            "problems": options.problems,
            "held_out": options.held_out,
            "seconds": time.time() - started,
            "environment": environment(torch.device("cpu")),
            "results": results,
        }
        write_whole(options.out / "warm-start.json", json.dumps(record, indent=1) + "\n")
        write_whole(options.out / "warm-start.md", page(record))
    print(page(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
