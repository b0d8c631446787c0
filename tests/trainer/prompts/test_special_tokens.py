"""What a tokenizer adds to a text by itself: a prompt begins with it once, and never ends in it."""

from __future__ import annotations

import os

import pytest
from support.chat_tokenizers import chat_tokenizer, with_affixes, word_tokenizer

from latent_grpo.config import EncodeConfig, LatentSFTConfig
from latent_grpo.model import end_marker_ids, load_tokenizer
from latent_grpo.prompts import PromptFormat, leading_ids
from latent_grpo.sft import build_example
from latent_grpo.sft.pieces import chain_example

KINDS = pytest.mark.parametrize("kind", ["bytes", "metaspace"])
TEMPLATES = {
    "$A": [],
    "<s> $A": ["<s>"],
    "<s> $A </s>": ["<s>"],
    "$A </s>": [],
    "<s> <unk> $A </s> <pad>": ["<s>", "<unk>"],
}
EVERY_TEMPLATE = pytest.mark.parametrize(("template", "start"), TEMPLATES.items(), ids=list(TEMPLATES))
BARE = PromptFormat(chat_template=False)


def make(kind: str, template: str):
    return with_affixes(word_tokenizer(kind, words=("1 + ",)), template)


def plain(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@KINDS
@EVERY_TEMPLATE
def test_a_bare_prompt_begins_with_what_the_tokenizer_adds_and_does_not_end_in_it(template, start, kind):
    tokenizer = make(kind, template)
    first = tokenizer.convert_tokens_to_ids(start)
    assert leading_ids(tokenizer) == first
    prompts = ["1 + 1?", "a", "<unk>?"]
    assert BARE.ids(tokenizer, prompts) == [first + plain(tokenizer, text) for text in prompts]
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 1?"}]
    assert BARE.ids(tokenizer, [messages]) == [first + plain(tokenizer, "Add.\n1 + 1?")]


@KINDS
def test_a_start_that_the_prompt_has_already_is_not_doubled(kind):
    tokenizer = make(kind, "<s> $A </s>")
    assert BARE.ids(tokenizer, ["<s>1 + 1?"]) == [plain(tokenizer, "<s>1 + 1?")]
    assert plain(tokenizer, "<s>1 + 1?")[0] == tokenizer.bos_token_id


@KINDS
@EVERY_TEMPLATE
def test_a_template_writes_its_special_tokens_itself(template, start, kind):
    tokenizer = make(kind, template)
    around = PromptFormat(chat_template=False, prompt_template="<s>Q: {prompt}")
    assert around.ids(tokenizer, ["1 + 1?"]) == [plain(tokenizer, "<s>Q: 1 + 1?")]
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert PromptFormat().ids(tokenizer, ["1 + 1?"]) == [plain(tokenizer, "<s>1 + 1?")]


@pytest.mark.parametrize("name", ["qwen", "llama"])
def test_a_chat_template_ends_in_its_generation_prompt(name):
    tokenizer = chat_tokenizer(name)
    expected = PromptFormat().ids(tokenizer, ["1 + 1?"])
    with_affixes(tokenizer, f"{tokenizer.bos_token} $A {tokenizer.eos_token}")
    assert PromptFormat().ids(tokenizer, ["1 + 1?"]) == expected
    assert expected[0].count(tokenizer.bos_token_id) == PromptFormat().render(tokenizer, "1 + 1?").count(
        tokenizer.bos_token
    )


@KINDS
def test_examples_of_the_warm_start_hold_the_end_of_the_sequence_once(kind):
    tokenizer = make(kind, "<s> $A </s>")
    row = {"prompt": "1 + 1?", "chain": "1 + 1 = 2", "answer": "2"}
    marker = end_marker_ids(tokenizer, "</think>")
    example = build_example(tokenizer, row, LatentSFTConfig(answer_template="{answer}"), BARE, marker, 1)
    pieces = chain_example(tokenizer, row, 1, EncodeConfig(answer_template="{answer}"), BARE, marker)
    prompt = [tokenizer.bos_token_id, *plain(tokenizer, "1 + 1?")]
    text = [*marker, *plain(tokenizer, "2"), tokenizer.eos_token_id]
    assert example.prompt == pieces.prompt == prompt
    assert [token for element in example.response for token in element] == [*plain(tokenizer, row["chain"]), *text]
    assert [token for piece in pieces.pieces for token in piece] + pieces.text == [
        *plain(tokenizer, row["chain"]),
        *text,
    ]


@pytest.mark.skipif("LATENT_GRPO_REAL_MODEL" not in os.environ, reason="LATENT_GRPO_REAL_MODEL names no model folder")
def test_a_real_tokenizer_that_adds_an_end():
    tokenizer = load_tokenizer(os.environ["LATENT_GRPO_REAL_MODEL"])
    expected = [BARE.ids(tokenizer, ["1 + 1?"]), PromptFormat().ids(tokenizer, ["1 + 1?"])]
    with_affixes(tokenizer, "<|im_start|> $A <|im_end|>")
    assert BARE.ids(tokenizer, ["1 + 1?"]) == [[tokenizer.bos_token_id, *expected[0][0]]]
    assert PromptFormat().ids(tokenizer, ["1 + 1?"]) == expected[1]
