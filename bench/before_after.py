"""A real model on real problems in a short slot.

    python -m bench.before_after --model M --train FILE --test gsm8k=FILE svamp=FILE --out DIR --minutes 10

Runs a warm start, an evaluation, Latent-GRPO and the same evaluation again. Each is the command that a user types,
within its share of the time. Training that has not ended by then is stopped as by Ctrl-C, and the next command takes
the checkpoint that it leaves. DIR/before-after.json and .md hold Pass@1 and lengths before and after, the number of
steps that the time allowed, and the commands. DIR/log.txt holds all output.
"""

from __future__ import annotations

import argparse
import json
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

from bench.harness.processes import environment_of_checkout
from latent_grpo.saving.atomic_files import write_whole
from latent_grpo.saving.checkpoint import checkpoints_in
from latent_grpo.watching.environment import environment
from latent_grpo.watching.metrics import read_metrics

SHARES = {"sft": 0.35, "before": 0.1, "train": 0.45, "after": 0.1}  # of --minutes
STOPPING = 120.0  # seconds to write a checkpoint after the signal
LENGTHS = ("reasoning_steps", "response_length")
MEASURES = ("pass_at_1", *LENGTHS, "truncation_rate")


class SlotError(Exception):
    """A command of the run failed or had too little time, in one line."""


@dataclass
class Slot:
    """Runs commands within their shares of the time and records them."""

    seconds: float
    log: Path
    commands: list[str] = field(default_factory=list)

    def run(self, share: str, *arguments: str, may_stop: bool = False) -> None:
        """Run one command of the project, and stop it as by Ctrl-C after its share of the time.

        Raises SlotError if the command fails, or if it was stopped although `may_stop` is False.
        """
        self.commands.append(shlex.join(["latent-grpo", *arguments]))
        with self.log.open("a") as output:
            output.write(f"\n$ {self.commands[-1]}\n")
            output.flush()  # before the process writes to the same file
            process = subprocess.Popen(
                [sys.executable, "-m", "latent_grpo", *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment_of_checkout(),
            )
            try:
                code = process.wait(self.seconds * SHARES[share])
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
                code = process.wait(STOPPING)
            finally:
                process.kill()  # does nothing to a process that has ended
        if code != 0 and not (may_stop and code == 130):  # 130: interrupted, a checkpoint is left
            raise SlotError(f"{arguments[0]} ended with exit code {code}; see {self.log}")


def trained(run: Path) -> tuple[Path, int]:
    """Return the model that a finished or stopped run left, and its number of steps."""
    models = [run] if (run / "model.safetensors").exists() else checkpoints_in(run)[-1:]
    if not models:
        raise SlotError(f"{run.name} was stopped before its first step ended; give more --minutes")
    return models[0], int(read_metrics(run / "metrics.jsonl")[-1]["step"])


def before_after(options: argparse.Namespace) -> dict[str, Any]:
    """Run all four commands and return the record of the run."""
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    log.write_text("")
    slot, started = Slot(options.minutes * 60, log), time.time()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    shared = ["--dtype", options.dtype, "--device", device]
    shared += ["--max_completion_length", str(options.max_completion_length)]
    # No checkpoint on the way: they cost time, and stopping writes one.
    data = ["--dataset", options.train, "--save_steps", "1000000", *shared]
    top = ["--latent_top_k", str(options.latent_top_k)]

    def evaluate(share: str, model: Path) -> dict[str, Any]:
        report = out / share
        where = ["--data", *options.test, "--limit", str(options.limit), "--batch_size", str(options.batch_size)]
        slot.run(share, "eval", "--model", str(model), *where, *shared, *top, "--out", str(report))
        results: dict[str, Any] = json.loads(Path(f"{report}.json").read_text())["results"]
        kept = (*MEASURES, "problems", "intervals")
        return {name: {key: result[key] for key in kept} for name, result in results.items()}

    sft = ["sft", "--model_name_or_path", options.model, "--output_dir", str(out / "sft"), *data, *options.sft]
    slot.run("sft", *sft, may_stop=True)
    warm, sft_steps = trained(out / "sft")
    before = evaluate("before", warm)
    grpo = ["train", "--model_name_or_path", str(warm), "--output_dir", str(out / "grpo"), *data, *top, *options.grpo]
    slot.run("train", *grpo, may_stop=True)
    final, grpo_steps = trained(out / "grpo")
    after = evaluate("after", final)
    return {
        "model": options.model,
        "steps": {"sft": sft_steps, "grpo": grpo_steps},
        "minutes": options.minutes,
        "seconds": time.time() - started,
        "environment": environment(torch.device(device)),
        "commands": slot.commands,
        "before": before,
        "after": after,
    }


def page(record: dict[str, Any]) -> str:
    """Return the record as Markdown."""
    stamp, steps = record["environment"], record["steps"]
    lines = [
        f"# {record['model']}: warm start (uniform targets), then Latent-GRPO, in {record['minutes']:g} minutes",
        "",
        f"{steps['sft']} steps of the warm start, {steps['grpo']} of Latent-GRPO; "
        + ", ".join(f"{name} {value}" for name, value in stamp.items())
        + ".",
        "",
        "Noise-free Pass@1 with its 95% interval over problems, reasoning steps, and the length of the response.",
        "",
        "| data | problems | Pass@1 before | after | reasoning steps before | after | response length before | after |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, before in record["before"].items():
        both = (before, record["after"][name])
        rates = [f"{x['pass_at_1']:.3f} [{_bounds(x['intervals']['pass_at_1'])}]" for x in both]
        steps = [f"{x[length]:.1f}" for length in LENGTHS for x in both]
        lines.append(f"| {name} | {before['problems']} | {' | '.join(rates)} | {' | '.join(steps)} |")
    return "\n".join([*lines, "", "```bash", *record["commands"], "```", ""])


def _bounds(interval: Sequence[float]) -> str:
    return ", ".join(f"{bound:.3f}" for bound in interval)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Return 0 if all is done, 1 if a command failed, 2 for bad arguments."""
    parser = _parser()
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.before_after",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="model folder or Hub name, before any warm start")
    add("--train", required=True, help="training data with chains of thought: file or Hub name")
    add("--test", nargs="+", required=True, help="data of `latent-grpo eval`, such as gsm8k=FILE svamp=FILE")
    add("--out", type=Path, required=True, metavar="DIR", help="new folder for runs and results")
    add("--minutes", type=float, default=10.0, help="time for all commands (default: %(default)s)")
    add("--limit", type=int, default=200, help="problems per test set (default: %(default)s)")
    add("--batch_size", type=int, default=200, help="batch size of the evaluations (default: %(default)s)")
    add("--latent_top_k", type=int, default=4, help="components of a latent step (default: %(default)s)")
    add("--max_completion_length", type=int, default=96, help="most steps of a response (default: %(default)s)")
    add("--dtype", default="bfloat16", help="precision (default: %(default)s)")
    add("--device", default=None, help="device (default: the GPU if there is one)")
    for name, command in (("sft", "sft"), ("grpo", "train")):
        text = f"more flags of `latent-grpo {command}`, as one word: '--learning_rate 1e-5'"
        add(f"--{name}", type=shlex.split, default=[], metavar="FLAGS", help=text)
    return parser


if __name__ == "__main__":
    sys.exit(main())
