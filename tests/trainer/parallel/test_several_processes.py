"""Several processes train the model that one process would, hold a part each, and resume each other's checkpoints."""

from __future__ import annotations

import json
import os
import shutil
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
from transformers import AutoModelForCausalLM

from latent_grpo import LatentGRPOConfig, LatentGRPOTrainer
from latent_grpo.config import ConfigError
from latent_grpo.model import load_model
from latent_grpo.parallel.process_group import process_group
from latent_grpo.parallel.work_split import share_of_rank, snake_draft
from latent_grpo.quickstart.toy_task import make_model, make_problems, make_tokenizer
from latent_grpo.rollout.trajectory import Rollout
from latent_grpo.saving import tensor_shards as shards_module
from latent_grpo.saving.tensor_shards import read_shards, write_shards
from latent_grpo.update import optimizer as optim_module
from latent_grpo.update.micro_batches import micro_batches

pytestmark = pytest.mark.xdist_group("distributed")  # its runs are made once
trainer_module = sys.modules["latent_grpo.trainer"]
TRAIN = dict(
    latent_top_k=2, num_generations=4, generation_batch_size=16, per_device_train_batch_size=8, learning_rate=1e-4,
    max_completion_length=6, max_generation_batches=3, max_steps=4, save_steps=0, log_completions=True,
    invalid="keep",
)  # fmt: skip
SFT = dict(
    per_device_train_batch_size=4, gradient_accumulation_steps=2, gumbel_scale=0.5, answer_template="{answer}",
    learning_rate=1e-4, max_steps=4, save_steps=0,
)  # fmt: skip
WARM = {  # so that responses end, at different lengths
    name: dict(
        kind="sft", model={"tied": name == "tied"},
        options={**SFT, "learning_rate": 3e-3, "max_steps": 30, "per_device_train_batch_size": 16, "gumbel_scale": 0.0},
    )
    for name in ("tied", "untied")
}  # fmt: skip
JOBS: dict[str, dict[str, Any]] = {
    "penalty, two passes": dict(
        kind="train", model="tied",
        options={**TRAIN, "beta": 0.04, "num_iterations": 2, "eval_steps": 2, "save_steps": 2},
    ),
    "untied, trained embeddings, recomputed layers": dict(
        kind="train", model="untied",
        options={
            **TRAIN, "loss_type": "grpo", "freeze_embeddings": False, "gradient_checkpointing": True,
            "micro_batch_tokens": 60, "scale_rewards": "batch",
        },
    ),
    "few groups, sequence ratios": dict(
        kind="train", model="tied",
        options={**TRAIN, "loss_type": "gspo", "generation_batch_size": 8, "per_device_train_batch_size": 2},
    ),
    "text, token sums, entropy": dict(
        kind="train", model="tied", options={**TRAIN, "latent": False, "loss_type": "dr_grpo", "entropy_coef": 0.01}
    ),
    "adapters": dict(
        kind="train", model="tied", options={**TRAIN, "use_peft": True, "lora_r": 3, "beta": 0.04, "save_steps": 2}
    ),
    "responses of one step": dict(
        kind="train", model="untied",
        options={
            **TRAIN, "latent": False, "per_device_train_batch_size": 2, "temperature": 4.0, "top_k": 0, "top_p": 1.0,
            "max_completion_length": 3, "max_steps": 12,
        },
    ),
    "warm start": dict(kind="sft", model={}, options={**SFT, "save_steps": 2}),
    "warm start, recomputed layers": dict(kind="sft", model={}, options={**SFT, "gradient_checkpointing": True}),
}  # fmt: skip
# Means over the steps with an advantage in a micro-batch, of which the mean by its steps is taken.
STATISTICS = {"clip_fraction", "dual_clip_fraction", "approx_kl", "kl", "entropy", "margin_crossed"}
COARSE = {  # whose gradients are rounded in another place
    "bfloat16": dict(kind="train", model="tied", options={**TRAIN, "dtype": "bfloat16", "save_steps": 2})
}
RESUMED = ("penalty, two passes", "adapters", "warm start")


