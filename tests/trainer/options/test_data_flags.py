"""Flags of data, model and evaluation reach the trainers of `train` and `sft`."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file
from support.options import BOTH_TRAINERS, ROWS, metrics_of

from latent_grpo.commands.main import main

SMALL_ROLLOUTS = dict(latent_top_k=2, num_generations=4, generation_batch_size=4, max_completion_length=3)


@pytest.fixture
def trainer_arguments(monkeypatch):
    """The arguments with which a command made its trainer, by kind of trainer. The trainer itself does nothing."""
    received = {}

    def stand_in(kind):
        class Trainer:
            def __init__(self, *args):
                received[kind] = args

            def train(self):
                return {"loss": 0.0, "reward": 0.0}

        return Trainer

    monkeypatch.setattr("latent_grpo.trainer.LatentGRPOTrainer", stand_in("train"))
    monkeypatch.setattr("latent_grpo.sft.LatentSFTTrainer", stand_in("sft"))
    return received


def command_line(command: str, folder, data: str = "data", **options) -> list[str]:
    """Return the words of `latent-grpo COMMAND` on the model and a data file of `folder`."""
    options = {"model_name_or_path": folder / "model", "dataset": folder / f"{data}.jsonl", **options}
    return [command, *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


COLUMNS = {"prompt_column": "riddle", "answer_column": "result", "chain_column": "thoughts"}


@BOTH_TRAINERS
@pytest.mark.parametrize("limit", [None, 3])
def test_column_and_limit_flags_select_the_training_rows(limit, kind, input_folder, trainer_arguments):
    limit_flag = {} if limit is None else {"limit": limit}
    assert main(command_line(kind, input_folder, "renamed", **COLUMNS, **limit_flag)) == 0
    # The trainers take their rows as the fourth and as the third argument.
    rows = trainer_arguments[kind][{"train": 3, "sft": 2}[kind]]
    assert [{name: row[name] for name in ("prompt", "chain", "answer")} for row in rows] == ROWS[:limit]


@BOTH_TRAINERS
@pytest.mark.parametrize("missing", ["prompt_column", "answer_column"])
def test_data_of_unknown_columns_is_refused_without_a_column_flag(
    missing, kind, input_folder, trainer_arguments, capsys
):
    columns = {name: column for name, column in COLUMNS.items() if name != missing}
    assert main(command_line(kind, input_folder, "renamed", **columns)) == 2
    assert missing in capsys.readouterr().err
    assert not trainer_arguments


@BOTH_TRAINERS
def test_dataset_split_reaches_the_loader(kind, input_folder, trainer_arguments, monkeypatch):
    splits = []

    def load_rows(source, **options):
        splits.append(options["split"])
        return ROWS

    monkeypatch.setattr("latent_grpo.data.rows.load_rows", load_rows)
    assert main(command_line(kind, input_folder, dataset_split="validation")) == 0
    assert splits == ["validation"]


@pytest.mark.parametrize(("limit", "problems"), [(None, 5), (3, 3)])
def test_held_out_problems_are_evaluated_every_eval_steps(limit, problems, input_folder, tmp_path):
    limit_flag = {} if limit is None else {"eval_limit": limit}
    run = dict(output_dir=tmp_path / "run", max_steps=5, group_filter=False, log_table=False)
    evaluation = dict(eval_steps=2, eval_dataset=input_folder / "held_out.jsonl", **limit_flag)
    assert main(command_line("train", input_folder, **SMALL_ROLLOUTS, **run, **evaluation)) == 0
    rows = metrics_of(tmp_path / "run")
    assert [row["step"] for row in rows if "eval_pass_at_1" in row] == [2, 4]
    assert [row["eval_problems"] for row in rows if "eval_problems" in row] == [problems] * 2


@BOTH_TRAINERS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_model_is_saved_in_the_precision_of_dtype(dtype, kind, input_folder, tmp_path):
    run = dict(output_dir=tmp_path / "run", max_steps=1, dtype=dtype, limit=4, log_table=False)
    if kind == "train":
        run |= dict(SMALL_ROLLOUTS, group_filter=False)
    assert main(command_line(kind, input_folder, **run)) == 0
    tensors = load_file(tmp_path / "run" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {f"torch.{dtype}"}


@BOTH_TRAINERS
def test_a_prompt_over_max_prompt_length_is_refused_in_one_line(kind, input_folder, tmp_path, capsys):
    run = dict(output_dir=tmp_path / "run", max_prompt_length=3, max_steps=1)
    rollouts = SMALL_ROLLOUTS if kind == "train" else {}
    assert main(command_line(kind, input_folder, **rollouts, **run)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("latent-grpo")]
    assert "16 of 16 prompts are over max_prompt_length 3, the first in row 1" in line
    assert not (tmp_path / "run").exists()
