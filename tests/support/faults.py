"""Runs under random faults, restarted with `auto` until they end, and compared with runs that were left alone.

`python -m support.faults --kills 100` kills with SIGKILL only. `--faults --seconds 7200` draws from all faults:
SIGKILL, SIGTERM, a disk that takes no more (a limit of file sizes), a verifier that is put to sleep, and NaN in the
gradients. Both print counts as JSON. Run them in the folder `tests` with the repository on PYTHONPATH, with `--seed`
for another draw.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from latent_grpo import LatentGRPOConfig, LatentGRPOTrainer, LatentSFTConfig, LatentSFTTrainer
from latent_grpo.parallel.process_group import process_group, rank, world_size
from latent_grpo.quickstart.toy_task import make_model, make_tokenizer
from latent_grpo.rewards import math_verify_process
from latent_grpo.saving.integrity import checkpoints_in, newest_whole
from latent_grpo.saving.interrupt import Stopped
from support.killed_runs import ROWS, SFT, TRAIN, metrics_of, random_reward

KINDS = ("train", "sft", "ranks")  # ranks: train in two processes
FAULTS = ("kill", "kill", "term", "disk", "stall", "nan")
ENDS = 900.0  # seconds in which what is left of a run must end by itself; more on a machine that others use too
STOPPED = 143
CAUSES = {"term": "", "disk": "SaveError: ", "nan": "TrainingError: "}  # what the last lines name
LOG = 3000  # characters of a run's log that an error shows


def checked_reward(completions: list[str], **columns: Any) -> list[float]:
    """Return random rewards, of which some need math-verify's verdict."""
    n = sum(map(ord, "".join(completions)))  # seldom the same: verdicts are kept
    sure = float(math_verify_process.same_expression(f"(x+{n})(x+2)", f"x^2+{n + 2}x+{2 * n + n % 2}"))
    return [value + 0.1 * sure for value in random_reward(completions, **columns)]


def put_verifier_to_sleep() -> None:
    """Start math-verify's process and stop it: its next comparison stalls. The process after it has all its time."""
    math_verify_process.same_expression("x", "x")
    verifier: Any = math_verify_process._verifier
    reply = verifier._reply
    verifier._reply = lambda seconds: reply(0.3)
    verifier.process.send_signal(signal.SIGSTOP)


def bring(fault: str | None) -> None:
    """Let a fault of this process begin."""
    if fault == "disk":  # a write beyond the limit fails, as one to a full disk does
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    elif fault == "stall":
        put_verifier_to_sleep()


def train(kind: str, out: Path, fault: str | None, call: int, steps: int, verified: bool) -> None:
    """Train one run from the same start, or go on from the newest checkpoint.

    A fault of this process begins at a backward pass, the `call`-th, counted from 0. NaN comes from the last rank.
    """
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed=0)
    options: dict[str, Any] = dict(output_dir=str(out), save_steps=1, save_total_limit=2, max_skipped_updates=1)
    options |= dict(log_table=False)
    if kind == "sft":
        args = LatentSFTConfig(**{**SFT, **options, "max_steps": steps})
        trainer: Any = LatentSFTTrainer(model, args, ROWS, tokenizer)
    else:
        size = {"per_device_train_batch_size": 2} if kind == "ranks" else {}
        grpo = LatentGRPOConfig(**{**TRAIN, **options, **size, "max_rollouts": steps})
        reward = checked_reward if verified else random_reward
        trainer = LatentGRPOTrainer(model, reward, grpo, ROWS, ROWS[:4], tokenizer)
    calls, real = iter(range(10**9)), trainer.updater.backward

    def backward(loss: torch.Tensor) -> None:
        now = next(calls) == call
        if now:
            bring(fault)
        real(loss * float("nan") if now and fault == "nan" and rank() == world_size() - 1 else loss)

    trainer.updater.backward = backward
    trainer.train("auto")


def start(kind: str, out: Path, fault: str | None, call: int, steps: int, verified: bool) -> list[int]:
    """Start a run in one or two forked processes. Return their ids."""
    children, port = [], 0
    if kind == "ranks":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    for number in range(2 if kind == "ranks" else 1):
        if (child := os.fork()) == 0:
            try:
                log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
                os.dup2(log, 1)
                os.dup2(log, 2)
                faulthandler.dump_traceback_later(0.9 * ENDS)  # says where a process hangs
                # Of PyTorch, at every step. The limit of a full disk holds for the log too.
                warnings.filterwarnings("ignore", "FSDP2-wrapped module")
                if kind == "ranks":
                    own = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "MASTER_PORT": port}
                    os.environ |= {name: str(value) for name, value in own.items()} | {"MASTER_ADDR": "127.0.0.1"}
                with process_group():
                    train(kind, out, fault, call, steps, verified)
            except Stopped as stop:
                print(stop, file=sys.stderr, flush=True)
                os._exit(STOPPED)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        children.append(child)
    return children


