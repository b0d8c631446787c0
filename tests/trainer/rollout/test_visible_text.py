"""The visible text of a response: what ends it, and what special tokens and the end marker leave of it."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.chat_tokenizers import chat_tokenizer, word_tokenizer

from latent_grpo.errors import ModelError
from latent_grpo.model import check_vocabulary, end_marker_ids, eos_ids, load_tokenizer
from latent_grpo.prompts import PromptFormat
from latent_grpo.quickstart.toy_task import make_model, make_tokenizer
from latent_grpo.rewards.functions import exact_match_reward
from latent_grpo.rollout.trajectory import Rollout, marker_span, visible_text

MARKER = "</think>"
WORDS = ("</", "think", ">\n", " Answer:", "Answer:", " 42")
KINDS = pytest.mark.parametrize("kind", ["bytes", "metaspace"])


def response(ids: list[int], latents: int = 2, finished: bool = True) -> Rollout:
    """Return a rollout of one response: latent steps, whose highest token is 5, then `ids`."""
    token = torch.tensor([[5] * latents + ids])
    steps = token.shape[1]
    return Rollout(
        prompt_ids=token[:, :1],
        prompt_mask=torch.ones(1, 1).long(),
        prompt_index=torch.zeros(1).long(),
        token=token,
        ids=token.unsqueeze(-1).expand(1, steps, 2),
        scores=torch.zeros(1, steps, 2),
        is_latent=(torch.arange(steps) < latents).unsqueeze(0),
        mask=torch.ones(1, steps).bool(),
        logprob=torch.zeros(1, steps),
        finished=torch.tensor([finished]),
        tau=1.0,
    )


def text_of(tokenizer, ids: list[int], marker: str = MARKER, **options) -> str:
    (text,) = visible_text(tokenizer, response(ids, **options), marker)
    return text


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def make(kind: str, **options):
    return word_tokenizer(kind, words=WORDS, added=("<keep>", "<stop>"), special=("<end>", "<hide>"), **options)


@KINDS
@pytest.mark.parametrize("end", ["</s>", "<hide>", "<pad>", "<stop>", "2"])
@pytest.mark.parametrize("text", ["42", "#### 42", "x+1", "\\boxed{42}", "B"])
def test_whatever_token_ends_a_response_leaves_its_text(kind, end, text):
    tokenizer = make(kind)
    (last,) = encode(tokenizer, end)[-1:]
    ids = [*end_marker_ids(tokenizer, MARKER), *encode(tokenizer, text)]
    seen = text_of(tokenizer, [*ids, last])
    assert seen == text
    assert exact_match_reward([seen], [text]) == [1.0]
    assert text_of(tokenizer, ids, finished=False) == text


def test_padding_that_is_the_end_of_a_sequence_leaves_the_text_too():
    tokenizer = chat_tokenizer("llama")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    ids = [*end_marker_ids(tokenizer, MARKER), *encode(tokenizer, "42"), tokenizer.eos_token_id]
    assert text_of(tokenizer, ids) == "42"


@KINDS
def test_special_tokens_leave_the_text_and_added_ones_stay(kind):
    tokenizer = make(kind)
    ids = [*end_marker_ids(tokenizer, MARKER), *encode(tokenizer, "a<keep>b<hide>c")]
    seen = text_of(tokenizer, ids, finished=False)
    assert seen.replace(" ", "") == "a<keep>bc"
    assert seen == tokenizer.decode(ids[len(end_marker_ids(tokenizer, MARKER)) :], skip_special_tokens=True).strip()


MARKERS = [MARKER, "<keep>", "<end>", "<end>go", "Answer:", " Answer:", "Answer: ", "The answer is:", "\n\n", "#"]


@KINDS
@pytest.mark.parametrize("latents", [0, 3])
@pytest.mark.parametrize("marker", MARKERS)
def test_any_end_marker_leaves_the_text_with_latent_steps_or_without(marker, latents, kind):
    tokenizer = make(kind)
    ids = end_marker_ids(tokenizer, marker)
    assert text_of(tokenizer, [*ids, *encode(tokenizer, "x = 42"), 1], marker, latents=latents) == "x = 42"


@KINDS
@pytest.mark.parametrize(
    ("marker", "text", "visible"),
    [
        (MARKER, "</think>\n\n42", "42"),  # one token holds the last letter of the marker and a line break
        (MARKER, "</think>\n42 </think>\n43", "42 </think>\n43"),
        ("Answer: ", "Answer: 42", "42"),
        ("Answer: ", "Answer:\n42", "42"),
        (" Answer:", "Answer: 42", "42"),
    ],
    ids=str,
)
@pytest.mark.parametrize("latents", [0, 2])
def test_a_marker_that_is_spelled_with_other_tokens_leaves_the_text(marker, text, visible, latents, kind):
    tokenizer = make(kind)
    ids = encode(tokenizer, text)
    assert text_of(tokenizer, ids, marker, latents=latents, finished=False) == visible


@KINDS
def test_only_the_first_marker_leaves_the_text(kind):
    tokenizer = make(kind)
    marker = end_marker_ids(tokenizer, MARKER)
    answer = encode(tokenizer, "see </think> 42")
    assert text_of(tokenizer, [*marker, *answer, 1]) == "see </think> 42"


@KINDS
def test_a_marker_that_is_never_whole_stays(kind):
    tokenizer = make(kind)
    ids = encode(tokenizer, "</42")
    assert text_of(tokenizer, ids, finished=False) == "</42"
    assert marker_span(tokenizer, ids, MARKER, encode(tokenizer, MARKER)) is None


@KINDS
@pytest.mark.parametrize("marker", [MARKER, "<keep>", "<end>"])
def test_a_text_response_keeps_its_chain_and_the_marker_that_tells_it_from_the_answer(marker, kind):
    tokenizer = make(kind)
    ids = [*encode(tokenizer, "1+2=3"), *encode(tokenizer, marker), *encode(tokenizer, "3<hide>"), 1]
    seen = text_of(tokenizer, ids, marker, latents=0)
    assert seen.replace(" ", "") == f"1+2=3{marker}3"


@KINDS
@given(answer=st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=12))
def test_every_answer_is_read_back(kind, answer):
    tokenizer = make(kind)
    ids = encode(tokenizer, answer)
    whole = [*end_marker_ids(tokenizer, MARKER), *ids, tokenizer.eos_token_id]
    assert text_of(tokenizer, whole) == tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_every_end_of_a_response_is_found_in_configurations_and_tokenizer():
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed=0)
    model.generation_config.eos_token_id = [7, 8]
    model.config.eos_token_id = [9, 10**6]  # an id beyond the table cannot be emitted
    model.config.text_config = {"eos_token_id": 11}
    assert eos_ids(model) == (7, 8, 9, 11)
    assert eos_ids(model, tokenizer) == tuple(sorted({7, 8, 9, 11, tokenizer.eos_token_id}))
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    model.config.text_config = None
    assert eos_ids(model) == ()


def test_an_end_marker_that_would_end_the_response_is_refused():
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed=0)
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids("now")]
    with pytest.raises(ModelError, match="the end marker 'now' holds 'now', which ends a response; choose another"):
        check_vocabulary(model, tokenizer, PromptFormat(end_marker="now"), True)
    with pytest.raises(ModelError, match="holds the end-of-sequence token"):
        check_vocabulary(model, tokenizer, PromptFormat(end_marker="now <eos>"), True)
    check_vocabulary(model, tokenizer, PromptFormat(end_marker="now"), False)


@pytest.mark.skipif("LATENT_GRPO_REAL_MODEL" not in os.environ, reason="LATENT_GRPO_REAL_MODEL names no model folder")
@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])
@pytest.mark.parametrize("text", ["#### 42", "B", "Paris", "x+1", "\\boxed{42}", "\n\n42", " <b>"])
def test_a_real_tokenizer(text, end):
    tokenizer = load_tokenizer(os.environ["LATENT_GRPO_REAL_MODEL"])
    (last,) = encode(tokenizer, end)
    for ids in ([*encode(tokenizer, MARKER), *encode(tokenizer, text)], encode(tokenizer, MARKER + text)):
        assert text_of(tokenizer, [*ids, last]) == text.strip()
