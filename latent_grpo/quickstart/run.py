"""`latent-grpo quickstart`: the whole job on an embedded default, no download.

Word problems and a model of about a million parameters are made on the spot; Latent-SFT on careless worked examples,
Latent-GRPO for true answers, evaluation on held-out problems. The warm start knows its sums and weighs its mixtures
wrong: reinforcement sharpens what a model half knows, it does not teach sums.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from latent_grpo.config import ConfigError, LatentGRPOConfig, LatentSampling, LatentSFTConfig
from latent_grpo.evaluation import evaluate
from latent_grpo.model import encode_prompts
from latent_grpo.quickstart.toy_task import make_model, make_problems, make_tokenizer, worked_examples
from latent_grpo.rollout.generate import generate_latent
from latent_grpo.sft import LatentSFTTrainer, build_examples, gold_chain_accuracy
from latent_grpo.trainer import LatentGRPOTrainer
from latent_grpo.watching.curves import draw_curves
from latent_grpo.watching.responses import response_lines

TRAIN_PROBLEMS, HELD_OUT_PROBLEMS, WATCHED_PROBLEMS, SHOWN_PROBLEMS = 20_000, 1_000, 200, 3


def sft_config(out: Path, seed: int) -> LatentSFTConfig:
    """Options of the warm start."""
    return LatentSFTConfig(
        output_dir=str(out / "latent-sft"), seed=seed, compression=2, answer_template="{answer}", max_steps=450,
        learning_rate=3e-3, lr_scheduler_type="linear", warmup_steps=20, per_device_train_batch_size=64,
        max_completion_length=16, log_table=False,
    )  # fmt: skip


def grpo_config(out: Path, seed: int, loss_on: Any) -> LatentGRPOConfig:
    """Options of the reinforcement. K = 2, the chain tokens that a latent step stands for.

    No first-token selection: a response has one to three latent steps, so the first one is too large a part of it. Few
    steps: with the loss on latent steps alone nothing holds the end of the latent run in its place for long.
    """
    return LatentGRPOConfig(
        output_dir=str(out / "latent-grpo"), seed=seed, loss_on=loss_on, latent_top_k=2, max_steps=50,
        learning_rate=1e-4, lr_scheduler_type="linear", num_generations=8, generation_batch_size=512,
        per_device_train_batch_size=128, max_generation_batches=1, max_completion_length=12, first_token="all",
        old_logprobs="rollout", eval_steps=10, save_steps=0,
    )  # fmt: skip


def quickstart(out: Path, *, seed: int = 0, loss_on: str = "all") -> dict[str, Any]:
    """Run the whole job into `out` and return its summary; ConfigError where `out` already holds one."""
    if (out / "summary.json").exists():
        raise ConfigError(f"{str(out)!r} already holds a run; choose another --out")
    started = time.perf_counter()
    console = Console(highlight=False)
    torch.manual_seed(seed)
    problems = make_problems(TRAIN_PROBLEMS + HELD_OUT_PROBLEMS, seed=seed)
    train, held_out = problems[HELD_OUT_PROBLEMS:], problems[:HELD_OUT_PROBLEMS]
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed=seed)
    console.print(f"[bold]{len(train)} problems[/], {HELD_OUT_PROBLEMS} held out, e.g. {train[0]['prompt']!r}")

    sft_args = sft_config(out, seed)
    LatentSFTTrainer(model, sft_args, worked_examples(train, seed=seed), tokenizer).train()
    grpo_args = grpo_config(out, seed, loss_on)
    trainer = LatentGRPOTrainer(model, None, grpo_args, train, held_out[:WATCHED_PROBLEMS], tokenizer)
    gold = gold_chain_accuracy(model, build_examples(tokenizer, held_out, sft_args))
    before = measure(trainer, held_out)
    before["gold_chain_accuracy"] = gold
    before_lines = show(trainer, held_out[:SHOWN_PROBLEMS])
    trainer.train()
    after = measure(trainer, held_out)

    summary = {
        "latent_sft": before, "latent_grpo": after, "loss_on": loss_on, "seed": seed,
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    lines = "".join((out / part / "metrics.jsonl").read_text() for part in ("latent-sft", "latent-grpo"))
    (out / "metrics.jsonl").write_text(lines)
    caption = (
        f"latent-grpo quickstart --seed {seed} --loss_on {loss_on}: {summary['seconds']:.0f} s, "
        f"{trainer.device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}. Accuracy is on "
        f"{WATCHED_PROBLEMS} held-out problems while training."
    )
    draw_curves(out / "metrics.jsonl", out / "curves.png", caption=caption)
    for number, (problem, old, new) in enumerate(
        zip(held_out, before_lines, show(trainer, held_out[:SHOWN_PROBLEMS]), strict=False), 1
    ):
        console.print(f"\n[bold]Problem {number}[/]: {problem['prompt']}  [green]({problem['answer']})[/]")
        for label, answer in (("Latent-SFT", old), ("Latent-GRPO", new)):
            console.print(f"  {label}")
            for line in answer:
                console.print(f"    {line}", markup=False)
    console.print(summary_table(summary))
    console.print(f"{summary['seconds']:.0f} s; summary.json, metrics.jsonl, curves.png and both models are in {out}/")
    return summary


def measure(trainer: LatentGRPOTrainer, problems: list[Any]) -> dict[str, Any]:
    """Figures of the summary on the held-out problems."""
    result = evaluate(trainer.model, trainer.tokenizer, problems, trainer.sampling, batch_size=256)
    result.pop("samples")
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in result.items()}


def show(trainer: LatentGRPOTrainer, problems: list[Any]) -> list[list[str]]:
    """Noise-free responses, a list of lines each."""
    sampling = LatentSampling(**{**vars(trainer.sampling), "noise": "none", "temperature": 0.0})
    ids, mask = encode_prompts(trainer.tokenizer, [p["prompt"] for p in problems], trainer.device)
    rollout = generate_latent(trainer.model, ids, mask, sampling)
    return [response_lines(trainer.tokenizer, rollout, i, trainer.args.end_marker) for i in range(len(problems))]


def summary_table(summary: dict[str, Any]) -> Table:
    """Before and after."""
    before, after = summary["latent_sft"], summary["latent_grpo"]
    table = Table(title=f"{after['problems']} held-out problems, noise-free")
    for column in ("", "Latent-SFT", "Latent-GRPO"):
        table.add_column(column, justify="left" if not column else "right")
    for name, label in (
        ("pass_at_1", "Pass@1"), ("reasoning_tokens", "reasoning tokens"), ("truncation_rate", "cut off by the limit"),
    ):  # fmt: skip
        table.add_row(label, f"{before[name]:.3f}", f"{after[name]:.3f}")
    table.add_row("read out of the gold chain", f"{before['gold_chain_accuracy']:.3f}", "")
    return table
