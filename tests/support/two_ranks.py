"""`latent-grpo train` in two forked processes with a fault: a JSON request per line in, the ends of both as JSON out.

A request is {"model", "data", "out", "fault", "options"}. The parent keeps the store, as torchrun does.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.distributed as dist

from latent_grpo.commands import train as _train  # so that no child has to import it  # noqa: F401
from latent_grpo.commands.main import run_command
from latent_grpo.parallel import heartbeat
from latent_grpo.trainer import LatentGRPOTrainer

FAULT_STEP, SILENT, ENDS = 2, 4.0, 60.0  # a step, seconds, seconds
fault = ""
trainer: Any = None


def reward(completions: list[str], trainer_state: Any, **columns: Any) -> list[float]:
    """Return random rewards. At a step, one of the two processes has its fault first."""
    steps = len(trainer_state.log_history)
    if steps == FAULT_STEP and os.environ["RANK"] == "1":
        if fault == "raise":
            raise OSError("the judge is down")
        if fault == "sleep":
            time.sleep(600)
        if fault == "disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        if fault == "nan":
            poison_optimizer()
        if fault.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, fault))
    return [random.random() for _ in completions]


def poison_optimizer() -> None:
    """Put a NaN into this rank's part of the optimizer's state."""
    for state in trainer.updater.optimizer.state.values():
        local = state["exp_avg"].to_local()
        if local.numel():
            local.view(-1)[0] = float("nan")
            return


def child(rank: int, port: int, request: dict[str, Any]) -> None:
    """Run the command as one of two processes."""
    global fault
    fault = request["fault"]
    torch.set_num_threads(1)
    heartbeat.SILENT_SECONDS, heartbeat.BEAT_SECONDS = SILENT, 0.2
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in own.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    words = {"model_name_or_path": request["model"], "dataset": request["data"], "output_dir": request["out"]}
    words |= request["options"]
    use_own_reward(LatentGRPOTrainer)
    os._exit(run_command("train", "latent-grpo train", [w for k, v in words.items() for w in (f"--{k}", str(v))]))


def use_own_reward(trainer_class: Any) -> None:
    """Let the trainer of the command use the reward of this process, whose fault is set."""
    original = trainer_class.__init__

    def init(self: Any, model: Any, reward_funcs: Any, *args: Any, **kwargs: Any) -> None:
        global trainer
        original(self, model, reward, *args, **kwargs)
        trainer = self

    trainer_class.__init__ = init


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Run two processes. Return their exit codes, seconds and what they printed on standard error."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    log, started = Path(request["out"] + ".log"), time.monotonic()
    children = []
    for rank in range(2):
        if (pid := os.fork()) == 0:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            child(rank, store.port, request)
        children.append(pid)
    codes: dict[int, int] = {}
    while len(codes) < 2 and time.monotonic() - started < ENDS:
        for rank, pid in enumerate(children):
            if rank not in codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(found[1])
        if request["fault"] == "SIGSTOP" and list(codes) == [0]:  # torchrun kills the others then
            os.kill(children[1], signal.SIGKILL)
        time.sleep(0.01)
    for rank in set(range(2)) - set(codes):
        os.kill(children[rank], signal.SIGKILL)
        os.waitpid(children[rank], 0)
    return {"codes": codes, "seconds": time.monotonic() - started, "log": log.read_text()}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
