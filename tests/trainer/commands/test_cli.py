"""Every mistake on the command line is one line and exit code 2; SIGINT leaves a checkpoint; resume goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support import REPOSITORY
from transformers import PreTrainedTokenizerFast

import latent_grpo
import latent_kernels
from latent_grpo.commands.generate import generate_parser
from latent_grpo.commands.main import main
from latent_grpo.commands.options import load_for_sampling
from latent_grpo.config import LatentGRPOConfig, LatentSFTConfig
from latent_grpo.quickstart.toy_task import make_model, make_problems, make_tokenizer
from latent_grpo.recipes.read import read_yaml
from latent_grpo.study.config import CompareConfig


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model folder and a data file with prompt, chain and answer."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = make_tokenizer()
    make_model(tokenizer, seed=0).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "data.jsonl").write_text("\n".join(json.dumps(row) for row in make_problems(24, seed=0)))
    (folder / "empty.jsonl").write_text("")
    (folder / "broken.jsonl").write_text('{"prompt": "a", "answer": "1"}\n{oops\n')
    (folder / "typo.yaml").write_text("learning_rat: 1e-5\n")
    return folder


def train_arguments(world: Path, out: Path, *extra: str) -> list[str]:
    return [
        "train", "--model_name_or_path", str(world / "model"), "--dataset", str(world / "data.jsonl"),
        "--output_dir", str(out),
        "--latent_top_k", "2", "--generation_batch_size", "8", "--num_generations", "4", "--max_completion_length", "6",
        "--max_generation_batches", "1", "--no_group_filter", *extra,
    ]  # fmt: skip


READY = ("--model_name_or_path", "{world}/model", "--dataset", "{world}/data.jsonl")
MISTAKES = {
    "unknown command": ["trian"],
    "unknown flag": ["train", "--learning_rat", "1"],
    "unknown config key": ["train", "--config", "{world}/typo.yaml"],
    "missing config": ["train", "--config", "{world}/none.yaml"],
    "no model given": ["train", "--dataset", "{world}/data.jsonl"],
    "missing model": ["train", "--model_name_or_path", "{world}/none", "--dataset", "{world}/data.jsonl"],
    "missing data": ["train", "--model_name_or_path", "{world}/model", "--dataset", "{world}/none.jsonl"],
    "empty data": ["train", "--model_name_or_path", "{world}/model", "--dataset", "{world}/empty.jsonl"],
    "broken data": ["train", "--model_name_or_path", "{world}/model", "--dataset", "{world}/broken.jsonl"],
    "no chain": ["sft", "--model_name_or_path", "{world}/model", "--dataset", "{world}/plain.jsonl"],
    "K over V": ["train", *READY, "--latent_top_k", "5000"],
    "K of one": ["train", *READY, "--latent_top_k", "1"],
    "bad number": ["train", "--learning_rate", "fast"],
    "bad choice": ["train", "--invalid", "maybe"],
    "bad choice in a config": ["train", "--config", "{world}/choice.yaml"],
    "a word where a list is due": ["train", "--config", "{world}/word.yaml"],
    "a norm that would turn the gradient round": ["train", *READY, "--max_grad_norm", "-1"],
    "no pass over a rollout": ["train", *READY, "--num_iterations", "0"],
    "negative weight decay": ["sft", *READY, "--weight_decay", "-1"],
    "bad beta": ["train", *READY, "--adam_beta1", "2"],
    "negative steps": ["train", *READY, "--save_steps", "-1"],
    "no epochs": ["sft", *READY, "--num_train_epochs", "0"],
    "groups of one": ["train", *READY, "--num_generations", "1"],
    "too many weights": ["train", *READY, "--latent_top_k", "2", "--reward_weights", "1", "2"],
    "evaluations of nothing": ["train", *READY, "--latent_top_k", "2", "--eval_steps", "1"],
    "no such device": ["train", *READY, "--device", "cuda"],
    "no end marker": ["eval", "--model", "{world}/model", "--data", "{world}/data.jsonl", "--end_marker", "<stop>"],
    "no end marker in training": [
        "train", *READY, "--end_marker", "<stop>",
    ],
    "output folder is a file": [
        "train", *READY, "--output_dir", "{world}/data.jsonl/x",
        "--latent_top_k", "2",
    ],
    "no checkpoint": [
        "train", *READY, "--output_dir", "{world}/new",
        "--latent_top_k", "2", "--resume_from_checkpoint", "true",
    ],
    "unknown reward": [
        "train", *READY, "--reward_funcs", "acuracy",
    ],
    "bad nucleus": ["eval", "--model", "{world}/model", "--data", "{world}/data.jsonl", "--top_p", "2"],
    "bad pass-at": ["eval", "--model", "{world}/model", "--data", "{world}/data.jsonl", "--pass-at", "one"],
    "too few samples": [
        "eval", "--model", "{world}/model", "--data", "{world}/data.jsonl", "--pass-at", "1,8", "--num_samples", "4",
    ],
    "benchmark without a network": ["eval", "--model", "{world}/model", "--data", "gsm8k"],
    "data given twice": ["eval", "--model", "{world}/model", "--data", "svamp={world}/data.jsonl", "svamp"],
    "results cannot be written": [
        "eval", "--model", "{world}/model", "--data", "{world}/data.jsonl", "--out", "{world}/data.jsonl/x",
    ],
}  # fmt: skip


@pytest.mark.parametrize("arguments", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_and_exit_code_2(arguments, world, capsys):
    (world / "choice.yaml").write_text("scale_rewards: true\n")
    (world / "word.yaml").write_text("report_to: wandb\n")
    (world / "plain.jsonl").write_text('{"prompt": "a", "answer": "1"}\n')
    try:
        code = main([argument.format(world=world) for argument in arguments])
    except SystemExit as error:
        code = error.code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("latent-grpo")]
    assert code == 2
    assert len(lines) == 1
    assert len(lines[0]) > 30


def test_an_unknown_key_suggests_the_nearest(world, capsys):
    assert main(["train", "--config", str(world / "typo.yaml")]) == 2
    assert "did you mean 'learning_rate'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["trian"])
    assert "did you mean train?" in capsys.readouterr().err


def test_the_version_is_that_of_the_kernels(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"latent-grpo {latent_kernels.__version__}\n"


def test_help_comes_without_waiting_for_pytorch():
    code = (
        "import sys; from latent_grpo.commands.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "doctor" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"


def test_every_public_name_is_importable_in_any_order():
    code = "import latent_grpo.trainer, latent_grpo.evaluation\nfrom latent_grpo import *\nprint(evaluate.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "latent_grpo.evaluation"
    assert set(latent_grpo.__all__) <= set(dir(latent_grpo))
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        _ = latent_grpo.Trainer


@pytest.mark.parametrize(
    "flag", ["latent_top_k", "latent_top_p", "tau", "noise_scale", "temperature", "top_p", "top_k"]
)
def test_flags_of_sampling_reach_the_sampler(flag, world):
    given = {"latent_top_k": 3, "top_k": 7}.get(flag, 0.25)
    parser = generate_parser("generate")
    args = parser.parse_args(["--model", str(world / "model"), "--prompt", "x", f"--{flag}", str(given)])
    assert getattr(load_for_sampling(args)[2], flag) == given


@pytest.mark.parametrize("recipe", ["low-difficulty", "high-difficulty", "gsm8k-smollm2", "soft-grpo", "text-grpo"])
def test_recipes_are_valid_configurations(recipe):
    config = LatentGRPOConfig(**read_yaml(recipe, LatentGRPOConfig))
    assert config.generation_batch_size % config.num_generations == 0


@pytest.mark.parametrize("command", ["quickstart", "sft", "train", "eval", "generate", "compare", "doctor"])
def test_help_documents_every_flag(command, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main([command, "--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    configs = {"sft": LatentSFTConfig, "train": LatentGRPOConfig, "compare": CompareConfig}
    for field in configs.get(command, type("none", (), {})).__dict__.get("__dataclass_fields__", {}):
        assert f"--{field}" in text


def test_yaml_numbers_in_exponent_form_are_numbers(world):
    path = world / "rate.yaml"
    path.write_text("learning_rate: 1e-6\n")
    from latent_grpo.commands.options import parse_config

    config = parse_config("train", LatentGRPOConfig, "", ["--config", str(path), "--seed", "3"])
    assert (config.learning_rate, config.seed) == (1e-6, 3)


@pytest.mark.parametrize(
    ("preset", "algorithm"),
    [
        ("soft-grpo", dict(latent=True, noise="two_sided", first_token="all", invalid="keep", margin_gradient="none")),
        ("text-grpo", dict(latent=False, loss_type="grpo", first_token="all", invalid="keep", delta=None)),
    ],
)
def test_a_preset_behind_a_recipe_changes_the_algorithm_alone(preset, algorithm):
    from latent_grpo.commands.options import parse_config

    recipe = ["--config", "low-difficulty"]
    base, changed = (
        vars(parse_config("train", LatentGRPOConfig, "", argv))
        for argv in (recipe, [*recipe, "--config", preset, "--seed", "5"])
    )
    assert {name: changed[name] for name in algorithm} == algorithm
    different = {name for name in base if base[name] != changed[name]}
    assert different <= {*algorithm, "seed"}
    assert changed["seed"] == 5


@pytest.mark.parametrize("preset", ["soft-grpo", "text-grpo"])
def test_a_preset_trains(preset, world, tmp_path):
    assert main(train_arguments(world, tmp_path / "run", "--config", preset, "--max_steps", "1")) == 0
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert (row["latent_share"] > 0) == (preset == "soft-grpo")


def test_a_finished_folder_is_not_overwritten(world, tmp_path, capsys):
    assert main(train_arguments(world, tmp_path / "run", "--max_steps", "1")) == 0
    assert main(train_arguments(world, tmp_path / "run", "--max_steps", "1")) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_resumed_training_equals_uninterrupted_training(world, tmp_path):
    common = ["--learning_rate", "1e-3", "--loss_type", "grpo", "--first_token", "all"]
    assert main(train_arguments(world, tmp_path / "whole", "--max_steps", "4", *common)) == 0
    assert main(train_arguments(world, tmp_path / "cut", "--max_steps", "2", "--save_steps", "2", *common)) == 0
    assert (
        main(train_arguments(world, tmp_path / "cut", "--max_steps", "4", "--resume_from_checkpoint", "true", *common))
        == 0
    )
    whole, cut = ([json.loads(line) for line in (tmp_path / n / "metrics.jsonl").open()] for n in ("whole", "cut"))
    assert [row["step"] for row in cut] == [1, 2, 3, 4]
    for name in ("reward", "loss", "grad_norm", "mixture_entropy"):
        assert [row[name] for row in whole] == [row[name] for row in cut]


def test_sigint_leaves_a_checkpoint_and_resume_continues(world, tmp_path):
    command = [sys.executable, "-m", "latent_grpo", *train_arguments(world, tmp_path / "run", "--max_steps", "100000")]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130
    (saved,) = (tmp_path / "run").glob("checkpoint-*")
    step = int(saved.name.split("-")[1])
    assert step >= 2
    resumed = train_arguments(
        world, tmp_path / "run", "--max_steps", str(step + 1), "--resume_from_checkpoint", str(saved)
    )
    assert main(resumed) == 0
    assert json.loads(metrics.read_text().splitlines()[-1])["step"] == step + 1


def test_a_failing_reward_stops_the_run_with_the_sample_named(world, tmp_path, capsys):
    (tmp_path / "bad.py").write_text("def bad(completions, **kwargs):\n    return [float('nan')] * len(completions)\n")
    code = main(
        train_arguments(world, tmp_path / "run", "--max_steps", "1", "--reward_funcs", f"{tmp_path / 'bad.py'}:bad")
    )
    assert code == 1
    assert "bad" in capsys.readouterr().err


def test_sft_then_eval_then_generate(world, tmp_path, capsys):
    sft = [
        "sft",
        "--model_name_or_path",
        str(world / "model"),
        "--dataset",
        str(world / "data.jsonl"),
        "--max_steps",
        "2",
    ]
    assert main([*sft, "--per_device_train_batch_size", "4", "--output_dir", str(tmp_path / "sft")]) == 0
    model = str(tmp_path / "sft")
    PreTrainedTokenizerFast.from_pretrained(model)
    out = str(tmp_path / "eval.json")
    options = ["--latent_top_k", "2", "--max_completion_length", "6"]
    assert (
        main(
            ["eval", "--model", model, "--data", str(world / "data.jsonl"), "--pass-at", "1,2", "--out", out, *options]
        )
        == 0
    )
    (result,) = json.loads(Path(out).read_text())["results"].values()
    assert result["problems"] == 24
    assert 0 <= result["pass_at_1"] <= 1
    assert 0 <= result["pass@2"] <= 1
    capsys.readouterr()
    assert main(["generate", "--model", model, "--prompt", "Mia has 3 coins. finds 4. How many now?", *options]) == 0
    assert "answer:" in capsys.readouterr().out
    assert main(["doctor", "--model", model]) == 0
    assert torch.get_default_dtype() == torch.float32
