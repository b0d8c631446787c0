"""Prompt formats: each option alone, what overrides what, what is saved, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.chat_tokenizers import chat_tokenizer

from latent_grpo.config import LatentGRPOConfig, LatentSFTConfig, PromptOptions
from latent_grpo.errors import ConfigError, DataError, ModelError
from latent_grpo.prompts import FORMAT_FILE, FORMATS, PromptFormat, read_format, resolve_format, write_format

QUESTION = "1 + 1?"
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": QUESTION}


def bare():
    """Return a tokenizer without a chat template."""
    tokenizer = chat_tokenizer("qwen")
    tokenizer.chat_template = None
    return tokenizer


@pytest.mark.parametrize(
    ("options", "prompt", "text"),
    [
        ({}, QUESTION, "1 + 1?"),
        ({}, [SYSTEM, USER], "Be brief.\n1 + 1?"),
        (dict(instruction="Think."), QUESTION, "Think.\n1 + 1?"),
        (dict(instruction="Think.", instruction_role="system"), QUESTION, "Think.\n1 + 1?"),
        (dict(instruction="Think."), [SYSTEM, USER], "Be brief.\nThink.\n1 + 1?"),
        (dict(instruction="Think.", instruction_role="system"), [SYSTEM, USER], "Think.\nBe brief.\n1 + 1?"),
        (dict(instruction="brief"), [SYSTEM, USER], "Be brief.\n1 + 1?"),
        (dict(prompt_suffix=" Go."), QUESTION, "1 + 1? Go."),
        (dict(prompt_suffix="1?"), QUESTION, "1 + 1?"),
        (dict(opening_marker="<think>"), QUESTION, "1 + 1?<think>"),
        (dict(opening_marker="?"), f"{QUESTION} \n", "1 + 1? \n"),
        (dict(opening_marker="?\n"), f"{QUESTION}\n", "1 + 1?\n"),
        (dict(opening_marker="<think>\n"), QUESTION, "1 + 1?<think>\n"),
        (dict(opening_marker="\n"), QUESTION, "1 + 1?\n"),
        (dict(chat_template=False, prompt_template="Q: {prompt} {{A}}:"), QUESTION, "Q: 1 + 1? {A}:"),
    ],
    ids=str,
)
def test_a_prompt_without_a_chat_template(options, prompt, text):
    assert PromptFormat(**options).render(bare(), prompt) == text


def test_the_chat_template_is_used_if_there_is_one_unless_it_is_switched_off():
    tokenizer, messages = chat_tokenizer("qwen"), [SYSTEM, USER]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert PromptFormat().render(tokenizer, messages) == expected
    assert PromptFormat(chat_template=True).render(tokenizer, messages) == expected
    assert PromptFormat(chat_template=False).render(tokenizer, messages) == "Be brief.\n1 + 1?"
    with pytest.raises(ModelError, match="no chat template"):
        PromptFormat(chat_template=True).render(bare(), QUESTION)


def test_arguments_of_the_chat_template_reach_it():
    tokenizer = chat_tokenizer("qwen")
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if not enable_thinking %}<no>{% endif %}"
    assert PromptFormat(chat_template_kwargs={"enable_thinking": True}).render(tokenizer, "a") == "a"
    assert PromptFormat(chat_template_kwargs={"enable_thinking": False}).render(tokenizer, "a") == "a<no>"


def test_a_template_that_refuses_the_messages_is_one_line():
    tokenizer = chat_tokenizer("qwen")
    tokenizer.chat_template = "{{ raise_exception('no system\nplease') }}"
    with pytest.raises(ModelError, match=r"refuses the prompt '1 \+ 1\?': no system; choose another instruction_role"):
        PromptFormat().render(tokenizer, QUESTION)
    with pytest.raises(DataError, match="has no user message"):
        FORMATS["latent-grpo-low"].render(tokenizer, [SYSTEM])


@given(st.text(max_size=20), st.sampled_from(["user", "system"]), st.text(max_size=5), st.text(min_size=1, max_size=20))
def test_instruction_and_suffix_are_there_once_however_often_they_are_applied(instruction, role, suffix, question):
    prompt_format = PromptFormat(instruction, role, suffix)
    once = prompt_format.messages(question)
    assert prompt_format.messages(once) == once
    assert question in once[-1]["content"]
    assert once[-1]["content"].endswith(suffix)
    assert any(instruction in message["content"] for message in once)


def test_options_override_the_name_which_overrides_the_model_which_overrides_the_defaults(tmp_path):
    saved = PromptFormat("Saved.", "system", "!", "<go>", "</go>", chat_template=True)
    write_format(tmp_path, saved)
    folder = str(tmp_path)
    assert resolve_format(PromptOptions()) == PromptFormat()
    assert resolve_format(PromptOptions(), folder) == saved
    low = FORMATS["latent-grpo-low"]
    # The end marker is the model's own: the released formats do not name another.
    assert resolve_format(PromptOptions(prompt_format="latent-grpo-low"), folder) == replace(low, end_marker="</go>")
    options = PromptOptions(prompt_format="latent-grpo-low", instruction="", end_marker="</x>", opening_marker="")
    assert resolve_format(options, folder) == replace(low, instruction="", end_marker="</x>", opening_marker="")
    off = PromptOptions(chat_template=False, prompt_template="{prompt}", prompt_suffix="?")
    resolved = replace(saved, chat_template=False, prompt_template="{prompt}", prompt_suffix="?")
    assert resolve_format(off, folder) == resolved


@pytest.mark.parametrize("name", FORMATS)
def test_a_saved_format_is_read_back_whole(name, tmp_path):
    write_format(tmp_path, FORMATS[name])
    assert read_format(str(tmp_path)) == FORMATS[name]
    assert json.loads((tmp_path / FORMAT_FILE).read_text())["end_marker"] == "</think>"


DAMAGED = [
    *("{", "[]", '{"colour": 1}', '{"prompt_template": "x", "chat_template": false}', '{"instruction": 3}'),
    *('{"end_marker": null}', '{"instruction_role": "boss"}', '{"chat_template_kwargs": "x"}', '{"chat_template": 1}'),
    '{"prompt_template": 1, "chat_template": false}',
]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_format_is_one_line(text, tmp_path):
    (tmp_path / FORMAT_FILE).write_text(text)
    with pytest.raises(ConfigError, match=r"prompt_format\.json' is no prompt format .*correct or remove it") as info:
        read_format(str(tmp_path))
    assert "\n" not in str(info.value)


def test_the_named_formats_are_the_choices_of_the_option():
    kind = get_type_hints(PromptOptions)["prompt_format"]
    assert [name for part in get_args(kind) for name in get_args(part)] == list(FORMATS)


@pytest.mark.parametrize("config", [LatentGRPOConfig, LatentSFTConfig])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(prompt_format="low"), "prompt_format is 'low': choose from latent-grpo-low, "),
        (dict(instruction_role="assistant"), "instruction_role is 'assistant': choose from user, system"),
        (dict(chat_template_kwargs="x"), "chat_template_kwargs is 'x': give a mapping"),
    ],
    ids=str,
)
def test_a_wrong_option_is_one_line(config, options, message):
    with pytest.raises(ConfigError) as info:
        config(**options)
    assert str(info.value).startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(prompt_template="{prompt}"), "it needs --chat_template false"),
        (dict(prompt_template="Q:", chat_template=False), "holds {prompt}"),
        (dict(prompt_template="{prompt} {x}", chat_template=False), "no other field"),
        (dict(prompt_template="{prompt} {", chat_template=False), "a Python format"),
        (dict(chat_template_kwargs={"a": 1}, chat_template=False), "give {} with --chat_template false"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ConfigError) as info:
        resolve_format(PromptOptions(**options))
    assert message in str(info.value)
