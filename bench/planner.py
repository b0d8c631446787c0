"""Predicted against measured memory of training: `python -m bench.planner`, on a CPU.

A run of two updates of two micro-batches each, in a process of its own, with random weights and responses that run to
the limit; the measured figure is the highest resident memory beyond that of the same program with a minute model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

import torch

from bench.harness.memory import REPO, peak_extra_bytes
from latent_grpo import LatentGRPOConfig, LatentGRPOTrainer
from latent_grpo.commands.memory_plan import Plan, make_plan, model_size
from latent_grpo.quickstart.toy_task import make_tokenizer

CASES: dict[str, dict[str, Any]] = {
    "warm-up": {"layers": 1, "width": 32, "inner": 64, "heads": 2, "kv_heads": 1, "vocab": 256, "rows": 8, "steps": 4},
    "small": {
        "layers": 4, "width": 256, "inner": 1024, "heads": 8, "kv_heads": 8, "vocab": 8192, "rows": 64, "steps": 48,
    },
    "small, layers recomputed": {
        "layers": 8, "width": 256, "inner": 1024, "heads": 8, "kv_heads": 4, "vocab": 2048, "rows": 96, "steps": 48,
        "recomputed": True,
    },
    "small, wide rollout": {
        "layers": 4, "width": 256, "inner": 1024, "heads": 8, "kv_heads": 4, "vocab": 1024, "rows": 192, "steps": 32,
        "micro": 8,
    },
    "smollm2": {
        "layers": 30, "width": 576, "inner": 1536, "heads": 9, "kv_heads": 3, "vocab": 49152, "rows": 16, "steps": 24,
    },
}  # fmt: skip
PROMPT = 32  # tokens
MMAP_THRESHOLD = 65536  # bytes; glibc would keep larger freed tensors, and they would count as resident


def make_config(case: dict[str, Any]) -> Any:
    """The transformers configuration of a case."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=case["vocab"], hidden_size=case["width"], intermediate_size=case["inner"],
        num_hidden_layers=case["layers"], num_attention_heads=case["heads"], num_key_value_heads=case["kv_heads"],
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip


def options(case: dict[str, Any], folder: str) -> LatentGRPOConfig:
    """Two steps, with updates of two micro-batches, by default of half the rollout each."""
    return LatentGRPOConfig(
        output_dir=folder, max_steps=2, num_generations=4, generation_batch_size=case["rows"],
        per_device_train_batch_size=case.get("micro", case["rows"] // 2), gradient_accumulation_steps=2,
        max_prompt_length=PROMPT, max_completion_length=case["steps"], latent_top_k=10, group_filter=False,
        save_steps=0, dtype="float32", gradient_checkpointing=case.get("recomputed", False), log_table=False,
        old_logprobs="rollout",
        invalid="keep",  # no response ends, and a step without an advantage would not reach the loss
    )  # fmt: skip


def unequal_rewards(completions: list[Any], **_: Any) -> list[float]:
    """Rewards that leave nobody of a group of four without an advantage."""
    return [float((0, 1, 3, 7)[i % 4]) for i in range(len(completions))]


def train(case: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Make the model and take its two steps."""
    from transformers import LlamaForCausalLM

    tokenizer = make_tokenizer()
    problems = [{"prompt": "now " * PROMPT}] * case["rows"]
    with tempfile.TemporaryDirectory() as folder:
        model = LlamaForCausalLM(make_config(case)).eval()
        trainer = LatentGRPOTrainer(
            model, unequal_rewards, options(case, folder), problems, processing_class=tokenizer
        )  # fmt: skip
        for _ in range(2):
            batch, _ = trainer.collect()
            trainer.update(batch)
            trainer.step += 1
    return tuple(model.parameters())


def plan_of(name: str) -> Plan:
    """The prediction of a case."""
    return make_plan(model_size(make_config(CASES[name]), torch.float32), options(CASES[name], ""), "cpu")


def measured(name: str) -> int:
    """Peak bytes of a case, in this process."""
    train(CASES["warm-up"])  # what loads code and starts threads is no part of it
    return peak_extra_bytes(lambda: train(CASES[name]), torch.device("cpu"))


def measured_in_fresh_process(name: str) -> int:
    """Peak bytes of a case. RuntimeError with the last line of a process that fails."""
    path = os.pathsep.join(filter(None, (str(REPO), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "bench.planner", "--measure", name], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD)},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    return int(done.stdout.split()[-1])


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.planner", description=__doc__)
    parser.add_argument("--measure", choices=CASES, help="print the measured bytes of one case alone")
    chosen = parser.parse_args(arguments).measure
    if chosen:
        print(measured(chosen))
        return 0
    for name in list(CASES)[1:]:
        plan, found = plan_of(name), measured_in_fresh_process(name)
        parts = {phase: {k: round(v / 1e6, 1) for k, v in vars(plan)[phase].items()} for phase in ("rollout", "update")}
        print(json.dumps({"case": name, "predicted_mb": plan.peak / 1e6, "measured_mb": found / 1e6, **parts}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
