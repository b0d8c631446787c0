"""The paper's own pipeline on stand-ins of the released checkpoints and files, with the recipes as shipped.

Only paths and sizes differ from what a user with the released files would type.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.released import (
    make_tokenizer,
    problems,
    save_checkpoint,
    write_jsonl,
    write_rl_file,
    write_soft_labels,
)

from latent_grpo.commands.main import main
from latent_grpo.update.statistics import GAP

SETTINGS = {"llama": "low-difficulty", "qwen": "high-difficulty"}
BENCHMARK = {"llama": "gsm8k-aug", "qwen": "math-500"}
RUNS = {"llama": 5, "qwen": 4}  # published runs of the benchmark
# Sizes. The limits on lengths are those of the recipe, except the long one of high difficulty.
SMALL_SFT = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"]
SMALL_TRAIN = ["--max_steps", "1", "--num_generations", "2", "--generation_batch_size", "4"]
SMALL_TRAIN += ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"]
SMALL_TRAIN += ["--max_generation_batches", "1", "--max_completion_length", "24"]


@pytest.fixture(scope="module", params=list(SETTINGS))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def files(kind, tmp_path_factory):
    """The folder with a stand-in of everything that was released for one setting."""
    folder = tmp_path_factory.mktemp(kind)
    save_checkpoint(folder / "checkpoint", kind)
    rows = problems(12)
    write_rl_file(folder / "train.parquet", kind, 12)
    write_jsonl(folder / "sft.jsonl", rows, "problem", "cot", "cot_answer")
    write_jsonl(folder / "test.jsonl", rows, "problem", "solution", "answer")
    tokenizer = make_tokenizer(kind)
    write_soft_labels(folder / "labels", [3 + number % 4 for number in range(12)], len(tokenizer) - 1)
    return folder


@pytest.fixture(scope="module")
def warm(kind, files):
    """The model after two steps of stage 2 on the released soft labels."""
    out = files / "sft"
    paths = ["--model_name_or_path", str(files / "checkpoint"), "--dataset", str(files / "sft.jsonl")]
    labels = ["--soft_labels", str(files / "labels"), "--output_dir", str(out)]
    assert main(["sft", "--config", f"sft-{SETTINGS[kind]}", *paths, *labels, *SMALL_SFT]) == 0
    return out


@pytest.fixture(scope="module")
def trained(kind, files, warm):
    """The model after one step of reinforcement from the warm start."""
    out = files / "grpo"
    paths = ["--model_name_or_path", str(warm), "--dataset", str(files / "train.parquet"), "--output_dir", str(out)]
    assert main(["train", "--config", SETTINGS[kind], *paths, *SMALL_TRAIN]) == 0
    return out


def lines(run: Path) -> list[dict[str, float]]:
    """Return the metrics of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_stage_2_learns_from_the_released_soft_labels(warm):
    rows = lines(warm)
    assert len(rows) == 2
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 for row in rows)


def test_the_recipe_trains_on_the_released_file(trained):
    (row,) = lines(trained)
    assert row[GAP] < 0.05
    assert (trained / "model.safetensors").is_file()


def test_eval_runs_the_published_protocol(kind, files, trained, tmp_path, capsys):
    out = tmp_path / "eval"
    data = f"{BENCHMARK[kind]}={files / 'test.jsonl'}"
    short = ["--limit", "2", "--max_completion_length", "12", "--dtype", "float32"]
    command = ["eval", "--model", str(trained), "--data", data, "--protocol", "released", "--out", str(out), *short]
    assert main(command) == 0
    result = json.loads(Path(f"{out}.json").read_text())["results"][BENCHMARK[kind]]
    assert result["problems"] == 2
    first = 12346  # the published base seed, plus 100,000 times the place of the benchmark (0 for both), plus the run
    assert [run["seed"] for run in result["runs"]] == [first + number for number in range(RUNS[kind])]
    assert all(len(sample["responses"]) == RUNS[kind] for sample in result["samples"])
