"""Train in forked children that are killed with SIGKILL: a JSON request per line in, the child's end as JSON out.

One process imports the libraries once and stays single-threaded, so that a fork is safe. A request is {"kind": "train"
or "sft", "options": {...}, "resume": bool, "kill": {"function", "call", "torn"} or {"lines", "seconds"} or null}.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch

from latent_grpo import LatentGRPOConfig, LatentGRPOTrainer, LatentSFTConfig, LatentSFTTrainer
from latent_grpo.quickstart.toy_task import make_model, make_problems, make_tokenizer
from latent_grpo.saving import checkpoint as checkpoint_module

ROWS = make_problems(20, seed=1)
TRAIN = dict(
    latent_top_k=2,
    num_generations=4,
    generation_batch_size=8,
    per_device_train_batch_size=4,
    max_completion_length=6,
    learning_rate=1e-3,
    num_iterations=2,
    lr_scheduler_type="cosine",
    warmup_steps=2,
    invalid="keep",
    max_generation_batches=2,
    save_steps=2,
    max_rollouts=6,
)
SFT = dict(
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    gumbel_scale=0.5,
    answer_template="{answer}",
    learning_rate=1e-3,
    lr_scheduler_type="linear",
    save_steps=2,
    max_steps=6,
)


def random_reward(completions: list[str], **columns: Any) -> list[float]:
    """Draw a reward from every global random stream."""
    draws = [random.random() + np.random.rand() + float(torch.rand(())) for _ in completions]
    return [float(draw > 1.5) + 0.01 * len(text) for draw, text in zip(draws, completions, strict=True)]


def metrics_of(run: Path) -> list[dict[str, float]]:
    """Return the metrics of a run, without times."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    times = ("time_", "step_time", "tokens_per_second")
    return [{k: v for k, v in row.items() if not k.startswith(times)} for row in rows]


def train(kind: str, options: dict[str, Any], resume: bool) -> None:
    """Train one run from the same start; with `resume`, go on from the newest checkpoint."""
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed=0)
    model.config.attention_dropout = 0.1  # draws random numbers in training mode, that is in the warm start only
    if kind == "train":
        args = LatentGRPOConfig(**{**TRAIN, **options})
        trainer: Any = LatentGRPOTrainer(model, random_reward, args, ROWS, ROWS[:4], tokenizer)
    else:
        trainer = LatentSFTTrainer(model, LatentSFTConfig(**{**SFT, **options}), ROWS, tokenizer)
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.1
    trainer.train(resume_from_checkpoint=True if resume else None)


def arm(function: str, call: int, torn: bool = False) -> None:
    """Kill this process at a call, counted from 1, of a function by checkpoint.py.

    function: "os.replace", "shutil.rmtree" or "torch.save". With `torn`, `torch.save` leaves half a file first, and
    `shutil.rmtree` a part of the folder.
    """
    module_name, name = function.split(".")
    module = getattr(checkpoint_module, module_name)
    original, calls = getattr(module, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        # Other modules use the same functions. Their calls do not count.
        calls += sys._getframe(1).f_globals.get("__name__") == checkpoint_module.__name__
        if calls == call:
            if torn and name == "rmtree":
                (Path(args[0]) / "model.safetensors").unlink()
            elif torn:
                original(*args, **kwargs)
                path = Path(args[1])
                os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(module, name, counted)


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Fork, train in the child, kill it as the request asks. Return its exit code or its signal."""
    kill = request["kill"] or {}
    child = os.fork()
    if child == 0:
        try:
            os.dup2(2, 1)  # standard output belongs to the answers
            if "function" in kill:
                arm(**kill)
            train(request["kind"], request["options"], request["resume"])
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if "lines" in kill:
        metrics = Path(request["options"]["output_dir"]) / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count("\n") < kill["lines"]:
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            time.sleep(0.005)
        time.sleep(kill["seconds"])
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return {"signal": os.WTERMSIG(status)} if os.WIFSIGNALED(status) else {"code": os.WEXITSTATUS(status)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
