"""Models that cannot be used end every command with one line and exit code 2, before weights are read if possible."""

from __future__ import annotations

import json

import pytest
from support.commands import exit_code
from transformers import AutoConfig, AutoModelForCausalLM

from latent_grpo.quickstart.toy_task import make_problems, worked_examples


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "data.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in worked_examples(make_problems(24, seed=0), seed=0)))
    return str(file)


def commands(model, data, out):
    """Return the words of every command that takes a model."""
    given = ["--model_name_or_path", str(model), "--dataset", data, "--output_dir"]
    rollouts = ["--generation_batch_size", "8", "--num_generations", "4", "--latent_top_k", "2", "--max_steps", "1"]
    return {
        "train": ["train", *given, f"{out}/grpo", *rollouts],
        "sft": ["sft", *given, f"{out}/sft", "--max_steps", "1"],
        "encode": ["encode", *given, f"{out}/encode", "--max_steps", "1"],
        "eval": ["eval", "--model", str(model), "--data", data, "--max_completion_length", "30", "--latent_top_k", "2"],
        "generate": ["generate", "--model", str(model), "--prompt", "7 + 1", "--latent_top_k", "2"],
        "doctor": ["doctor", "--model", str(model)],
        "plan": ["doctor", "--plan", "--model", str(model)],
    }


@pytest.mark.parametrize("command", ["train", "sft", "encode", "eval", "generate", "doctor", "plan"])
def test_recurrent_layers_are_refused_before_weights_are_read(command, tokenizer, data, tmp_path, capsys):
    model = tmp_path / "hybrid"
    tokenizer.save_pretrained(model)
    kinds = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
    AutoConfig.for_model("lfm2", architectures=["Lfm2ForCausalLM"], **kinds).save_pretrained(model)
    assert not list(model.glob("*.safetensors"))
    assert exit_code(commands(model, data, tmp_path)[command]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert "model type 'lfm2' has layers of kind 'conv'" in error[-1]


@pytest.mark.parametrize("command", ["train", "sft", "encode", "eval", "generate"])
def test_a_table_of_positions_bounds_prompt_and_response(command, tokenizer, data, tmp_path, capsys):
    model, small = tmp_path / "gpt2", {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 20}
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **small, **ids)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    assert exit_code(commands(model, data, tmp_path)[command]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    reason = "'gpt2' is limited to 20: its table of position embeddings ends there"
    if command != "generate":  # the prompt alone is too long, which is found first
        reason = "the prompt has 21 tokens, and the model's context is 20"
    assert reason in error[-1]