def torchrun(processes: int, *command: str) -> subprocess.CompletedProcess[str]:
    """A command of Python in so many processes."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {
        **os.environ,
        "PYTHONPATH": PYTHONPATH,
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *(several if processes > 1 else []), *command], env=environment, capture_output=True,
        text=True, timeout=600,
    )  # fmt: skip


def launch(folder: Path, processes: int, jobs: Sequence[dict[str, Any]]) -> None:
    """Run the jobs in so many processes."""
    request = folder / f"jobs-{processes}.json"
    request.write_text(json.dumps(jobs))
    done = torchrun(processes, "-m", "support.ranks", str(request))
    assert done.returncode == 0, done.stderr[-6000:]


def at(job: dict[str, Any], out: Path, warm: Path, **changes: Any) -> dict[str, Any]:
    model = str(warm / job["model"]) if isinstance(job["model"], str) else job["model"]
    return {**job, "model": model, "options": {**job["options"], "output_dir": str(out)}, **changes}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders 1/JOB and 2/JOB of runs in one and in two processes, and resumed-N/JOB of runs that began in the other
    number."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("runs")
    warm = folder / "warm"
    jobs = {n: [at(job, folder / str(n) / name, warm) for name, job in (JOBS | COARSE).items()] for n in (1, 2)}
    launch(folder, 1, [*(at(job, warm / name, warm) for name, job in WARM.items()), *jobs[1]])
    launch(folder, 2, jobs[2])
    for processes in (1, 2):
        other = folder / str(3 - processes)
        resumed = [
            at(
                (JOBS | COARSE)[name],
                folder / f"resumed-{processes}" / name,
                warm,
                resume=str(other / name / "checkpoint-2"),
            )
            for name in (*RESUMED, *COARSE)
        ]
        launch(folder, processes, resumed)
    return folder


def parameters(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "parameters.safetensors")


def metrics(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("time_", "tokens_per_second", "phase")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]


def distance(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    return float(sum((left[name] - right[name]).square().sum() for name in left)) ** 0.5


def assert_same_run(run: Path, other: Path) -> None:
    """The same parameters, and the same metrics where both have a step."""
    found, expected = parameters(run), parameters(other)
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=tol.TRAINING_STEP)
    for ours, theirs in zip(metrics(run), metrics(other), strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - STATISTICS:
            assert ours[key] == pytest.approx(theirs[key], rel=tol.SEVERAL_UPDATES, abs=1e-4), key
        for key in ours.keys() & STATISTICS:
            assert ours[key] == pytest.approx(theirs[key], rel=0.1, abs=1e-3), key


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_train_the_model_of_one(runs: Path, name: str) -> None:
    one, two, job = runs / "1" / name, runs / "2" / name, JOBS[name]
    assert_same_run(two, one)
    if job["kind"] == "train":
        assert len({row["response_length"] for row in metrics(one)}) > 1  # not all of one length
        assert any(row["loss"] != 0 for row in metrics(one))
    if name == "adapters":
        adapters = {key: value for key, value in parameters(one).items() if "lora_B" in key}
        assert adapters
        assert all(value.abs().max() > 5 * tol.TRAINING_STEP for value in adapters.values())
        return
    model = job["model"]
    start = load_model(str(runs / "warm" / model)) if isinstance(model, str) else make_model(make_tokenizer(), seed=0)
    moved = distance({key: p.detach() for key, p in start.named_parameters()}, parameters(one))
    assert distance(parameters(one), parameters(two)) < tol.SEVERAL_UPDATES * moved


@pytest.mark.parametrize("name", JOBS)
def test_a_process_of_two_trains_half_of_the_parameters(runs: Path, name: str) -> None:
    held = json.loads((runs / "2" / name / "held.json").read_text())
    assert held["world"] == 2
    assert 0.45 * held["whole"] < held["held"] < 0.6 * held["whole"]


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_checkpoint_is_resumed_by_another_number_of_processes(runs: Path, name: str, processes: int) -> None:
    run = runs / f"resumed-{processes}" / name
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4]
    assert_same_run(run, runs / str(3 - processes) / name)


@pytest.mark.parametrize("processes", [1, 2])
def test_float32_copies_are_sharded_and_resumed_by_another_number_of_processes(runs: Path, processes: int) -> None:
    held = json.loads((runs / "2" / "bfloat16" / "held.json").read_text())
    assert 0.45 * held["whole"] < held["held"] < 0.6 * held["whole"]
    run, other = runs / f"resumed-{processes}" / "bfloat16", runs / str(3 - processes) / "bfloat16"
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4]
    start = {key: p.detach() for key, p in load_model(str(runs / "warm" / "tied")).named_parameters()}
    saved = {key: p.detach().float() for key, p in load_model(str(run)).named_parameters()}
    assert {value.dtype for value in parameters(run).values()} == {torch.bfloat16}
    for key, value in parameters(run).items():
        assert torch.equal(saved[key], value.float())
    expected = {key: value.float() for key, value in parameters(other).items()}
    # Updates are under bfloat16's precision: where one tips a parameter over, the other may not.
    assert distance(saved, expected) < 0.5 * distance(start, expected)


def test_each_process_writes_its_part_of_a_checkpoint(runs: Path) -> None:
    name = "penalty, two passes"
    files = {n: sorted((runs / str(n) / name / "checkpoint-4" / "optimizer").iterdir()) for n in (1, 2)}
    assert [len(files[n]) for n in (1, 2)] == [1, 2]
    assert {path.suffix for path in files[2]} == {".safetensors"}
    sizes = [path.stat().st_size for path in files[2]]
    assert max(sizes) < 0.6 * files[1][0].stat().st_size


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("processes", [1, 2])
def test_what_is_saved_is_a_plain_model(runs: Path, name: str, processes: int) -> None:
    folder = runs / str(processes) / name
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    if "adapters" in name:
        return
    for key, wanted in parameters(folder).items():
        assert torch.equal(dict(model.named_parameters())[key], wanted)


def test_responses_are_logged_once_and_in_order(runs: Path) -> None:
    pytest.importorskip("pyarrow")
    from latent_grpo.watching.response_log import completion_steps, read_completions

    name = "penalty, two passes"
    one, two = (runs / str(n) / name for n in (1, 2))
    assert completion_steps(one) == completion_steps(two) == [1, 2, 3, 4]
    for step in (1, 2):
        ours, theirs = read_completions(two, step), read_completions(one, step)
        assert [row["prompt"] for row in ours] == [row["prompt"] for row in theirs]
        assert [row["completion"] for row in ours] == [row["completion"] for row in theirs]
        assert [row["reward"] for row in ours] == [row["reward"] for row in theirs]


def test_prompts_are_dealt_evenly() -> None:
    lengths = [9, 1, 8, 2, 7, 3, 6, 4]
    hands = snake_draft(lengths, 2)
    assert sorted(number for hand in hands for number in hand) == list(range(8))
    assert [len(hand) for hand in hands] == [4, 4]
    assert [sum(lengths[n] for n in hand) for hand in hands] == [20, 20]
    assert snake_draft(lengths, 1) == [list(range(8))]
    assert [len(hand) for hand in snake_draft([5, 4, 3, 2, 1], 3)] == [1, 2, 2]


def rollout(lengths: list[int], prompts: list[int], prompt_length: int = 2) -> Rollout:
    rows, steps = len(lengths), max(lengths)
    mask = torch.arange(steps) < torch.tensor(lengths).unsqueeze(-1)
    some = torch.zeros(rows, steps)
    return Rollout(
        prompt_ids=torch.zeros(max(prompts) + 1, prompt_length).long(),
        prompt_mask=torch.ones(max(prompts) + 1, prompt_length).long(), prompt_index=torch.tensor(prompts),
        token=some.long(), ids=some.long().unsqueeze(-1), scores=some.unsqueeze(-1), is_latent=some.bool(), mask=mask,
        logprob=some, finished=torch.ones(rows).bool(), tau=1.0,
    )  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_responses_are_shared_out_by_tokens(ranks: int) -> None:
    lengths = [1 + (i * 37) % 23 for i in range(32)]
    sample = rollout(lengths, [i // 4 for i in range(32)])
    rows = torch.randperm(32)
    shares = [share_of_rank(sample, rows, rank, ranks) for rank in range(ranks)]
    assert torch.equal(torch.cat(shares).sort().values, torch.arange(32))
    cost = [sum(lengths[i] + 0.5 for i in share.tolist()) for share in shares]
    assert max(cost) - min(cost) <= 2 * (max(lengths) + 0.5)
    prompts = [set((share // 4).tolist()) for share in shares]
    assert sum(map(len, prompts)) <= 8 + ranks - 1  # a cut between two ranks divides one group at most


def test_a_rank_may_have_no_response() -> None:
    sample = rollout([40, 1], [0, 0])
    shares = [share_of_rank(sample, torch.arange(2), rank, 4) for rank in range(4)]
    assert sorted(torch.cat(shares).tolist()) == [0, 1]
    assert any(len(share) == 0 for share in shares)


def test_a_rank_without_responses_keeps_in_step_and_adds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tokenizer()
    options = {**TRAIN, "max_steps": 1, "log_completions": False, "output_dir": str(tmp_path / "run")}
    found = []
    for more in (0, 2):
        monkeypatch.setattr(trainer_module, "all_reduce_max", lambda value, more=more: value + more)
        trainer = LatentGRPOTrainer(
            make_model(tokenizer, seed=0), lambda completion_ids, **_: [float(ids[-1] % 7) for ids in completion_ids],
            LatentGRPOConfig(**options), make_problems(30, seed=1), None, tokenizer,
        )  # fmt: skip
        batch, _ = trainer.collect()
        stats = trainer.accumulate(batch, torch.arange(16))
        found.append((stats, [p.grad for p in trainer.updater.parameters]))
    assert found[0][0]["loss"] != 0
    assert found[1][0] == pytest.approx(found[0][0])
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0, atol=0)


def test_no_rows_are_no_micro_batch() -> None:
    sample = rollout([3, 1], [0, 0])
    assert micro_batches(sample, torch.arange(0), 4) == micro_batches(sample, torch.arange(0), 4, tokens=9) == []


def test_a_part_of_one_step_is_replayed_in_two_passes_as_others_are() -> None:
    sample = rollout([3, 1], [0, 0])
    assert sample.select(torch.tensor([1])).mask.tolist() == [[True, False]]
    assert rollout([1, 1], [0, 0]).select(torch.tensor([1])).mask.tolist() == [[True]]


def test_a_lost_part_of_a_checkpoint_is_noticed(runs: Path, tmp_path: Path) -> None:
    """Whichever rank's: its parts would be read as zeros."""
    written = runs / "2" / "penalty, two passes" / "checkpoint-4" / "optimizer"
    model = make_model(make_tokenizer(), seed=0)
    updater = optim_module.Updater(model, LatentGRPOConfig(), 1, freeze_embeddings=True)
    for number in (1, 2):
        folder = tmp_path / str(number)
        shutil.copytree(written, folder)
        (lost,) = folder.glob(f"shard-{number:05d}-*")
        lost.unlink()
        with pytest.raises(ValueError, match=r"missing|here"):
            read_shards(folder, updater.empty)
    assert read_shards(written, updater.empty).keys() >= {"exp_avg.model.norm.weight"}


