"""The log of responses: one Parquet file per logged step, written whole, so that a killed run leaves no torn file.

`output_dir/completions/completions_00012.parquet` holds the responses that step 12 trained on, one row per response.
Columns: step, prompt, answer (the true one), completion (the visible text), reward, `reward/NAME` of every reward
function, advantage (at the last step of the response), advantage_first_step, finished, response_length, latent_share
(of latent steps among all steps of the responses to the prompt), latent_steps, and the columns that reward functions
add with `log_extra`.
`latent_steps` holds, for each latent step, the TOP heaviest tokens with their weights in the mixture.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latent_grpo.errors import ConfigError, RewardError
from latent_grpo.rollout.samples import Samples
from latent_grpo.rollout.trajectory import Rollout, latent_share
from latent_grpo.saving.atomic_files import replaced_whole
from latent_grpo.watching.metrics import CONSOLE
from latent_grpo.watching.responses import Response, mixtures, print_response, prompt_text

FOLDER = "completions"
TOP = 4  # components kept of each mixture


def write_completions(
    output_dir: Path, step: int, tokenizer: Any, samples: Samples, rollout: Rollout, rewards: Tensor, advantages: Tensor
) -> Path:
    """Write the file of one step and return its path. rewards [R], advantages [R, T]."""
    import pyarrow
    from pyarrow import parquet

    columns: dict[str, Any] = {
        "step": pyarrow.array([step] * len(rewards), pyarrow.int64()),
        "prompt": [prompt_text(prompt) for prompt in samples.prompts],
        # Typed, because Arrow infers no type from answers that are all None.
        "answer": pyarrow.array([None if a is None else str(a) for a in samples.answers], pyarrow.string()),
        "completion": samples.completions,
        "reward": rewards.tolist(),
        **{f"reward/{name}": values for name, values in samples.rewards.items()},
        "advantage": last_step(rollout, advantages).tolist(),
        "advantage_first_step": advantages[:, 0].tolist(),
        "finished": rollout.finished.tolist(),
        "response_length": rollout.lengths.tolist(),
        "latent_share": latent_share(rollout)[rollout.prompt_index].tolist(),
        "latent_steps": latent_steps_array(tokenizer, rollout),
    }
    for name, values in samples.extra.items():
        if name in columns:
            raise RewardError(f"log_extra({name!r}, ...) has the name of a column of the log; choose another name")
        columns[name] = arrow_array(values)
    path = file_of(output_dir, step)
    with replaced_whole(path) as partial:
        parquet.write_table(pyarrow.table(columns), partial, compression="zstd")
    return path


def arrow_array(values: list[Any]) -> Any:
    """Return values of any kind as an Arrow array: of their own type if they share one, else of their texts."""
    import pyarrow

    try:
        return pyarrow.array(values)
    except (pyarrow.ArrowException, OverflowError):  # a mixture of kinds, an object, an integer of many digits
        return pyarrow.array([None if value is None else str(value) for value in values], pyarrow.string())


def print_completions(
    step: int, tokenizer: Any, samples: Samples, rollout: Rollout, rewards: Tensor, advantages: Tensor, *, count: int
) -> None:
    """Print the first `count` responses of one step on the terminal. rewards [R], advantages [R, T]."""
    last_advantages = last_step(rollout, advantages).tolist()
    shares = latent_share(rollout)[rollout.prompt_index].tolist()
    for row in range(min(count, len(samples.prompts))):
        response = Response(
            text=samples.completions[row],
            finished=bool(rollout.finished[row]),
            latent_steps=mixtures(tokenizer, rollout, row),
            prompt=prompt_text(samples.prompts[row]),
            answer=samples.answers[row],
            step=step,
            reward=float(rewards[row]),
            advantage=last_advantages[row],
            latent_share=shares[row] or None,
        )
        print_response(CONSOLE, response, top=TOP)


def last_step(rollout: Rollout, values: Tensor) -> Tensor:
    """Return the value [R] at the last step of each response, from values [R, T]."""
    # A response without a step takes index 0, where its value is that of a masked step.
    last = (rollout.lengths - 1).clamp_min(0).unsqueeze(-1)
    return values.gather(-1, last).squeeze(-1)


def latent_steps_array(tokenizer: Any, rollout: Rollout) -> Any:
    """Return an Arrow array list<list<struct<token: string, weight: float>>>: responses, latent steps, top components.

    It holds what `mixtures` gives row by row, up to TOP components, without a Python loop over the steps: one token is
    decoded once, however many steps hold it.
    """
    import pyarrow

    latent = rollout.is_latent
    weights = (rollout.scores[latent] / rollout.tau).softmax(-1)
    top_weights, order = weights.topk(min(TOP, weights.shape[-1]), dim=-1)
    ids = rollout.ids[latent].gather(-1, order)
    unique_ids, index = ids.flatten().cpu().unique(return_inverse=True)
    words = pyarrow.array([tokenizer.decode([token]) for token in unique_ids.tolist()], pyarrow.string())
    components = pyarrow.StructArray.from_arrays(
        [words.take(pyarrow.array(index.numpy())), pyarrow.array(top_weights.flatten().float().cpu().numpy())],
        ["token", "weight"],
    )
    # Arrow nests lists by offsets: where each latent step begins among the components, each response among the steps.
    step_offsets = pyarrow.array(range(0, ids.numel() + 1, ids.shape[-1]), pyarrow.int32())
    steps = pyarrow.ListArray.from_arrays(step_offsets, components)
    counts = torch.cat([torch.zeros(1, dtype=torch.long), rollout.latent_steps.cpu().cumsum(0)])
    return pyarrow.ListArray.from_arrays(pyarrow.array(counts.numpy(), pyarrow.int32()), steps)


def file_of(run: Path, step: int) -> Path:
    """Return the path of a step's file in the run's folder."""
    return run / FOLDER / f"completions_{step:05d}.parquet"


def completion_steps(run: Path) -> list[int]:
    """Return the steps of a run that have a file, in ascending order."""
    names = [path.stem.removeprefix("completions_") for path in (run / FOLDER).glob("completions_*.parquet")]
    return sorted(int(name) for name in names if name.isdigit())


def read_completions(run: Path, step: int) -> list[dict[str, Any]]:
    """Return the rows of one step's file. Raise ConfigError if it does not exist or cannot be read."""
    import pyarrow
    from pyarrow import parquet

    path = file_of(run, step)
    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise ConfigError(f"{str(path)!r} cannot be read ({type(error).__name__}); choose another --step") from error
    return rows


def read_responses(run: Path, step: int, count: int) -> list[Response]:
    """Return the first `count` logged responses of a step. Raises as `read_completions` does."""
    return [
        Response(
            text=row["completion"],
            latent_steps=[[(part["token"], part["weight"]) for part in mixture] for mixture in row["latent_steps"]],
            # A log of an earlier version has no shares. For text they say nothing.
            latent_share=row.get("latent_share") or None,
            **{name: row[name] for name in ("finished", "prompt", "answer", "step", "reward", "advantage")},
        )
        for row in read_completions(run, step)[:count]
    ]