def end(children: list[int], log: Path, fault: str | None, delay: float, rng: random.Random) -> list[int]:
    """Wait, at most until the fault's moment, and bring the fault. Return how each process ended: 0, or what else."""
    ends: dict[int, int] = {}
    deadline, limit, killed = time.monotonic() + delay, time.monotonic() + delay + ENDS, False
    while len(ends) < len(children):
        for child in children:
            if child not in ends:
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    ends[child] = os.waitstatus_to_exitcode(status)
        now = time.monotonic()
        if not killed and fault in ("kill", "term") and now > deadline:
            killed = True
            victims = [c for c in children if c not in ends]
            for child in victims if fault == "term" or rng.random() < 0.5 else victims[:1]:
                os.kill(child, signal.SIGTERM if fault == "term" else signal.SIGKILL)
        if now > limit:
            for child in children:
                if child not in ends:
                    os.kill(child, signal.SIGKILL)
            raise AssertionError(f"a process did not end in {ENDS} s after {fault}: {ends}\n{log.read_text()[-LOG:]}")
        time.sleep(0.002)
    return [ends[child] for child in children]


class Harness:
    """Undisturbed runs by kind, and what has happened in the disturbed ones."""

    def __init__(self, folder: Path, seed: int, steps: int, verified: bool) -> None:
        self.folder, self.rng, self.steps, self.verified = folder, random.Random(seed), steps, verified
        self.counts: Counter[str] = Counter()
        self.seconds: dict[str, float] = {}
        self.number = 0

    def whole(self, kind: str) -> Path:
        """Return the folder of an undisturbed run, which is trained at the first call."""
        out = self.folder / f"whole-{kind}"
        if kind not in self.seconds:
            started = time.monotonic()
            children = start(kind, out, None, 0, self.steps, self.verified)
            assert not any(end(children, out.with_suffix(".log"), None, 0.0, self.rng)), out
            self.seconds[kind] = time.monotonic() - started
        return out

    def disturbed(self, kind: str, faults: tuple[str, ...], most: int) -> None:
        """Train one run with up to `most` faults, one after another, and compare it with the undisturbed one."""
        expected, self.number = self.whole(kind), self.number + 1
        out, had = self.folder / f"run-{self.number}", False
        log = out.with_suffix(".log")
        for left in range(most, -1, -1):
            fault = self.rng.choice(faults) if left else None
            if fault == "stall" and (kind == "sft" or not self.verified):  # nothing asks the verifier
                fault = "kill"
            delay = self.rng.uniform(0.0, self.seconds[kind])
            call = self.rng.randrange(2 * self.steps)
            children = start(kind, out, fault, call, self.steps, self.verified)
            ends = end(children, log, fault, delay, self.rng)
            good = newest_whole(out) is not None
            assert good or not had, f"{out}: {fault} left no good checkpoint"
            had = good
            new = log.read_text()
            log.unlink()
            # It ends no run. A verifier that is asked nothing, since the run is stopped or at its end, stalls nobody.
            if fault == "stall" and "trying again" in new:
                self.counts[f"{kind}: stall"] += 1
            assert "taken for wrong" not in new, f"{out}: a comparison was lost\n{new[-LOG:]}"
            assert "Traceback" not in new, f"{out}: ended with {ends} after {fault}\n{new[-LOG:]}"
            if not any(ends):
                self.counts[f"{kind}: ended"] += 1
                break
            cause = CAUSES.get(fault or "", "no fault ends a run so")
            assert fault == "kill" or cause in new, f"{out}: ended with {ends} after {fault}\n{new[-LOG:]}"
            self.counts[f"{kind}: {fault}"] += 1
            if checkpoints_in(out):
                self.counts["restarts from a checkpoint"] += 1
        pairs = zip(metrics_of(out), metrics_of(expected), strict=True)
        differ = [(a.get("step"), k, a.get(k), b.get(k)) for a, b in pairs for k in a | b if a.get(k) != b.get(k)]
        assert not differ, f"{out}: other metrics than {expected}: {differ[:6]}\n{new[-LOG:]}"
        same = (out / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
        assert same, f"{out}: other weights than {expected}"
        left_over = sorted(str(path.relative_to(out)) for path in out.rglob(".*"))
        assert not left_over, f"{out}: left {left_over}"
        self.counts["runs equal to the undisturbed one"] += 1
        shutil.rmtree(out)

    def kills(self) -> int:
        """Return the number of faults so far: those that ended a run, and comparisons that stalled."""
        return sum(count for name, count in self.counts.items() if ": " in name and "ended" not in name)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the faults that the arguments ask for, and print the counts."""
    global ENDS
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10**9, help="Stop after so many faults.")
    parser.add_argument("--seconds", type=float, default=1e9, help="Start no further run after so long.")
    parser.add_argument("--faults", action="store_true", help="Draw from all faults, not only SIGKILL.")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--steps", type=int, default=6, help="Steps of a run.")
    parser.add_argument("--most", type=int, default=6, help="Faults of a run, at most.")
    parser.add_argument("--ends", type=float, default=ENDS, help="Seconds in which a run must end after a fault.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    ENDS = args.ends
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        harness = Harness(Path(folder), args.seed, args.steps, verified=args.faults)
        number = 0
        while harness.kills() < args.kills and time.monotonic() - started < args.seconds:
            kind = args.kinds[number % len(args.kinds)]
            number += 1
            harness.disturbed(kind, FAULTS if args.faults else ("kill",), args.most)
            line = {"seconds": round(time.monotonic() - started), "faults": harness.kills(), **harness.counts}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
