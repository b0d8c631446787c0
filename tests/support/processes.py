"""Jobs that one and several processes train, how they are started, and how two runs are compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from support import PYTHONPATH
from support import tolerances as tol

TRAIN = dict(
    latent_top_k=2,
    num_generations=4,
    generation_batch_size=16,
    per_device_train_batch_size=8,
    learning_rate=1e-4,
    max_completion_length=6,
    max_generation_batches=3,
    max_rollouts=4,
    save_steps=0,
    log_completions=True,
    invalid="keep",
)
SFT = dict(
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    gumbel_scale=0.5,
    answer_template="{answer}",
    learning_rate=1e-4,
    max_steps=4,
    save_steps=0,
)


def train_job(model: str | dict[str, Any], **options: Any) -> dict[str, Any]:
    """Return a job of Latent-GRPO from a model of WARM, or from a new tiny model with these options."""
    return {"kind": "train", "model": model, "options": {**TRAIN, **options}}


def sft_job(**options: Any) -> dict[str, Any]:
    """Return a warm-start job from a new tiny model."""
    return {"kind": "sft", "model": {}, "options": {**SFT, **options}}


ENCODE = dict(
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    answer_template="{answer}",
    learning_rate=1e-4,
    label_size=4,
    read_back_rows=5,
    read_back_steps=2,
    max_steps=4,
    save_steps=2,
)


def encode_job(**options: Any) -> dict[str, Any]:
    """Return a job of encode's phase `union`, of two new tiny models."""
    return {"kind": "encode", "model": {}, "options": {**ENCODE, **options}}


LONG_WARM_START = dict(learning_rate=3e-3, max_steps=30, per_device_train_batch_size=16, gumbel_scale=0.0)
WARM = {  # models whose responses end, at different lengths
    name: {**sft_job(**LONG_WARM_START), "model": {"tied": name == "tied"}} for name in ("tied", "untied")
}
HOT_TEXT = dict(latent=False, temperature=4.0, top_k=0, top_p=1.0)  # responses that end at any step
JOBS: dict[str, dict[str, Any]] = {
    "penalty, two passes": train_job("tied", beta=0.04, num_iterations=2, eval_steps=2, save_steps=2),
    "untied, trained embeddings, recomputed layers": train_job(
        "untied",
        loss_type="grpo",
        freeze_embeddings=False,
        gradient_checkpointing=True,
        micro_batch_tokens=60,
        scale_rewards="batch",
    ),
    "few groups, sequence ratios": train_job(
        "tied", loss_type="gspo", generation_batch_size=8, per_device_train_batch_size=2
    ),
    "drawn tokens, a ratio for each": train_job(
        "untied", method="multiplex", latent_top_p=1.0, importance_sampling_level="component", beta=0.04
    ),
    "text, token sums, entropy": train_job("tied", latent=False, loss_type="dr_grpo", entropy_coef=0.01),
    "adapters": train_job("tied", use_peft=True, lora_r=3, beta=0.04, save_steps=2),
    "responses of one step": train_job(
        "untied", **HOT_TEXT, per_device_train_batch_size=2, max_completion_length=3, max_rollouts=12
    ),
    "warm start": sft_job(save_steps=2),
    "warm start, recomputed layers": sft_job(gradient_checkpointing=True),
    "soft labels": sft_job(targets="soft_labels", gumbel_scale=1.0),
    "encoder and decoder": encode_job(),
    "encoder and decoder, adapters": encode_job(use_peft=True, lora_r=3, save_steps=0, gradient_checkpointing=True),
}
COARSE = {  # two numbers of processes round its gradients in different places
    "bfloat16": train_job("tied", dtype="bfloat16", save_steps=2)
}
RESUMED = ("penalty, two passes", "adapters", "warm start", "encoder and decoder")
# Statistics are means over a micro-batch, averaged with its share of the steps. So they depend on the micro-batches.
STATISTICS = {"clip_ratio/region_mean", "clip_ratio/dual_mean", "approx_kl", "kl", "entropy", "latent/margin_crossed"}


def torchrun(processes: int, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of Python in a number of processes, and wait for its end."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    arguments = [sys.executable, *(several if processes > 1 else []), *command]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=600)


def launch(folder: Path, processes: int, jobs: Sequence[dict[str, Any]]) -> None:
    """Run jobs of `support.ranks` in a number of processes."""
    request = folder / f"jobs-{processes}.json"
    request.write_text(json.dumps(jobs))
    done = torchrun(processes, "-m", "support.ranks", str(request))
    assert done.returncode == 0, done.stderr[-6000:]


def at(job: dict[str, Any], out: Path, warm: Path, **changes: Any) -> dict[str, Any]:
    """Return a job that writes to `out` and finds its warm model below `warm`."""
    model = str(warm / job["model"]) if isinstance(job["model"], str) else job["model"]
    return {**job, "model": model, "options": {**job["options"], "output_dir": str(out)}, **changes}


def parameters(run: Path) -> dict[str, torch.Tensor]:
    """Return the full parameters that a job trained."""
    return load_file(run / "parameters.safetensors")


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return the metrics of a run, without times."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    ignored = ("time_", "step_time", "tokens_per_second", "phase")
    return [{k: v for k, v in row.items() if not k.startswith(ignored)} for row in rows]


def distance(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Return the Euclidean distance of two sets of parameters."""
    return float(sum((left[name] - right[name]).square().sum() for name in left)) ** 0.5


def assert_same_run(run: Path, other: Path) -> None:
    """Compare the parameters of two runs, and their metrics at every step."""
    actual, expected = parameters(run), parameters(other)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=tol.TRAINING_STEP)
    for row, expected_row in zip(metrics(run), metrics(other), strict=True):
        assert row.keys() == expected_row.keys()
        for key in row.keys() - STATISTICS:
            assert row[key] == pytest.approx(expected_row[key], rel=tol.SEVERAL_UPDATES, abs=1e-4), key
        for key in row.keys() & STATISTICS:
            assert row[key] == pytest.approx(expected_row[key], rel=0.1, abs=3e-3), key


def assert_half_is_held(run: Path) -> None:
    """Check that a rank of two held about half of the trained parameters."""
    held = json.loads((run / "held.json").read_text())
    assert held["world"] == 2
    assert 0.45 * held["full"] < held["held"] < 0.6 * held["full"]
