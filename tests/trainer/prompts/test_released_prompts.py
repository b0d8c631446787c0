"""Prompts equal, character for character, what the authors' released scripts write: rows 0 to 9 of each benchmark.

The file beside this one holds the strings that the released functions gave for the same rows and the same templates.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import SHARED
from support.chat_tokenizers import chat_tokenizer

from latent_grpo.config import LatentSFTConfig
from latent_grpo.data.benchmarks import load_benchmarks
from latent_grpo.data.rows import load_rows
from latent_grpo.model import end_marker_ids
from latent_grpo.prompts import FORMATS, INSTRUCTION
from latent_grpo.sft import build_example

RELEASED = json.loads((Path(__file__).parent / "data" / "released_prompts.json").read_text("utf-8"))
FILES = {
    "gsm8k-aug": ("gsm8k_test.jsonl", "latent-grpo-low"),
    "gsm-hard": ("gsm_hard.jsonl", "latent-grpo-low"),
    "svamp": ("svamp.json", "latent-grpo-low"),
    "multiarith": ("multiarith.json", "latent-grpo-low"),
    "math-500": ("math500_test.jsonl", "latent-grpo-high"),
    "aime24": ("aime24_test.jsonl", "latent-grpo-high"),
}
CASES = [(benchmark, template) for benchmark, templates in RELEASED["evaluation"].items() for template in templates]


def rows_of(benchmark: str):
    """Return the first ten rows of a benchmark and the prompt format of its setting."""
    file, prompt_format = FILES[benchmark]
    path = SHARED / "data" / file
    if not path.exists():
        pytest.skip(f"the data set {file} is not beside the repository")
    return load_rows(str(path), limit=10), FORMATS[prompt_format]


@pytest.mark.parametrize(("name", "template"), CASES)
def test_evaluation_prompts_are_the_released_ones(name, template):
    rows, prompt_format = rows_of(name)
    tokenizer, expected = chat_tokenizer(template), RELEASED["evaluation"][name][template]
    assert [prompt_format.render(tokenizer, row["prompt"]) for row in rows[: len(expected)]] == expected
    assert len(expected) == (2 if template.endswith("-think") else 10)


@pytest.mark.parametrize("name", RELEASED["training"])
def test_prompts_of_the_released_parquet_schema_get_no_second_instruction(name):
    rows, prompt_format = rows_of(name)
    for template, expected in RELEASED["training"][name].items():
        tokenizer, bare = chat_tokenizer(template), chat_tokenizer(template.removesuffix("-think"))
        for row, text in zip(rows, expected, strict=False):
            messages = [{"role": "user", "content": f"{INSTRUCTION}\n{row['prompt']}"}]
            if prompt_format.instruction_role == "system":
                messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": row["prompt"]}]
            assert prompt_format.render(tokenizer, messages) == text
            # Training needs the tag too where the template lacks it, as the released evaluation writes it.
            assert prompt_format.render(bare, messages) == text.rstrip()


@pytest.mark.parametrize("name", ["latent-grpo-high", "latent-grpo-gpqa"])
def test_gpqa_is_asked_as_released(name, tmp_path):
    path = tmp_path / "gpqa.jsonl"
    path.write_text("\n".join(map(json.dumps, RELEASED["gpqa"]["rows"])))
    rows = load_benchmarks([f"gpqa={path}"], released=True)["gpqa-diamond"]
    tokenizer = chat_tokenizer("qwen")
    assert [row["answer"] for row in rows] == RELEASED["gpqa"]["answers"]
    assert [FORMATS[name].render(tokenizer, row["prompt"]) for row in rows] == RELEASED["gpqa"]["qwen"]
    others = load_benchmarks([f"gpqa={path}"])["gpqa-diamond"]
    assert others != rows  # without `released`, this package's own order and words


def test_stage_2_of_the_llama_start_is_written_as_released(tmp_path):
    rows = [{**row, "cot": "<think><<1+1=2>> and so on</think>"} for row in RELEASED["stage2"]]
    names = ("problem", "cot", "cot_answer")
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps({name: row[name] for name in names}) for row in rows))
    tokenizer, prompt_format = chat_tokenizer("llama"), FORMATS["latent-sft-llama"]
    marker = end_marker_ids(tokenizer, "</think>")
    for row, expected in zip(load_rows(str(path)), rows, strict=True):
        assert prompt_format.render(tokenizer, row["prompt"]) == expected["prompt"]
        example = build_example(tokenizer, row, LatentSFTConfig(compression=2), prompt_format, marker, 1)
        assert tokenizer.decode(example.prompt) == expected["prompt"]  # no BOS is added
        latents = -(-len("<<1+1=2>> and so on") // 2)  # a byte is a token
        assert tokenizer.decode([i for element in example.response[:latents] for i in element]) == "<<1+1=2>> and so on"
        assert tokenizer.decode([i for (i,) in example.response[latents:]]) == expected["text"]


def test_special_tokens_are_not_added_twice():
    for template in ("llama", "qwen"):
        tokenizer = chat_tokenizer(template)
        (ids,) = FORMATS["latent-grpo-low"].ids(tokenizer, ["1 + 1?"])
        assert ids.count(tokenizer.bos_token_id) == (1 if template == "llama" else 3)
        assert tokenizer.decode(ids) == FORMATS["latent-grpo-low"].render(tokenizer, "1 + 1?")