def test_a_file_that_another_rank_wrote_elsewhere_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        shards_module, "all_gather", lambda names: [*names, "shard-00002-model-00001-of-00001.safetensors"]
    )
    with pytest.raises(ConfigError, match=r"shard-00002.* is not seen by rank 0: give an output_dir"):
        write_shards(tmp_path / "optimizer", {"a": torch.ones(3)})


def test_large_states_are_written_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "FILE_BYTES", 1000)
    tensors = {name: torch.randn(100) for name in "abcdef"}
    write_shards(tmp_path / "optimizer", tensors)
    assert len(list((tmp_path / "optimizer").iterdir())) == 3
    found = read_shards(tmp_path / "optimizer", lambda name, size, dtype: torch.zeros(size, dtype=dtype))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_training_beside_torchrun_without_a_group_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    tokenizer = make_tokenizer()
    args = LatentGRPOConfig(**{**TRAIN, "output_dir": str(tmp_path / "run")})
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2: train within"):
        LatentGRPOTrainer(make_model(tokenizer, seed=0), "accuracy", args, make_problems(9, seed=1), None, tokenizer)


def test_more_processes_than_prompts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "world_size", lambda: 5)
    tokenizer = make_tokenizer()
    args = LatentGRPOConfig(**{**TRAIN, "output_dir": str(tmp_path / "run")})
    with pytest.raises(ConfigError, match="generation_batch_size is 16: 5 processes share its 4 prompts"):
        LatentGRPOTrainer(make_model(tokenizer, seed=0), "accuracy", args, make_problems(9, seed=1), None, tokenizer)


