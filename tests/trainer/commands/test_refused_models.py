"""Every command refuses a folder whose model cannot be used, before it does anything, in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.models import SIZE, tiny
from transformers import AutoConfig, AutoModelForCausalLM

from latent_grpo.commands.main import main

NAN = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module", params=["roberta", "nan"])
def refused(request: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a model that is refused, and a word of the reason.

    RoBERTa has a layer between body and LM head. The other model has one NaN, in the weight of that name.
    """
    folder = tmp_path_factory.mktemp("refused")
    if request.param == "roberta":
        options = dict(SIZE, vocab_size=len(tokenizer), is_decoder=True, eos_token_id=2, pad_token_id=0)
        model, word = AutoModelForCausalLM.from_config(AutoConfig.for_model("roberta", **options)), "RobertaForCausalLM"
    else:
        model, word = tiny("llama", len(tokenizer)), f"the weight {NAN!r} of {str(folder)!r} is not finite"
        model.get_parameter(NAN).data[0, 0] = float("nan")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, word


@pytest.mark.parametrize("command", ["sft", "encode", "train", "eval", "generate", "doctor"])
def test_a_command_refuses_a_model_in_one_line(
    command: str, refused: tuple[Path, str], input_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out, (folder, word) = f"{input_folder}/data.jsonl", tmp_path / "out", refused
    training = f"--model_name_or_path {folder} --dataset {data} --output_dir {out} --max_steps 1"
    flags = {
        "sft": training,
        "encode": training,
        "train": f"{training} --generation_batch_size 8 --num_generations 4 --latent_top_k 2",
        "eval": f"--model {folder} --data {data}",
        "generate": f"--model {folder} --prompt 1",
        "doctor": f"--model {folder}",
    }[command]
    assert main([command, *flags.split()]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("latent-grpo")]
    assert len(error) == 1
    assert word in error[0]
    assert not any(path.suffix == ".safetensors" for path in out.rglob("*"))
