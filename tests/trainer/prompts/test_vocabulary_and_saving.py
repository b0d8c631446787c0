"""A tokenizer with more entries than the table has rows, and the prompt format that is saved with a model."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace

import pyarrow
import pyarrow.parquet
import pytest
import torch
from support.chat_tokenizers import chat_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from latent_grpo import LatentGRPOConfig, LatentGRPOTrainer, LatentSampling, LatentSFTConfig, LatentSFTTrainer, evaluate
from latent_grpo.commands.main import main
from latent_grpo.errors import ModelError
from latent_grpo.prompts import FORMATS, INSTRUCTION, PromptFormat, read_format, write_format

EXTRA = "<|compress_token|>"
ROWS = [{"prompt": f"{i} + 1?", "chain": f"{i} 1 {i + 1}", "answer": str(i + 1)} for i in range(4)]
SMALL = dict(num_generations=2, generation_batch_size=4, max_completion_length=3, latent_top_k=2, group_filter=False)


def make(template: str = "llama"):
    """Return a tiny model, whose table lacks a row for the last entry of the tokenizer, and the tokenizer."""
    tokenizer = chat_tokenizer(template, extra=(EXTRA,))
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    tokens = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    config = LlamaConfig(vocab_size=len(tokenizer) - 1, max_position_embeddings=600, **sizes, **tokens)
    assert tokenizer.convert_tokens_to_ids(EXTRA) == config.vocab_size
    return LlamaForCausalLM(config), tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("start")
    model, tokenizer = make()
    model.save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    return path


def write_rows(folder, name, rows):
    (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return str(folder / name)


def run_sft(rows, tmp_path, **options):
    model, tokenizer = make()
    args = LatentSFTConfig(output_dir=str(tmp_path / "sft"), max_steps=1, log_table=False, **options)
    return LatentSFTTrainer(model, args, rows, tokenizer)


def run_grpo(rows, tmp_path, tokenizer=None, **options):
    model, own = make()
    args = LatentGRPOConfig(output_dir=str(tmp_path / "grpo"), max_steps=1, log_table=False, **SMALL, **options)
    return LatentGRPOTrainer(model, None, args, rows, ROWS, tokenizer or own)


def test_it_trains_as_long_as_no_such_id_occurs(tmp_path):
    for trainer in (run_sft(ROWS, tmp_path), run_grpo(ROWS, tmp_path)):
        assert math.isfinite(trainer.train()["loss"])
        assert trainer.step == 1


def bad(place: str):
    """Return rows of which the third holds the token without a row, in its prompt, chain or answer."""
    return [*ROWS[:2], {**ROWS[2], place: ROWS[2][place] + EXTRA}, ROWS[3]]


@pytest.mark.parametrize(
    ("make_trainer", "place", "words"),
    [
        (run_sft, "prompt", "row 3, the prompt '2 + 1?"),
        (run_sft, "chain", "chain and answer of row 3"),
        (run_sft, "answer", "chain and answer of row 3"),
        (run_grpo, "prompt", "row 3, the prompt '2 + 1?"),
    ],
)
def test_a_row_with_such_an_id_is_named_before_the_first_step(make_trainer, place, words, tmp_path):
    with pytest.raises(ModelError) as info:
        make_trainer(bad(place), tmp_path)
    message = str(info.value)
    assert message.startswith(words)
    table = len(chat_tokenizer("llama"))
    assert f"id {table} ({EXTRA!r}) has no row in the embedding table, which has {table}" in message
    assert "resize_token_embeddings" in message
    assert "\n" not in message
    assert not (tmp_path / "sft").exists() or not list((tmp_path / "sft").iterdir())


def test_markers_without_a_row_are_named(tmp_path):
    for make_trainer in (run_sft, run_grpo):
        with pytest.raises(ModelError, match=re.escape(f"the end marker {EXTRA!r}: id ")):
            make_trainer(ROWS, tmp_path, end_marker=EXTRA)
        with pytest.raises(ModelError, match=r"the prompt .*has no row"):
            make_trainer(ROWS, tmp_path, opening_marker=EXTRA)
    for name in ("eos_token", "pad_token"):
        _, tokenizer = make()
        setattr(tokenizer, name, EXTRA)
        with pytest.raises(ModelError, match=f"the tokenizer's {name}: id "):
            run_grpo(ROWS, tmp_path, tokenizer)


def test_evaluation_checks_its_prompts_first():
    model, tokenizer = make()
    sampling = LatentSampling(latent_top_k=2, max_new_tokens=2, end_token_id=5, eos_token_id=tokenizer.eos_token_id)
    assert evaluate(model, tokenizer, ROWS, sampling)["problems"] == 4
    with pytest.raises(ModelError, match="row 3, the prompt"):
        evaluate(model, tokenizer, bad("prompt"), sampling)


@pytest.mark.parametrize("command", ["eval", "generate", "doctor", "sft", "train"])
def test_every_command_says_it_in_one_line(command, folder, tmp_path, capsys):
    data = write_rows(tmp_path, "data.jsonl", bad("prompt"))
    options = {
        "eval": ["--data", data],
        "generate": ["--prompt", f"a {EXTRA}"],
        "doctor": ["--data", data],
        "sft": ["--dataset", data, "--output_dir", str(tmp_path / "run")],
        "train": ["--dataset", data, "--output_dir", str(tmp_path / "run"), "--latent_top_k", "2"],
    }[command]
    model = "--model_name_or_path" if command in ("sft", "train") else "--model"
    assert main([command, model, str(folder / "model"), *options]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("latent-grpo")]
    assert f"({EXTRA!r}) has no row in the embedding table" in line


def test_the_format_goes_with_the_model_through_every_command(folder, tmp_path, capsys):
    """`sft` is told the format. Its model, its checkpoints and what `train` makes of them keep it."""
    data = write_rows(tmp_path, "data.jsonl", ROWS)
    start, warm, trained = str(folder / "model"), str(tmp_path / "sft"), str(tmp_path / "grpo")
    common = ["--max_steps", "1", "--log_table", "false", "--dataset", data, "--save_steps", "1"]
    chosen = ["--prompt_format", "latent-grpo-low", "--prompt_suffix", " Go.", "--end_marker", "</t>"]
    assert main(["sft", "--model_name_or_path", start, "--output_dir", warm, *common, *chosen]) == 0
    expected = PromptFormat(INSTRUCTION, "user", " Go.", "<think>", "</t>", chat_template=True)
    small = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    logged = ["--log_completions"]
    assert main(["train", "--model_name_or_path", warm, "--output_dir", trained, *common, *small, *logged]) == 0
    for run in (warm, trained):
        assert read_format(run) == read_format(f"{run}/checkpoint-1") == expected
    short = ["--latent_top_k", "2", "--max_completion_length", "2"]
    out = str(tmp_path / "eval")
    assert main(["eval", "--model", trained, "--data", data, "--out", out, *short]) == 0
    (setting,) = json.loads((tmp_path / "eval.json").read_text())["settings"].values()
    assert setting["prompt_format"]["end_marker"] == "</t>"
    assert main(["generate", "--model", trained, "--prompt", "1 + 1?", *short]) == 0
    capsys.readouterr()
    for command in (["doctor", "--model", trained, "--data", data], ["inspect", trained, "--data", data]):
        assert main(command) in (0, 1)
        shown = capsys.readouterr().out
        assert f"{INSTRUCTION}\n0 + 1? Go.<|eot_id|>" in shown
        assert "ids: " in shown
        assert "'k', " in shown
        assert "warm start, 3 latent steps: prompt | [0 ] [1 ] [1] | </t> | \\boxed{1}<|eot_id|>" in shown
    assert main(["inspect", trained]) == 0
    assert f"{INSTRUCTION}\n" in capsys.readouterr().out
    # Another format than the saved one is another run.
    other = ["--resume_from_checkpoint", "true", "--prompt_suffix", " Stop."]
    again = ["train", "--model_name_or_path", warm, "--output_dir", trained, *common, *small, *logged, *other]
    assert main(again) == 2
    assert "was written with prompt_suffix ' Go.', this run has ' Stop.'" in capsys.readouterr().err


def test_a_trainer_in_python_takes_the_format_of_the_folder_that_it_loads(folder, tmp_path):
    model, tokenizer = make()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_format(tmp_path / "model", FORMATS["latent-grpo-high"])
    for start, expected in ((folder / "model", PromptFormat()), (tmp_path / "model", FORMATS["latent-grpo-high"])):
        args = LatentGRPOConfig(output_dir=str(tmp_path / "run"), max_steps=1, **SMALL)
        trainer = LatentGRPOTrainer(str(start), None, args, ROWS)
        assert trainer.prompt_format == expected
        groups, _ = trainer.collector.collect(trainer.full_model, 1)
        (row, *_), mask = groups.rollout.prompt_ids.tolist(), groups.rollout.prompt_mask[0].tolist()
        ids = [token for token, real in zip(row, mask, strict=True) if real]
        assert [ids] == expected.ids(trainer.tokenizer, [groups.samples.prompts[0]])


def test_a_model_that_was_loaded_before_keeps_the_format_of_its_folder(folder, tmp_path):
    saved, path = PromptFormat("Think.", end_marker="</think>"), tmp_path / "warm"
    shutil.copytree(folder / "model", path)
    write_format(path, saved)
    model, tokenizer = LlamaForCausalLM.from_pretrained(path), make()[1]
    args = LatentGRPOConfig(output_dir=str(tmp_path / "grpo"), **SMALL)
    assert LatentGRPOTrainer(model, None, args, ROWS, None, tokenizer).prompt_format == saved
    args = LatentSFTConfig(output_dir=str(tmp_path / "sft"), prompt_suffix=" Go.")
    assert LatentSFTTrainer(model, args, ROWS, tokenizer).prompt_format == replace(saved, prompt_suffix=" Go.")
    shutil.rmtree(path)  # the place that a model names need not exist any more
    args = LatentGRPOConfig(output_dir=str(tmp_path / "grpo"), **SMALL)
    assert LatentGRPOTrainer(model, None, args, ROWS, None, tokenizer).prompt_format == PromptFormat()


def test_a_released_parquet_file_goes_through_the_recipe(folder, tmp_path):
    messages = [[{"role": "user", "content": f"{INSTRUCTION}\n{row['prompt']}"}] for row in ROWS]
    records = [
        {
            "data_source": "lighteval/MATH",
            "prompt": prompt,
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": row["answer"]},
            "extra_info": {"split": "train", "index": i, "answer": row["answer"], "question": row["prompt"]},
        }
        for i, (row, prompt) in enumerate(zip(ROWS, messages, strict=True))
    ]
    path = str(tmp_path / "train.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records * 3), path)
    paths = ["--model_name_or_path", str(folder / "model"), "--dataset", path, "--output_dir", str(tmp_path / "run")]
    sizes = ["--max_steps", "1", "--generation_batch_size", "8", "--max_completion_length", "3", "--latent_top_k", "2"]
    assert main(["train", "--config", "low-difficulty", *paths, *sizes, "--max_generation_batches", "1"]) == 0
    assert read_format(str(tmp_path / "run")) == FORMATS["latent-grpo-low"]
