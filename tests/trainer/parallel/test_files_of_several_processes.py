"""What several processes leave on the disk: checkpoints in parts, a plain model, one log of responses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.processes import JOBS, metrics, parameters, torchrun
from transformers import AutoModelForCausalLM

from latent_grpo import LatentGRPOConfig
from latent_grpo.quickstart.toy_task import make_model, make_problems, make_tokenizer
from latent_grpo.saving.tensor_shards import read_shards
from latent_grpo.update.optimizer import Updater

pytestmark = pytest.mark.slow
NAME = "penalty, two passes"


def test_each_process_writes_its_part_of_a_checkpoint(runs: Path) -> None:
    files = {n: sorted((runs / str(n) / NAME / "checkpoint-4" / "optimizer").iterdir()) for n in (1, 2)}
    assert [len(files[n]) for n in (1, 2)] == [1, 2]
    assert {path.suffix for path in files[2]} == {".safetensors"}
    sizes = [path.stat().st_size for path in files[2]]
    assert max(sizes) < 0.6 * files[1][0].stat().st_size


def test_a_lost_part_of_a_checkpoint_is_noticed_whichever_rank_wrote_it(runs: Path, tmp_path: Path) -> None:
    """Without the check, the part would be read as zeros."""
    written = runs / "2" / NAME / "checkpoint-4" / "optimizer"
    updater = Updater(make_model(make_tokenizer(), seed=0), LatentGRPOConfig(), 1, freeze_embeddings=True)
    for number in (1, 2):
        folder = tmp_path / str(number)
        shutil.copytree(written, folder)
        (lost,) = folder.glob(f"shard-{number:05d}-*")
        lost.unlink()
        with pytest.raises(ValueError, match=r"missing|here"):
            read_shards(folder, updater.empty)
    assert read_shards(written, updater.empty).keys() >= {"exp_avg.model.norm.weight"}


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("processes", [1, 2])
def test_the_finished_model_is_a_plain_model_folder(runs: Path, name: str, processes: int) -> None:
    folder = runs / str(processes) / name
    # `encode` trains two models, whose parameters have these prefixes.
    parts = ("encoder", "decoder") if JOBS[name]["kind"] == "encode" else ("",)
    for part in parts:
        assert json.loads((folder / part / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
        saved = dict(AutoModelForCausalLM.from_pretrained(folder / part).named_parameters())
        if "adapters" in name:
            continue
        prefix = f"{part}." if part else ""
        trained = {key.removeprefix(prefix): p for key, p in parameters(folder).items() if key.startswith(prefix)}
        assert trained.keys() == saved.keys()
        for key, value in trained.items():
            assert torch.equal(saved[key], value)


def test_responses_are_logged_once_and_in_order(runs: Path) -> None:
    pytest.importorskip("pyarrow")
    from latent_grpo.watching.response_log import completion_steps, read_completions

    one, two = (runs / str(n) / NAME for n in (1, 2))
    assert completion_steps(one) == completion_steps(two) == [1, 2, 3, 4]
    for step in (1, 2):
        actual, expected = read_completions(two, step), read_completions(one, step)
        for column in ("prompt", "completion", "reward"):
            assert [row[column] for row in actual] == [row[column] for row in expected]


def test_the_command_line_trains_in_two_processes_and_overwrites_no_run(runs: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(row) + "\n" for row in make_problems(30, seed=1)))
    paths = dict(model_name_or_path=runs / "warm" / "tied", dataset=data, output_dir=out)
    sizes = dict(latent_top_k=2, num_generations=4, generation_batch_size=16, max_completion_length=6, max_steps=2)
    flags = {**paths, **sizes, "report_to": "tensorboard"}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    done = torchrun(2, "-m", "latent_grpo", "train", *words)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout.count(f"saved {out}") == 1
    assert done.stderr.count("Pass@1") == 1  # the heading of one table
    assert [row["step"] for row in metrics(out)] == [1, 2]
    assert AutoModelForCausalLM.from_pretrained(out).config.architectures == ["LlamaForCausalLM"]
    again = torchrun(2, "-m", "latent_grpo", "train", *words)
    assert again.returncode != 0
    assert "already holds a run" in again.stderr
    assert [row["step"] for row in metrics(out)] == [1, 2]
