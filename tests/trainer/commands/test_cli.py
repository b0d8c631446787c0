"""Every mistake on the command line is one line and exit code 2. Help and typing mistakes answer without PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys
import types

import pytest
from support.commands import exit_code

import latent_grpo
import latent_kernels

TRAIN = "train --model_name_or_path {inputs}/model --dataset {inputs}/data.jsonl"
SFT = "sft --model_name_or_path {inputs}/model --dataset {inputs}/data.jsonl"
EVAL = "eval --model {inputs}/model --data {inputs}/data.jsonl"
MISTAKES = {
    "unknown command": "trian",
    "unknown flag": "train --learning_rat 1",
    "unknown config key": "train --config {inputs}/unknown_key.yaml",
    "missing config": "train --config {inputs}/none.yaml",
    "no model given": "train --dataset {inputs}/data.jsonl",
    "missing model": "train --model_name_or_path {inputs}/none --dataset {inputs}/data.jsonl",
    "missing data": "train --model_name_or_path {inputs}/model --dataset {inputs}/none.jsonl",
    "empty data": "train --model_name_or_path {inputs}/model --dataset {inputs}/empty.jsonl",
    "broken data": "train --model_name_or_path {inputs}/model --dataset {inputs}/broken.jsonl",
    "no chain": "sft --model_name_or_path {inputs}/model --dataset {inputs}/without_chain.jsonl",
    "K over V": f"{TRAIN} --latent_top_k 5000",
    "K of one": f"{TRAIN} --latent_top_k 1",
    "word for a number": "train --learning_rate fast",
    "unknown choice": "train --invalid maybe",
    "unknown choice in a config": "train --config {inputs}/unknown_choice.yaml",
    "word for a list in a config": "train --config {inputs}/word_for_list.yaml",
    "negative clipping norm": f"{TRAIN} --max_grad_norm -1",
    "no pass over a rollout": f"{TRAIN} --num_iterations 0",
    "negative weight decay": f"{SFT} --weight_decay -1",
    "beta1 of two": f"{TRAIN} --adam_beta1 2",
    "negative steps": f"{TRAIN} --save_steps -1",
    "no epochs": f"{SFT} --num_train_epochs 0",
    "groups of one": f"{TRAIN} --num_generations 1",
    "too many weights": f"{TRAIN} --latent_top_k 2 --reward_weights 1 2",
    "evaluations without data": f"{TRAIN} --latent_top_k 2 --eval_steps 1",
    "no such device": f"{TRAIN} --device cuda",
    "no end marker": f"{EVAL} --end_marker <stop>",
    "no end marker in training": f"{TRAIN} --end_marker <stop>",
    "output folder is a file": f"{TRAIN} --output_dir {{inputs}}/data.jsonl/x --latent_top_k 2",
    "no checkpoint": f"{TRAIN} --output_dir {{inputs}}/new --latent_top_k 2 --resume_from_checkpoint true",
    "unknown reward": f"{TRAIN} --reward_funcs acuracy",
    "nucleus of two": f"{EVAL} --top_p 2",
    "word for pass-at": f"{EVAL} --pass-at one",
    "too few samples": f"{EVAL} --pass-at 1,8 --num_samples 4",
    "benchmark without a network": "eval --model {inputs}/model --data gsm8k",
    "data given twice": "eval --model {inputs}/model --data svamp={inputs}/data.jsonl svamp",
    "results cannot be written": f"{EVAL} --out {{inputs}}/data.jsonl/x",
}


@pytest.fixture
def without_network(monkeypatch):
    """A stand-in for `datasets` that fails at once. The client of the Hub itself retries for 20 seconds."""

    def load_dataset(*args, **options):
        raise ConnectionError("no network")

    stand_in = types.ModuleType("datasets")
    stand_in.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", stand_in)


@pytest.mark.parametrize("command", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_and_exit_code_2(command, input_folder, without_network, capsys):
    assert exit_code(command.format(inputs=input_folder).split()) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("latent-grpo")]
    assert len(line) > 30


def test_an_unknown_key_or_command_suggests_the_nearest(input_folder, capsys):
    assert exit_code(["train", "--config", str(input_folder / "unknown_key.yaml")]) == 2
    assert "did you mean 'learning_rate'" in capsys.readouterr().err
    assert exit_code(["trian"]) == 2
    assert "did you mean train?" in capsys.readouterr().err


def test_the_version_is_that_of_the_kernels(capsys):
    assert exit_code(["--version"]) == 0
    assert capsys.readouterr().out == f"latent-grpo {latent_kernels.__version__}\n"


WITHOUT_TORCH = {  # command, its exit code
    "--help": 0,
    "train --help": 0,
    "sft --help": 0,
    "eval --help": 0,
    "generate --help": 0,
    "compare --help": 0,
    "train --learning_rat 1": 2,
    "trian": 2,
    "inspect /no/such/run": 2,
    "train --model m --data /no/such.jsonl": 2,
    "train --model m --data org/name --eval_dataset no.jsonl --eval_steps 1": 2,
    "sft --model m --data /no/such.jsonl": 2,
    "encode --model m --data /no/such.jsonl": 2,
    "eval --model m --data gsm8k=/no/such.jsonl": 2,
    "eval --model ./no/model --data svamp": 2,
    "generate --model ./no/model --prompt p": 2,
}
RUN_AS_MODULE = """
import json, runpy, sys
results = {}
for command in json.loads(sys.argv[1]):
    sys.argv = ["latent-grpo", *command.split()]
    try:
        runpy.run_module("latent_grpo", run_name="__main__")
    except SystemExit as stop:
        results[command] = [stop.code, sorted({"torch", "transformers"} & sys.modules.keys())]
print(json.dumps(results))
"""


def test_help_and_typing_mistakes_do_not_import_torch():
    """`python -m latent_grpo` answers at once; importing PyTorch takes seconds."""
    command = [sys.executable, "-c", RUN_AS_MODULE, json.dumps(list(WITHOUT_TORCH))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    results = json.loads(done.stdout.splitlines()[-1])
    assert results == {command: [code, []] for command, code in WITHOUT_TORCH.items()}


def test_every_public_name_is_importable_in_any_order():
    code = "import latent_grpo.trainer, latent_grpo.evaluation\nfrom latent_grpo import *\nprint(evaluate.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "latent_grpo.evaluation.results"
    assert set(latent_grpo.__all__) <= set(dir(latent_grpo))
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        _ = latent_grpo.Trainer
