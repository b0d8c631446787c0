"""What is wrong with a row is one line before the first step, alike for every trainer and command."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
from support.chat_tokenizers import TEMPLATES, chat_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from latent_grpo import LatentGRPOConfig, LatentGRPOTrainer, LatentSampling, LatentSFTConfig, LatentSFTTrainer, evaluate
from latent_grpo.commands.main import main
from latent_grpo.config import EncodeConfig
from latent_grpo.errors import ConfigError, DataError, ModelError
from latent_grpo.prompts import PromptFormat, check_prompts
from latent_grpo.sft.encode import encode
from latent_grpo.sft.pieces import chain_examples

ROWS = [{"prompt": f"{i} + 1?", "chain": f"{i} 1 {i + 1}", "answer": str(i + 1)} for i in range(4)]
LONG = [*ROWS, {"prompt": "a much longer question?", "chain": "1 2", "answer": "1"}]
SMALL = dict(num_generations=2, generation_batch_size=4, max_completion_length=12, latent_top_k=2, group_filter=False)
BOTH = pytest.mark.parametrize("kind", ["grpo", "sft"])
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATES["qwen"]
)
CONFIGS = (LatentGRPOConfig, LatentSFTConfig, EncodeConfig)


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer("llama")


@pytest.fixture(scope="module")
def model(tokenizer):
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ids = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=600, **sizes, **ids))


@pytest.fixture
def make(model, tokenizer, tmp_path):
    """`make(kind, rows, tokenizer=..., **options)` returns a trainer, which has taken no step."""

    def trainer(kind, rows, tokenizer=tokenizer, **options):
        common = dict(output_dir=str(tmp_path / "run"), max_steps=1, log_table=False)
        if kind == "sft":
            args = LatentSFTConfig(**common, **options)
            return LatentSFTTrainer(copy.deepcopy(model), args, rows, tokenizer)
        args = LatentGRPOConfig(**common, **SMALL, **options)
        return LatentGRPOTrainer(copy.deepcopy(model), None, args, rows, ROWS, tokenizer)

    return trainer


def refused(make, kind, rows, error=DataError, **options) -> str:
    with pytest.raises(error) as caught:
        make(kind, rows, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@BOTH
def test_long_prompts_are_counted_and_refused_or_left_out(kind, make):
    message = refused(make, kind, [LONG[-1], *LONG], max_prompt_length=70)
    assert message.startswith(
        "2 of 6 prompts are over max_prompt_length 70, the first in row 1 with 77 tokens; raise it"
    )
    assert "--long_prompts drop" in message
    with pytest.warns(UserWarning, match="1 of 5 rows are left out: their prompts have more than 70 tokens"):
        trainer = make(kind, LONG, max_prompt_length=70, long_prompts="drop")
    numbers = [e.number for e in trainer.examples] if kind == "sft" else [ROWS.index(row) + 1 for row in trainer.rows]
    assert numbers == [1, 2, 3, 4]
    message = refused(make, kind, LONG, max_prompt_length=3, long_prompts="drop")
    assert message == "no prompt has 3 tokens or fewer; raise max_prompt_length"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(kind, ROWS, max_prompt_length=70)
        make(kind, LONG, max_prompt_length=77)


@BOTH
def test_prompts_beyond_the_context_or_the_memory_are_refused_with_their_row(kind, make, model, monkeypatch):
    monkeypatch.setattr(model.config, "max_position_embeddings", 77)
    message = refused(make, kind, LONG)
    assert message.startswith("dataset, row 5: the prompt has 77 tokens, and the model's context is 77; remove the row")
    assert "--max_prompt_length 76 --long_prompts drop" in message
    if kind == "sft":
        return
    monkeypatch.setattr(model.config, "max_position_embeddings", 600)
    make(kind, ROWS, rollout_memory=1e-5)
    message = refused(make, kind, LONG, error=ModelError, rollout_memory=1e-5)
    assert "GiB of cache, but rollout_memory is 1e-05 GiB" in message
    with pytest.warns(UserWarning, match="1 of 5 rows are left out"):
        make(kind, LONG, rollout_memory=1e-5, max_prompt_length=70, long_prompts="drop")


@pytest.mark.parametrize("config", CONFIGS)
def test_dropping_needs_a_limit(config):
    with pytest.raises(ConfigError, match="long_prompts is 'drop': it needs max_prompt_length"):
        config(long_prompts="drop")


def test_long_responses_of_the_warm_start_are_counted(make, tokenizer):
    with pytest.warns(
        UserWarning, match="1 of 5 rows are left out: their responses have more than max_completion_length"
    ):
        trainer = make("sft", [*ROWS, {**ROWS[0], "chain": "1 " * 200}])
    assert [example.number for example in trainer.examples] == [1, 2, 3, 4]
    args = EncodeConfig(max_prompt_length=70)
    with pytest.raises(DataError, match="1 of 5 prompts are over max_prompt_length 70, the first in row 5"):
        chain_examples(tokenizer, LONG, args, PromptFormat())


@pytest.mark.parametrize("missing", [{}, {"chain": None}, {"chain": ""}, {"chain": " \n"}], ids=str)
def test_rows_without_a_chain_are_counted_and_refused_or_left_out(missing, make, model, tokenizer, tmp_path):
    bare = {name: ROWS[1][name] for name in ("prompt", "answer")} | missing
    rows = [ROWS[0], bare, ROWS[2], bare, ROWS[3]]
    message = refused(make, "sft", rows)
    assert message.startswith("row 2 has no chain of thought, and 2 of 5 rows have none; ")
    assert "--chain_column" in message
    assert "--missing_chains drop" in message
    with pytest.warns(UserWarning, match="2 of 5 rows are left out: they have no chain of thought"):
        trainer = make("sft", rows, missing_chains="drop")
    assert len(trainer.examples) == 3
    refused(make, "sft", [bare] * 2, missing_chains="drop")
    with pytest.raises(DataError, match="row 2 has no chain of thought, and 2 of 5"):
        encode(EncodeConfig(output_dir=str(tmp_path / "encode")), rows, tokenizer)


BAD_ROWS = {
    "no mapping": ("1 + 1?", "row 3 is '1 + 1?'; give a mapping with the key 'prompt'"),
    "no prompt": ({"question": "q", "answer": "1"}, "row 3 is {'chain': '1 2', 'question'"),
    "None": ({"prompt": None, "answer": "1"}, "row 3 has the prompt None; give a text, or messages"),
    "number": ({"prompt": 3, "answer": "1"}, "row 3 has the prompt 3"),
    "no message": ({"prompt": [], "answer": "1"}, "row 3 has an empty list of messages"),
    "message without content": (
        {"prompt": [{"role": "user"}], "answer": "1"},
        "row 3 has the prompt [{'role': 'user'}]",
    ),
    "content in parts": ({"prompt": [{"role": "user", "content": [{"type": "text"}]}]}, "row 3 has the prompt"),
    "messages among texts": (
        {"prompt": [{"role": "user", "content": "q"}], "answer": "1"},
        "row 3 has messages and the",
    ),
    "half a character": ({"prompt": "a \ud83d", "answer": "1"}, "row 3: the prompt holds '\\ud83d'"),
}


@BOTH
@pytest.mark.parametrize(("row", "words"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_row_that_is_no_prompt_is_named(row, words, kind, make, tmp_path):
    row = {"chain": "1 2", **row} if isinstance(row, dict) else row
    assert refused(make, kind, [*ROWS[:2], row, ROWS[3]]).startswith(words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("field", ["chain", "answer"])
def test_texts_of_the_warm_start_that_are_none_are_named(field, make):
    assert f"row 2: the {field}" in refused(make, "sft", [ROWS[0], {**ROWS[1], field: "\ud83d"}])
    assert "row 2 has no answer" in refused(make, "sft", [ROWS[0], {"prompt": "p", "chain": "c"}])


@BOTH
@pytest.mark.parametrize(
    "template",
    [NO_SYSTEM, "{{ messages[0]['content'] + 1 }}", "{{ 1 // (messages | length - 2) }}", "{{ messages[0].x.y }}"],
    ids=["raises", "type", "division", "undefined"],
)
def test_a_template_that_fails_at_one_row_is_named_before_the_first_step(template, kind, make, tmp_path):
    refusing = chat_tokenizer("qwen")
    refusing.chat_template = f"{{% if messages | length == 2 %}}{template}{{% else %}}{TEMPLATES['qwen']}{{% endif %}}"
    messages = [[{"role": "user", "content": row["prompt"]}] for row in ROWS]
    messages[2].insert(0, {"role": "system", "content": "Think."})
    rows = [{**row, "prompt": prompt} for row, prompt in zip(ROWS, messages, strict=True)]
    message = refused(make, kind, rows, ModelError, tokenizer=refusing)
    assert message.startswith("row 3: the chat template refuses the prompt")
    assert not (tmp_path / "run").exists()


def test_a_prompt_without_a_token_is_named(tokenizer, model):
    with pytest.raises(ModelError, match="row 2, the prompt '': has no token"):
        check_prompts(tokenizer, [{"prompt": "a"}, {"prompt": ""}], PromptFormat(chat_template=False), len(tokenizer))
    sampling = LatentSampling(latent_top_k=2, max_new_tokens=2, end_token_id=5)
    with pytest.raises(DataError, match="row 2 has the prompt None"):
        evaluate(model, tokenizer, [ROWS[0], {"prompt": None, "answer": "1"}], sampling)


@pytest.mark.parametrize("command", ["eval", "generate", "doctor", "sft", "encode", "train"])
def test_every_command_refuses_a_template_that_raises(command, model, tmp_path, capsys):
    tokenizer = chat_tokenizer("qwen")
    tokenizer.chat_template = "{{ raise_exception('not for you') }}"
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data.json").write_text(json.dumps(ROWS))
    data, out = str(tmp_path / "data.json"), ["--output_dir", str(tmp_path / "run")]
    options = {
        "eval": ["--data", data],
        "generate": ["--prompt", "1 + 1?"],
        "doctor": ["--data", data],
        "train": ["--dataset", data, *out, "--latent_top_k", "2"],
    }.get(command, ["--dataset", data, *out])
    flag = "--model" if command in ("eval", "generate", "doctor") else "--model_name_or_path"
    assert main([command, flag, str(tmp_path / "model"), *options]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("latent-grpo")]
    assert "row 1: the chat template refuses the prompt '" in line
    assert "not for you" in line


@pytest.mark.parametrize(("choice", "code"), [("error", 2), ("drop", 0)])
def test_eval_counts_long_prompts_too(choice, code, model, tokenizer, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data.json").write_text(json.dumps(LONG))
    flags = [
        "--max_prompt_length",
        "70",
        "--long_prompts",
        choice,
        "--latent_top_k",
        "2",
        "--max_completion_length",
        "4",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        words = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data.json")]
        assert main(["eval", *words, *flags, "--out", str(tmp_path / "out")]) == code
    if choice == "error":
        assert "1 of 5 prompts are over max_prompt_length 70" in capsys.readouterr().err
    else:
        (result,) = json.loads((tmp_path / "out.json").read_text())["results"].values()
        assert result["problems"] == 4


def test_an_end_marker_inside_a_chain_is_named(make, tokenizer):
    rows = [ROWS[0], {**ROWS[1], "chain": "1 2 </think> 3"}]
    words = "row 2 holds the end marker '</think>' in its chain of thought; remove it, or choose another end_marker"
    assert refused(make, "sft", rows) == words
    assert refused(make, "sft", rows, latent=False) == words
    with pytest.raises(DataError, match="row 2 holds the end marker"):
        chain_examples(tokenizer, rows, EncodeConfig(), PromptFormat())


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({"train": ROWS}, "train_dataset is a mapping with the keys 'train'; give one split of it"),
        (iter(ROWS), "train_dataset is a list_iterator; give a list of rows"),
        ("rows.jsonl", "train_dataset is a str; give a list of rows"),
        (None, "train_dataset is a NoneType; give a list of rows"),
        ([], "train_dataset is empty"),
    ],
)
def test_data_that_is_no_list_of_rows_is_refused(rows, words, model, tokenizer, tmp_path):
    with pytest.raises(DataError, match=words):
        LatentGRPOTrainer(model, None, LatentGRPOConfig(output_dir=str(tmp_path), **SMALL), rows, None, tokenizer)
    with pytest.raises(DataError, match=words):
        LatentSFTTrainer(model, LatentSFTConfig(output_dir=str(tmp_path)), rows, tokenizer)


def test_a_model_is_a_path_too_and_what_is_none_is_refused(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "model")
    args = LatentGRPOConfig(output_dir=str(tmp_path / "run"), **SMALL)
    assert LatentGRPOTrainer(tmp_path / "model", None, args, ROWS, None, tokenizer).rows == ROWS
    with pytest.raises(ModelError, match="NoneType is no model of transformers"):
        LatentGRPOTrainer(None, None, args, ROWS, None, tokenizer)
