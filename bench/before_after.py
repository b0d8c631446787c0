"""A real model on real problems in a short slot.

    python -m bench.before_after --model M --train FILE --test gsm8k=FILE svamp=FILE --out DIR --minutes 10

Latent-SFT, an evaluation, Latent-GRPO, and the same evaluation again, each as the command that a user types and within
its share of the time. Training that has not ended by then is told to stop as by Ctrl-C, and the next part takes the
checkpoint that this leaves. DIR/before-after.json and .md hold Pass@1 and reasoning tokens before and after, the steps
that there was time for, and the commands; DIR/log.txt is all output.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.harness.memory import REPO
from bench.harness.report import write_whole
from latent_grpo.saving.checkpoint import checkpoints_in
from latent_grpo.watching.metrics import read_metrics
from latent_grpo.watching.tables import environment

SHARES = {"sft": 0.35, "before": 0.1, "train": 0.45, "after": 0.1}  # of the time
STOPPING = 120.0  # seconds for a checkpoint after the signal
MEASURES = ("pass_at_1", "reasoning_tokens", "truncation_rate")
PROJECT = ("-m", "latent_grpo")


class SlotError(Exception):
    """A part of the run that failed, in one line."""


@dataclass
class Slot:
    """Runs commands within their shares of the time and remembers them."""

    seconds: float
    log: Path
    commands: list[str] = field(default_factory=list)

    def run(self, share: str, *arguments: str, may_stop: bool = False) -> None:
        """One command of the project. SlotError where it fails, or has no end within its time and must have one."""
        self.commands.append(shlex.join(["latent-grpo", *arguments]))
        path = os.pathsep.join(filter(None, (str(REPO), os.environ.get("PYTHONPATH"))))
        with self.log.open("a") as output:
            output.write(f"\n$ {self.commands[-1]}\n")
            output.flush()
            process = subprocess.Popen(
                [sys.executable, *PROJECT, *arguments], stdout=output, stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": path},
            )  # fmt: skip
            try:
                code = process.wait(self.seconds * SHARES[share])
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
                code = process.wait(STOPPING)
            finally:
                process.kill()
        if code != 0 and not (may_stop and code == 130):
            raise SlotError(f"{arguments[0]} ended with exit code {code}; see {self.log}")


def trained(run: Path) -> tuple[Path, int]:
    """The model that a run left, finished or stopped, and its steps."""
    found = [run] if (run / "model.safetensors").exists() else checkpoints_in(run)[-1:]
    if not found:
        raise SlotError(f"{run.name} was stopped before its first step ended; give more --minutes")
    return found[0], int(read_metrics(run / "metrics.jsonl")[-1]["step"])


def before_after(options: argparse.Namespace) -> dict[str, Any]:
    """The whole run; the record of it."""
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    log.write_text("")
    slot, started = Slot(options.minutes * 60, log), time.time()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    shared = ["--dtype", options.dtype, "--device", device]
    lengths = ["--max_completion_length", str(options.max_completion_length)]
    data = ["--dataset", options.train, "--save_steps", "1000000", *lengths, *shared]
    top = ["--latent_top_k", str(options.latent_top_k)]

    def evaluate(share: str, model: Path) -> dict[str, Any]:
        report = out / share
        where = ["--data", *options.test, "--limit", str(options.limit), "--batch_size", str(options.batch_size)]
        slot.run(share, "eval", "--model", str(model), *where, *lengths, *shared, *top, "--out", str(report))
        results: dict[str, Any] = json.loads(Path(f"{report}.json").read_text())["results"]
        return {
            name: {key: found[key] for key in (*MEASURES, "problems", "intervals")} for name, found in results.items()
        }

    sft = ["sft", "--model_name_or_path", options.model, "--output_dir", str(out / "sft"), *data, *options.sft]
    slot.run("sft", *sft, may_stop=True)
    warm, sft_steps = trained(out / "sft")
    before = evaluate("before", warm)
    grpo = ["train", "--model_name_or_path", str(warm), "--output_dir", str(out / "grpo"), *data, *top, *options.grpo]
    slot.run("train", *grpo, may_stop=True)
    final, grpo_steps = trained(out / "grpo")
    after = evaluate("after", final)
    return {
        "model": options.model, "steps": {"sft": sft_steps, "grpo": grpo_steps}, "minutes": options.minutes,
        "seconds": time.time() - started, "environment": environment(torch.device(device)),
        "commands": slot.commands, "before": before, "after": after,
    }  # fmt: skip


def page(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    stamp, steps = record["environment"], record["steps"]
    lines = [
        f"# {record['model']}: Latent-SFT, then Latent-GRPO, in {record['minutes']:g} minutes", "",
        f"{steps['sft']} steps of Latent-SFT, {steps['grpo']} of Latent-GRPO; "
        + ", ".join(f"{name} {value}" for name, value in stamp.items()) + ".", "",
        "Noise-free Pass@1 with its 95% interval over problems, and reasoning tokens.", "",
        "| data | problems | Pass@1 before | after | reasoning tokens before | after |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for name, before in record["before"].items():
        after = record["after"][name]
        rates = [
            f"{x['pass_at_1']:.3f} [{', '.join(f'{bound:.3f}' for bound in x['intervals']['pass_at_1'])}]"
            for x in (before, after)
        ]
        tokens = [f"{x['reasoning_tokens']:.1f}" for x in (before, after)]
        lines.append(f"| {name} | {before['problems']} | {' | '.join(rates)} | {' | '.join(tokens)} |")
    return "\n".join([*lines, "", "```bash", *record["commands"], "```", ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 done, 1 a part failed, 2 bad arguments."""
    parser = argparse.ArgumentParser(prog="python -m bench.before_after", description=__doc__)
    parser.add_argument("--model", required=True, help="model folder or Hub name, before any warm start")
    parser.add_argument("--train", required=True, help="training data with chains of thought: file or Hub name")
    parser.add_argument("--test", nargs="+", required=True, help="data of `latent-grpo eval`, as gsm8k=FILE svamp=FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for runs and results, a new one")
    parser.add_argument("--minutes", type=float, default=10.0, help="time for all of it (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=200, help="problems of each test set (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=200, help="of the evaluations (default: %(default)s)")
    parser.add_argument("--latent_top_k", type=int, default=4, help="mixture size (default: %(default)s)")
    parser.add_argument("--max_completion_length", type=int, default=96, help="limit (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="precision (default: %(default)s)")
    parser.add_argument("--device", default=None, help="device; default: the GPU if there is one")
    for name, command in (("sft", "sft"), ("grpo", "train")):
        parser.add_argument(
            f"--{name}", type=shlex.split, default=[], metavar="FLAGS",
            help=f"more flags of `latent-grpo {command}`, as one word: '--learning_rate 1e-5'",
        )  # fmt: skip
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes is {options.minutes}: give a positive time")
    if options.out.exists() and any(options.out.iterdir()):
        parser.error(f"--out {options.out} is not empty: give a new folder")
    try:
        record = before_after(options)
    except SlotError as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 1
    write_whole(options.out / "before-after.json", json.dumps(record, indent=1) + "\n")
    write_whole(options.out / "before-after.md", page(record))
    print(page(record))
    print(f"wrote {options.out / 'before-after.md'} and before-after.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
