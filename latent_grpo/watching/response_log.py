"""The log of responses: one Parquet file a logged step, written whole, so that a killed run leaves readable files.

`output_dir/completions/completions_00012.parquet` holds the responses that step 12 trained on, a row each: step,
prompt, answer, completion (the visible text), reward, `reward/NAME` of every function, advantage, advantage_first_step,
finished, response_length, and latent_steps: of every latent step its heaviest tokens with their weights in the mixture.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from rich.text import Text
from torch import Tensor

from latent_grpo.config import ConfigError
from latent_grpo.rollout.samples import Samples
from latent_grpo.rollout.trajectory import Rollout
from latent_grpo.saving.checkpoint import flush
from latent_grpo.watching.metrics import CONSOLE

FOLDER = "completions"
TOP = 4  # components kept of every mixture


def write_completions(
    output_dir: Path, step: int, tokenizer: Any, samples: Samples, rollout: Rollout, rewards: Tensor, advantages: Tensor
) -> Path:
    """The file of one step. rewards [R], advantages [R, T]."""
    import pyarrow
    from pyarrow import parquet

    last = (rollout.lengths - 1).clamp_min(0).unsqueeze(-1)
    columns: dict[str, Any] = {
        "step": pyarrow.array([step] * len(rewards), pyarrow.int64()),
        "prompt": [p if isinstance(p, str) else json.dumps(p, ensure_ascii=False) for p in samples.prompts],
        "answer": pyarrow.array([None if a is None else str(a) for a in samples.answers], pyarrow.string()),
        "completion": samples.completions,
        "reward": rewards.tolist(),
        **{f"reward/{name}": values for name, values in samples.rewards.items()},
        "advantage": advantages.gather(-1, last).squeeze(-1).tolist(),
        "advantage_first_step": advantages[:, 0].tolist(),
        "finished": rollout.finished.tolist(),
        "response_length": rollout.lengths.tolist(),
        "latent_steps": latent_steps(tokenizer, rollout),
    }
    folder = output_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"completions_{step:05d}.parquet"
    partial = folder / f".{path.name}.partial"
    parquet.write_table(pyarrow.table(columns), partial, compression="zstd")
    flush(partial)
    os.replace(partial, path)
    return path


def latent_steps(tokenizer: Any, rollout: Rollout) -> Any:
    """An Arrow array list<list<struct<token: string, weight: float>>>: responses, latent steps, their top entries."""
    import pyarrow

    latent = rollout.is_latent
    weights = (rollout.scores[latent] / rollout.tau).softmax(-1)
    heaviest, order = weights.topk(min(TOP, weights.shape[-1]), dim=-1)
    ids = rollout.ids[latent].gather(-1, order)
    known, index = ids.flatten().cpu().unique(return_inverse=True)
    words = pyarrow.array([tokenizer.decode([i]) for i in known.tolist()], pyarrow.string())
    entries = pyarrow.StructArray.from_arrays(
        [words.take(pyarrow.array(index.numpy())), pyarrow.array(heaviest.flatten().float().cpu().numpy())],
        ["token", "weight"],
    )
    steps = pyarrow.array(range(0, ids.numel() + 1, ids.shape[-1]), pyarrow.int32())
    responses = torch.cat([torch.zeros(1, dtype=torch.long), rollout.latent_steps.cpu().cumsum(0)])
    rows = pyarrow.array(responses.numpy(), pyarrow.int32())
    return pyarrow.ListArray.from_arrays(rows, pyarrow.ListArray.from_arrays(steps, entries))


def completion_steps(run: Path) -> list[int]:
    """Steps of a run that have a file, in order."""
    names = [path.stem.removeprefix("completions_") for path in (run / FOLDER).glob("completions_*.parquet")]
    return sorted(int(name) for name in names if name.isdigit())


def read_completions(run: Path, step: int) -> list[dict[str, Any]]:
    """Rows of one step's file; ConfigError where there is none or it cannot be read."""
    import pyarrow
    from pyarrow import parquet

    path = run / FOLDER / f"completions_{step:05d}.parquet"
    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise ConfigError(f"{str(path)!r} cannot be read ({type(error).__name__}); choose another --step") from error
    return rows


def print_samples(samples: Samples, rewards: Tensor, count: int) -> None:
    """The first responses on the terminal, a line each."""
    for prompt, text, reward in list(zip(samples.prompts, samples.completions, rewards.tolist(), strict=True))[:count]:
        CONSOLE.print(Text(f"[{reward:.2f}] {str(prompt)[-160:]!r} -> {text!r}", style="dim"), soft_wrap=True)
