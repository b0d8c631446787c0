"""Predicted against measured memory of training, on a CPU: `python -m bench.planner`.

The measured run takes two updates of two micro-batches each, in a process of its own. Weights are random and responses
run to the limit. The measured figure is the highest resident memory beyond that of the same program with a minute
model.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from typing import Any

import torch

from bench.harness.memory import peak_extra_bytes
from bench.harness.processes import printed_integer
from latent_grpo import LatentGRPOConfig, LatentGRPOTrainer
from latent_grpo.commands.memory_plan import Plan, make_plan, model_size
from latent_grpo.quickstart.toy_task import make_tokenizer

# Cases in which the activations, the recomputed activations and the rollout's cache take most of the memory, and one of
# SmolLM2-135M's size.
CASES: dict[str, dict[str, Any]] = {
    "warm-up": dict(layers=1, width=32, inner=64, heads=2, kv_heads=1, vocab=256, rows=8, steps=4),
    "small": dict(layers=4, width=256, inner=1024, heads=8, kv_heads=8, vocab=8192, rows=64, steps=48),
    "small, layers recomputed": dict(
        layers=8, width=256, inner=1024, heads=8, kv_heads=4, vocab=2048, rows=96, steps=48, recomputed=True
    ),
    "small, wide rollout": dict(
        layers=4, width=256, inner=1024, heads=8, kv_heads=4, vocab=1024, rows=192, steps=32, micro=8
    ),
    "smollm2": dict(layers=30, width=576, inner=1536, heads=9, kv_heads=3, vocab=49152, rows=16, steps=24),
}
PROMPT = 32  # tokens per prompt
# Bytes from which glibc returns freed memory to the system at once. Its own threshold grows with the sizes that are
# freed, so freed tensors would stay resident and count as used.
MMAP_THRESHOLD = 65536


def make_config(case: dict[str, Any]) -> Any:
    """Return the transformers configuration of a case."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=case["vocab"],
        hidden_size=case["width"],
        intermediate_size=case["inner"],
        num_hidden_layers=case["layers"],
        num_attention_heads=case["heads"],
        num_key_value_heads=case["kv_heads"],
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )


def options(case: dict[str, Any], folder: str) -> LatentGRPOConfig:
    """Return the options of a case: two steps, each with two micro-batches, by default of half the rollout."""
    return LatentGRPOConfig(
        output_dir=folder,
        max_steps=2,
        num_generations=4,
        generation_batch_size=case["rows"],
        per_device_train_batch_size=case.get("micro", case["rows"] // 2),
        gradient_accumulation_steps=2,
        max_prompt_length=PROMPT,
        max_completion_length=case["steps"],
        latent_top_k=10,
        group_filter=False,
        save_steps=0,
        dtype="float32",
        gradient_checkpointing=case.get("recomputed", False),
        log_table=False,
        old_logprobs="rollout",
        invalid="keep",  # no response ends; without an advantage its steps would not reach the loss
    )


def unequal_rewards(completions: list[Any], **_: Any) -> list[float]:
    """Return rewards that give every response of a group of four an advantage other than 0."""
    return [float((0, 1, 3, 7)[i % 4]) for i in range(len(completions))]


def train(case: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Make the model, take its two steps and return its parameters."""
    from transformers import LlamaForCausalLM

    tokenizer = make_tokenizer()
    problems = [{"prompt": "now " * PROMPT}] * case["rows"]
    with tempfile.TemporaryDirectory() as folder:
        model = LlamaForCausalLM(make_config(case)).eval()
        args = options(case, folder)
        trainer = LatentGRPOTrainer(model, unequal_rewards, args, problems, processing_class=tokenizer)
        for _ in range(2):
            batch, _ = trainer.collect()
            trainer.update(batch)
            trainer.step += 1
    return tuple(model.parameters())


def plan_of(name: str) -> Plan:
    """Return the predicted memory of a case."""
    return make_plan(model_size(make_config(CASES[name]), torch.float32), options(CASES[name], ""), "cpu")


def measured(name: str) -> int:
    """Return the peak bytes of a case, measured in this process."""
    train(CASES["warm-up"])  # loads code and starts threads, which the plan does not count
    return peak_extra_bytes(lambda: train(CASES[name]), torch.device("cpu"))


def measured_in_fresh_process(name: str) -> int:
    """Return the peak bytes of a case. Raises RuntimeError with the last line of a process that fails."""
    return printed_integer("bench.planner", "--measure", name, MALLOC_MMAP_THRESHOLD_=str(MMAP_THRESHOLD))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.planner", description=__doc__)
    parser.add_argument("--measure", choices=CASES, help="print only the measured bytes of one case")
    chosen = parser.parse_args(arguments).measure
    if chosen:
        print(measured(chosen))
        return 0
    for name in list(CASES)[1:]:
        plan, peak = plan_of(name), measured_in_fresh_process(name)
        phases = {"rollout": plan.rollout, "update": plan.update}
        megabytes = {phase: {k: round(v / 1e6, 1) for k, v in parts.items()} for phase, parts in phases.items()}
        print(json.dumps({"case": name, "predicted_mb": plan.peak / 1e6, "measured_mb": peak / 1e6, **megabytes}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
