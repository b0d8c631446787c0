"""Several processes train the model that one process would, and resume the checkpoints of each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import ranks
from support import tolerances as tol
from support.processes import (
    JOBS,
    RESUMED,
    assert_half_is_held,
    assert_same_run,
    at,
    distance,
    launch,
    metrics,
    parameters,
    train_job,
)

from latent_grpo.model import load_model
from latent_grpo.quickstart.toy_task import make_model, make_tokenizer

TWO_STEPS = {
    "penalty": train_job({}, beta=0.04, num_iterations=2, max_rollouts=2),
    # A tied table that is trained, with a scale and a soft cap; a head with a bias, of which both are trained.
    "gemma2": train_job(
        {"architecture": "gemma2"}, freeze_embeddings=False, gradient_checkpointing=True, max_rollouts=2
    ),
    "gptj": train_job({"architecture": "gptj"}, freeze_embeddings=False, max_rollouts=2),
    "gptj, frozen": train_job({"architecture": "gptj"}, latent=False, max_rollouts=2),
}


def test_two_processes_take_two_steps_as_one_process_does(tmp_path: Path) -> None:
    for name, job in TWO_STEPS.items():
        ranks.run(at(job, tmp_path / "1" / name, tmp_path))
    launch(tmp_path, 2, [at(job, tmp_path / "2" / name, tmp_path) for name, job in TWO_STEPS.items()])
    for name in TWO_STEPS:
        assert_same_run(tmp_path / "2" / name, tmp_path / "1" / name)
        assert any(row["loss"] != 0 for row in metrics(tmp_path / "1" / name))
        assert_half_is_held(tmp_path / "2" / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_two_processes_train_the_model_of_one(runs: Path, name: str) -> None:
    one, two, job = runs / "1" / name, runs / "2" / name, JOBS[name]
    assert_same_run(two, one)
    assert_half_is_held(two)
    if job["kind"] == "train":
        assert len({row["completions/mean_length"] for row in metrics(one)}) > 1  # lengths differ
        # Without a group that disagrees, the gradient is rounding, and rounding depends on the number of processes.
        assert sum(row["groups_kept"] > 0 for row in metrics(one)) > 1
    if "adapters" in name:
        adapters = {key: value for key, value in parameters(one).items() if "lora_B" in key}
        assert adapters
        assert all(value.abs().max() > 5 * tol.TRAINING_STEP for value in adapters.values())
        return
    model = job["model"]
    if job["kind"] == "encode":
        return
    start = load_model(str(runs / "warm" / model)) if isinstance(model, str) else make_model(make_tokenizer(), seed=0)
    moved = distance({key: p.detach() for key, p in start.named_parameters()}, parameters(one))
    assert distance(parameters(one), parameters(two)) < tol.SEVERAL_UPDATES * moved


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_checkpoint_is_resumed_by_another_number_of_processes(runs: Path, name: str, processes: int) -> None:
    run = runs / f"resumed-{processes}" / name
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4]
    assert_same_run(run, runs / str(3 - processes) / name)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_float32_copies_are_sharded_and_resumed_by_another_number_of_processes(runs: Path, processes: int) -> None:
    assert_half_is_held(runs / "2" / "bfloat16")
    run, other = runs / f"resumed-{processes}" / "bfloat16", runs / str(3 - processes) / "bfloat16"
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4]
    start = {key: p.detach() for key, p in load_model(str(runs / "warm" / "tied")).named_parameters()}
    saved = {key: p.detach().float() for key, p in load_model(str(run)).named_parameters()}
    assert {value.dtype for value in parameters(run).values()} == {torch.bfloat16}
    for key, value in parameters(run).items():
        assert torch.equal(saved[key], value.float())
    expected = {key: value.float() for key, value in parameters(other).items()}
    # Updates are smaller than bfloat16's precision: one run may round a parameter up where the other rounds it down.
    assert distance(saved, expected) < 0.5 * distance(start, expected)
