"""`latent-grpo quickstart`: the whole pipeline on a made-up task, without a download.

It makes problems and a tiny model, warms it up on worked examples, trains it with Latent-GRPO for right answers, and
evaluates on held-out problems. A second reinforcement from the same warm start has its loss on latent steps only. It
says how much of the gain the latent steps carry.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from latent_grpo.config import LatentGRPOConfig, LatentSampling, LatentSFTConfig
from latent_grpo.errors import ConfigError
from latent_grpo.evaluation import evaluate
from latent_grpo.prompts import encode_prompts
from latent_grpo.quickstart.worlds import WORLDS
from latent_grpo.rollout.generate import generate_latent
from latent_grpo.rollout.trajectory import visible_text
from latent_grpo.sft import LatentSFTTrainer, build_examples, gold_chain_accuracy
from latent_grpo.trainer import LatentGRPOTrainer
from latent_grpo.watching.curves import draw_curves
from latent_grpo.watching.responses import Response, mixtures, print_response

TRAIN_PROBLEMS, HELD_OUT_PROBLEMS = 20_000, 1_000
WATCHED_PROBLEMS = 200  # held-out problems that are evaluated during training
SHOWN_PROBLEMS = 3  # held-out problems whose responses are printed
DTYPE: Literal["float32"] = "float32"  # of the tiny model on any device
LATENT_ONLY = "latent_grpo_on_latent"  # in the summary: the reinforcement whose loss is on latent steps only


def sft_config(out: Path, seed: int, world: str = "graph") -> LatentSFTConfig:
    """Return the options of the warm start."""
    return LatentSFTConfig(
        output_dir=str(out / "latent-sft"),
        dtype=DTYPE,
        seed=seed,
        compression=2,
        answer_template="{answer}",
        lr_scheduler_type="linear",
        max_completion_length=16,
        log_table=False,
        **WORLDS[world].sft,
    )


def grpo_config(out: Path, seed: int, loss_on: Any, world: str = "graph") -> LatentGRPOConfig:
    """Return the options of the reinforcement."""
    return LatentGRPOConfig(
        output_dir=str(out / "latent-grpo"),
        dtype=DTYPE,
        seed=seed,
        loss_on=loss_on,
        latent_top_k=2,
        lr_scheduler_type="linear",
        num_generations=8,
        generation_batch_size=512,
        max_generation_batches=1,
        max_completion_length=12,
        old_logprobs="rollout",
        save_steps=0,
        **WORLDS[world].grpo,
    )


def base_model(world: str, options: LatentSFTConfig, tokenizer: Any, problems: Sequence[Any]) -> Any:
    """Return the model from which a warm start of a world begins: a new one, or one trained on searches in text.

    options: those of the warm start.
    """
    task = WORLDS[world]
    model = task.model(tokenizer, options.seed)
    if task.base_share:
        steps, folder = max(1, round(task.base_share * options.max_steps)), f"{options.output_dir}-base"
        text = replace(options, latent=False, max_steps=steps, output_dir=folder)
        LatentSFTTrainer(model, text, with_searches(problems), tokenizer).train()
    return model


def with_searches(problems: Sequence[Any]) -> list[Any]:
    """Return the problems with their searches as chains."""
    return [{**row, "chain": row["search"]} for row in problems]


def quickstart(out: Path, *, seed: int = 0, loss_on: str | None = None, world: str = "graph") -> dict[str, Any]:
    """Run the whole pipeline into the folder `out` and return its summary.

    loss_on: steps that carry the policy loss. The default is one run with all of them and one with the latent ones.

    Raises ConfigError if `out` already holds a quickstart.
    """
    if (out / "summary.json").exists():
        raise ConfigError(f"{str(out)!r} already holds a run; choose another --out")
    started = time.perf_counter()
    console = Console(highlight=False)
    torch.manual_seed(seed)
    task = WORLDS[world]
    problems = task.problems(TRAIN_PROBLEMS + HELD_OUT_PROBLEMS, seed)
    train, held_out = problems[HELD_OUT_PROBLEMS:], problems[:HELD_OUT_PROBLEMS]
    console.print(f"[bold]{len(train)} problems[/] and {HELD_OUT_PROBLEMS} held out, {task.about} For example:")
    console.print(train[0]["prompt"], markup=False)

    tokenizer = task.tokenizer()
    sft_args = sft_config(out, seed, world)
    model = base_model(world, sft_args, tokenizer, train)
    LatentSFTTrainer(model, sft_args, task.examples(train, seed), tokenizer).train()
    gold = gold_chain_accuracy(model, build_examples(tokenizer, held_out, sft_args))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    grpo_args = grpo_config(out, seed, loss_on or "all", world)
    trainer = LatentGRPOTrainer(model, None, grpo_args, train, held_out[:WATCHED_PROBLEMS], tokenizer)
    before = {**measure(trainer, held_out), "gold_chain_accuracy": gold}
    responses_before = respond(trainer, held_out[:SHOWN_PROBLEMS])
    trainer.train()
    summary: dict[str, Any] = {"latent_sft": before, "latent_grpo": measure(trainer, held_out)}
    responses_after = respond(trainer, held_out[:SHOWN_PROBLEMS])
    if loss_on is None:
        model.load_state_dict(start)
        only = replace(grpo_config(out, seed, "latent", world), output_dir=str(out / "latent-grpo-on-latent"))
        trainer = LatentGRPOTrainer(model, None, only, train, held_out[:WATCHED_PROBLEMS], tokenizer)
        trainer.train()
        summary[LATENT_ONLY] = measure(trainer, held_out)

    seconds = round(time.perf_counter() - started, 1)
    summary |= {"world": world, "loss_on": loss_on or "all", "seed": seed, "seconds": seconds}
    write_files(out, summary, trainer.device)
    for number, (problem, *pair) in enumerate(zip(held_out, responses_before, responses_after, strict=False), 1):
        console.print(f"\n[bold]Problem {number}[/]: {problem['prompt']}  [green]({problem['answer']})[/]")
        for label, response in zip(("warm start", "Latent-GRPO"), pair, strict=True):
            console.print(f"  {label}")
            print_response(console, response, indent=4)
    console.print(summary_table(summary))
    console.print(f"{task.headroom} {gain_line(summary)}".rstrip())
    console.print(f"{seconds:.0f} s; summary.json, metrics.jsonl, curves.png and the models are in {out}/")
    return summary


def gain_line(summary: dict[str, Any]) -> str:
    """Return how much of the gain remains when only latent steps carry the loss, or nothing if that was not run."""
    if LATENT_ONLY not in summary:
        return ""
    start, every, latent = (summary[name]["pass_at_1"] for name in ("latent_sft", "latent_grpo", LATENT_ONLY))
    return f"Reinforcement adds {every - start:+.3f}; with the loss on latent steps only, {latent - start:+.3f}."


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
        f"latent-grpo quickstart --world {summary['world']} --seed {summary['seed']}, loss on {summary['loss_on']} "
        f"steps: {summary['seconds']:.0f} s, "
        f"{device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}. Accuracy during training is on "
        f"{WATCHED_PROBLEMS} held-out problems."
    )
    draw_curves(out / "metrics.jsonl", out / "curves.png", caption=caption)


def summary_table(summary: dict[str, Any]) -> Table:
    """Return the table of figures before and after the reinforcement."""
    columns = {"warm start": "latent_sft", "Latent-GRPO": "latent_grpo", "on latent steps": LATENT_ONLY}
    columns = {heading: name for heading, name in columns.items() if name in summary}
    before = summary["latent_sft"]
    table = Table(title=f"{before['problems']} held-out problems, noise-free")
    table.add_column("")
    for heading in columns:
        table.add_column(heading, justify="right")
    labels = {
        "pass_at_1": "Pass@1",
        "reasoning_steps": "reasoning steps",
        "response_length": "response length",
        "truncation_rate": "cut off by the limit",
    }
    for name, label in labels.items():
        table.add_row(label, *(f"{summary[column][name]:.3f}" for column in columns.values()))
    table.add_row("read out of the gold chain", f"{before['gold_chain_accuracy']:.3f}")
    return table
