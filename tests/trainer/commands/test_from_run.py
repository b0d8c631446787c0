"""What a run writes about itself, what the next command takes from it, and how a finished folder is used again."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest
from support.options import metrics_of

from latent_grpo.commands import generate
from latent_grpo.commands.from_run import options_of, take_mode
from latent_grpo.commands.main import main
from latent_grpo.errors import ConfigError


@pytest.fixture(scope="module")
def run(input_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "run"
    files = f"--model {input_folder}/model --data {input_folder}/data.jsonl --out {out}"
    options = "--generation_batch_size 8 --num_generations 4 --max_completion_length 6 --max_generation_batches 1"
    step = "--latent_top_k 3 --tau 0.5 --no_group_filter --max_steps 1"
    assert main(["train", *f"{files} {options} {step}".split()]) == 0
    return out


def test_a_run_says_how_it_was_made(run):
    record = json.loads((run / "run.json").read_text())
    assert record["phase"] == "train"
    assert record["options"]["latent_top_k"] == 3
    assert record["data"].startswith("24 rows, sha256 ")
    assert {"torch", "transformers", "latent_grpo", "python"} <= record["versions"].keys()
    assert record["command"]
    assert options_of(str(run / "checkpoint-9")) == options_of(str(run))


def test_the_next_command_takes_k_and_tau_and_says_so_and_flags_win(run, input_folder, tmp_path, capsys, monkeypatch):
    seen = []
    load = generate.load_for_sampling
    monkeypatch.setattr(generate, "load_for_sampling", lambda args: seen.append(args) or load(args))
    words = ["generate", "--model", str(run), "--prompt", "Tom has 1 shells.", "--max_completion_length", "4"]
    assert main(words) == 0
    assert (seen[0].latent_top_k, seen[0].tau, seen[0].mode) == (3, 0.5, "latent")
    note = f"note: latent_top_k 3, tau 0.5 as in the run that made {run} (run.json); flags override it"
    assert note in capsys.readouterr().err
    assert main([*words, "--latent_top_k", "2", "--tau", "1.0"]) == 0
    assert (seen[1].latent_top_k, seen[1].tau) == (2, 1.0)
    assert "note:" not in capsys.readouterr().err
    result = tmp_path / "result.json"
    data = f"{input_folder}/data.jsonl"
    assert main(["eval", "--model", str(run), "--data", data, "--limit", "2", "--out", str(result), *words[-2:]]) == 0
    assert json.loads(result.read_text())["sampling"]["latent_top_k"] == 3
    capsys.readouterr()


def test_text_stays_text_and_latent_mode_of_a_text_model_is_told(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"options": {"latent": False, "learning_rate": 1.0}}))
    assert options_of(str(tmp_path)) == {"latent": False}
    for mode, expected in (None, "mode text as in the run"), ("latent", "was trained without latent steps"):
        args = Namespace(mode=mode, model=str(tmp_path))
        (note,) = take_mode(args)
        assert expected in note
        assert args.mode == (mode or "text")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ConfigError, match=r"run\.json' cannot be read"):
        options_of(str(tmp_path))


def test_latent_mode_of_a_model_that_no_warm_start_made_is_told(input_folder, capsys):
    assert main(["generate", "--model", f"{input_folder}/model", "--prompt", "?", "--max_completion_length", "2"]) == 0
    assert "is not from a latent warm start" in capsys.readouterr().err


def test_a_finished_folder_is_used_again_on_demand_and_keeps_files_of_others(run, train_command, tmp_path, capsys):
    out = tmp_path / "again"
    command = train_command(out, "--max_steps", "1")
    assert main(command) == 0
    (out / "notes.txt").write_text("mine")
    assert main(command) == 2
    assert "start anew with overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--seed", "7"]) == 0
    assert [row["step"] for row in metrics_of(out)] == [1]
    assert json.loads((out / "run.json").read_text())["options"]["seed"] == 7
    assert (out / "notes.txt").read_text() == "mine"
    assert main([*command, "--overwrite", "--resume_from_checkpoint", "true"]) == 2
    assert "give only one" in capsys.readouterr().err
