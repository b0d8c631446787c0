"""Training jobs for tests of several processes: `python -m support.ranks FILE`, by itself or under torchrun.

FILE is a JSON list of jobs: {"kind": "train", "sft" or "encode", "model": a folder, {options of the tiny model} or
{"architecture": one of `support.models`}, "options": {...}, "resume": a checkpoint folder or null}. Every rank runs
every job. In the `output_dir` of a job, rank 0 adds `parameters.safetensors`, the full parameters of the trained model,
and `held.json`, how many of them a rank held.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from safetensors.torch import save_file

from latent_grpo import LatentGRPOConfig, LatentGRPOTrainer, LatentSFTConfig, LatentSFTTrainer
from latent_grpo.config import EncodeConfig
from latent_grpo.model import load_model
from latent_grpo.parallel.fsdp import full_tensor
from latent_grpo.parallel.process_group import all_reduce_max, on_rank_zero, process_group, rank, world_size
from latent_grpo.prompts import PromptFormat
from latent_grpo.quickstart.toy_task import make_model, make_problems, make_tokenizer
from latent_grpo.sft.chain_model import ChainModel
from latent_grpo.sft.encode import Phase
from latent_grpo.sft.soft_labels import SoftLabels, join_rows, write_soft_labels
from support.models import tiny

ROWS = make_problems(30, seed=1)


def uneven(visible_text: list[str], answer: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Reward right answers, lengths and the last token together, so that groups disagree."""
    return [
        float(text == right) + 0.1 * len(ids) + 0.01 * (ids[-1] % 7)
        for text, right, ids in zip(visible_text, answer, completion_ids, strict=True)
    ]


def random_labels(vocab: int) -> SoftLabels:
    """Return random soft labels of four components for ROWS, of one to three steps each."""
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(1 + number % 3, vocab, generator=generator).topk(4) for number in range(len(ROWS))]
    return join_rows([(highest.values.softmax(-1), highest.indices) for highest in scores], "test")


def run(job: dict[str, Any]) -> None:
    """Run one job on this rank."""
    tokenizer = make_tokenizer()
    given, options, out = job["model"], dict(job["options"]), Path(job["options"]["output_dir"])
    dtype = options.get("dtype", "float32")
    if isinstance(given, str):
        model = load_model(given, dtype)
    elif "architecture" in given:
        model = tiny(given["architecture"], len(tokenizer))
    else:
        model = make_model(tokenizer, seed=0, **given)
    # An update has the same size on any number of ranks.
    options["per_device_train_batch_size"] = options["per_device_train_batch_size"] // world_size()
    if job["kind"] == "train":
        trainer: Any = LatentGRPOTrainer(model, uneven, LatentGRPOConfig(**options), ROWS, ROWS[:5], tokenizer)
    elif job["kind"] == "encode":
        args = EncodeConfig(**options)
        model = ChainModel(model, make_model(tokenizer, seed=1), None, ("encoder", "decoder"), args)
        trainer = Phase("union", model, args, ROWS, tokenizer, PromptFormat())
    else:
        if options.get("targets") == "soft_labels":
            options["soft_labels"] = str(out / "labels")
            on_rank_zero(lambda: write_soft_labels(out / "labels", random_labels(len(tokenizer))))
        trainer = LatentSFTTrainer(model, LatentSFTConfig(**options), ROWS, tokenizer)
    trainer.train(resume_from_checkpoint=job.get("resume"))
    state = {name: full_tensor(p.detach()).contiguous() for name, p in trainer.model.named_parameters()}
    held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in trainer.updater.masters)
    full = sum(p.numel() for p in trainer.updater.masters)
    if rank() == 0:
        save_file(state, out / "parameters.safetensors")
        (out / "held.json").write_text(json.dumps({"held": held, "full": full, "world": world_size()}))
    all_reduce_max(0)  # a barrier: the next job may read what rank 0 wrote


def main() -> None:
    """Run all jobs of the file."""
    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    with process_group():
        for job in jobs:
            run(job)


if __name__ == "__main__":
    main()
