"""Every command refuses a folder whose model cannot be used, before it does anything, in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.models import SIZE
from transformers import AutoConfig, AutoModelForCausalLM

from latent_grpo.commands.main import main


@pytest.fixture(scope="module")
def refused(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a RoBERTa, which has a layer between body and LM head."""
    folder = tmp_path_factory.mktemp("refused")
    options = dict(SIZE, vocab_size=len(tokenizer), is_decoder=True, eos_token_id=2, pad_token_id=0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("roberta", **options)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("command", ["sft", "encode", "train", "eval", "generate", "doctor"])
def test_a_command_refuses_a_model_in_one_line(
    command: str, refused: Path, input_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = f"{input_folder}/data.jsonl", tmp_path / "out"
    training = f"--model_name_or_path {refused} --dataset {data} --output_dir {out} --max_steps 1"
    flags = {
        "sft": training,
        "encode": training,
        "train": f"{training} --generation_batch_size 8 --num_generations 4 --latent_top_k 2",
        "eval": f"--model {refused} --data {data}",
        "generate": f"--model {refused} --prompt 1",
        "doctor": f"--model {refused}",
    }[command]
    assert main([command, *flags.split()]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("latent-grpo")]
    assert len(error) == 1
    assert "RobertaForCausalLM" in error[0]
    assert not any(path.suffix == ".safetensors" for path in out.rglob("*"))
