"""`latent-grpo quickstart`: the whole pipeline on the toy task, without a download.

It makes word problems and a model of 0.66 million parameters, warms it up with uniform targets on careless worked
examples, trains it with Latent-GRPO for true answers, and evaluates on held-out problems. The warm start knows its sums
and weights its mixtures wrongly. Reinforcement sharpens what a model half knows; it does not teach sums.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from latent_grpo.config import LatentGRPOConfig, LatentSampling, LatentSFTConfig
from latent_grpo.errors import ConfigError
from latent_grpo.evaluation import evaluate
from latent_grpo.prompts import encode_prompts
from latent_grpo.quickstart.toy_task import make_model, make_problems, make_tokenizer, worked_examples
from latent_grpo.rollout.generate import generate_latent
from latent_grpo.rollout.trajectory import visible_text
from latent_grpo.sft import LatentSFTTrainer, build_examples, gold_chain_accuracy
from latent_grpo.trainer import LatentGRPOTrainer
from latent_grpo.watching.curves import draw_curves
from latent_grpo.watching.responses import Response, mixtures, print_response

TRAIN_PROBLEMS, HELD_OUT_PROBLEMS = 20_000, 1_000
WATCHED_PROBLEMS = 200  # held-out problems that are evaluated during training
SHOWN_PROBLEMS = 3  # held-out problems whose responses are printed
DTYPE: Literal["float32"] = "float32"  # of the toy model on any device


def sft_config(out: Path, seed: int) -> LatentSFTConfig:
    """Return the options of the warm start."""
    return LatentSFTConfig(
        output_dir=str(out / "latent-sft"),
        dtype=DTYPE,
        seed=seed,
        compression=2,
        answer_template="{answer}",
        max_steps=450,
        learning_rate=3e-3,
        lr_scheduler_type="linear",
        warmup_steps=20,
        per_device_train_batch_size=64,
        max_completion_length=16,
        log_table=False,
    )


def grpo_config(out: Path, seed: int, loss_on: Any) -> LatentGRPOConfig:
    """Return the options of the reinforcement."""
    return LatentGRPOConfig(
        output_dir=str(out / "latent-grpo"),
        dtype=DTYPE,
        seed=seed,
        loss_on=loss_on,
        latent_top_k=2,  # a latent step stands for two chain tokens
        # With the loss on latent steps only, nothing keeps the end of the latent run in its place for long: few steps.
        max_rollouts=50,
        learning_rate=1e-4,
        lr_scheduler_type="linear",
        num_generations=8,
        generation_batch_size=512,
        per_device_train_batch_size=128,
        max_generation_batches=1,
        max_completion_length=12,
        # A response has one to three latent steps. First-token selection would act on too large a share of them.
        first_token="all",
        old_logprobs="rollout",
        eval_steps=10,
        save_steps=0,
    )


def quickstart(out: Path, *, seed: int = 0, loss_on: str = "all") -> dict[str, Any]:
    """Run the whole pipeline into the folder `out` and return its summary.

    Raises ConfigError if `out` already holds a quickstart.
    """
    if (out / "summary.json").exists():
        raise ConfigError(f"{str(out)!r} already holds a run; choose another --out")
    started = time.perf_counter()
    console = Console(highlight=False)
    torch.manual_seed(seed)
    problems = make_problems(TRAIN_PROBLEMS + HELD_OUT_PROBLEMS, seed=seed)
    train, held_out = problems[HELD_OUT_PROBLEMS:], problems[:HELD_OUT_PROBLEMS]
    console.print(f"[bold]{len(train)} problems[/] and {HELD_OUT_PROBLEMS} held out, for example:")
    console.print(train[0]["prompt"], markup=False)

    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed=seed)
    sft_args = sft_config(out, seed)
    LatentSFTTrainer(model, sft_args, worked_examples(train, seed=seed), tokenizer).train()
    grpo_args = grpo_config(out, seed, loss_on)
    trainer = LatentGRPOTrainer(model, None, grpo_args, train, held_out[:WATCHED_PROBLEMS], tokenizer)
    gold = gold_chain_accuracy(model, build_examples(tokenizer, held_out, sft_args))
    before = {**measure(trainer, held_out), "gold_chain_accuracy": gold}
    responses_before = respond(trainer, held_out[:SHOWN_PROBLEMS])
    trainer.train()
    after = measure(trainer, held_out)
    responses_after = respond(trainer, held_out[:SHOWN_PROBLEMS])

    seconds = round(time.perf_counter() - started, 1)
    summary = {"latent_sft": before, "latent_grpo": after, "loss_on": loss_on, "seed": seed, "seconds": seconds}
    write_files(out, summary, trainer.device)
    for number, (problem, *pair) in enumerate(zip(held_out, responses_before, responses_after, strict=False), 1):
        console.print(f"\n[bold]Problem {number}[/]: {problem['prompt']}  [green]({problem['answer']})[/]")
        for label, response in zip(("warm start", "Latent-GRPO"), pair, strict=True):
            console.print(f"  {label}")
            print_response(console, response, indent=4)
    console.print(summary_table(summary))
    console.print(f"{seconds:.0f} s; summary.json, metrics.jsonl, curves.png and both models are in {out}/")
    return summary


def measure(trainer: LatentGRPOTrainer, problems: list[Any]) -> dict[str, Any]:
    """Return the figures of the summary on the held-out problems."""
    result = evaluate(trainer.model, trainer.tokenizer, problems, trainer.sampling, batch_size=256)
    result.pop("samples")
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in result.items()}


def respond(trainer: LatentGRPOTrainer, problems: list[Any]) -> list[Response]:
    """Return a noise-free, greedy response to each problem."""
    sampling = LatentSampling(**{**vars(trainer.sampling), "noise": "none", "temperature": 0.0})
    prompts = [problem["prompt"] for problem in problems]
    ids, mask = encode_prompts(trainer.tokenizer, prompts, trainer.device, prompt_format=trainer.prompt_format)
    rollout = generate_latent(trainer.model, ids, mask, sampling)
    texts = visible_text(trainer.tokenizer, rollout, trainer.prompt_format.end_marker)
    return [
        Response(text, bool(rollout.finished[row]), mixtures(trainer.tokenizer, rollout, row))
        for row, text in enumerate(texts)
    ]


def write_files(out: Path, summary: dict[str, Any], device: torch.device) -> None:
    """Write summary.json, the metrics of both phases as one metrics.jsonl, and their curves."""
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    lines = "".join((out / phase / "metrics.jsonl").read_text() for phase in ("latent-sft", "latent-grpo"))
    (out / "metrics.jsonl").write_text(lines)
    caption = (
        f"latent-grpo quickstart --seed {summary['seed']} --loss_on {summary['loss_on']}: {summary['seconds']:.0f} s, "
        f"{device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}. Accuracy during training is on "
        f"{WATCHED_PROBLEMS} held-out problems."
    )
    draw_curves(out / "metrics.jsonl", out / "curves.png", caption=caption)


def summary_table(summary: dict[str, Any]) -> Table:
    """Return the table of figures before and after the reinforcement."""
    before, after = summary["latent_sft"], summary["latent_grpo"]
    table = Table(title=f"{after['problems']} held-out problems, noise-free")
    table.add_column("")
    table.add_column("warm start", justify="right")
    table.add_column("Latent-GRPO", justify="right")
    labels = {
        "pass_at_1": "Pass@1",
        "reasoning_steps": "reasoning steps",
        "response_length": "response length",
        "truncation_rate": "cut off by the limit",
    }
    for name, label in labels.items():
        table.add_row(label, f"{before[name]:.3f}", f"{after[name]:.3f}")
    table.add_row("read out of the gold chain", f"{before['gold_chain_accuracy']:.3f}", "")
    return table