def test_8_bit_optimizers_are_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim_module, "world_size", lambda: 2)
    with pytest.raises(ConfigError, match="optim is 'adamw_8bit': several processes"):
        optim_module.make_optimizer([torch.nn.Parameter(torch.zeros(2))], LatentGRPOConfig(optim="adamw_8bit"))


def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="torchrun started 2 processes on a node with 1 GPUs"), process_group():
        pass


def test_the_command_line_trains_in_two_processes(runs: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in make_problems(30, seed=1)))
    out = tmp_path / "run"
    flags = {
        "model_name_or_path": runs / "warm" / "tied", "dataset": data, "output_dir": out, "latent_top_k": 2,
        "num_generations": 4, "generation_batch_size": 16, "max_completion_length": 6, "max_steps": 2,
        "report_to": "tensorboard",
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    done = torchrun(2, "-m", "latent_grpo", "train", *words)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout.count(f"saved {out}") == 1
    assert done.stderr.count("Pass@1") == 1  # one table's heading
    assert [row["step"] for row in metrics(out)] == [1, 2]
    assert AutoModelForCausalLM.from_pretrained(out).config.architectures == ["LlamaForCausalLM"]
    again = torchrun(2, "-m", "latent_grpo", "train", *words)
    assert again.returncode != 0
    assert "already holds a run" in again.stderr
    assert [row["step"] for row in metrics(out)] == [1, 2]
