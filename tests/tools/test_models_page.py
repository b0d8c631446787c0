"""The page of model types: every model either agrees with itself, or is refused in one line; and the page says so."""

from __future__ import annotations

import re

import pytest
import transformers
from support import REPOSITORY
from support.documents import script
from transformers import CONFIG_MAPPING

PAGE = REPOSITORY / "docs" / "models.md"
# A model of each kind of part: heads, embeddings, windows, caches, positions, and each kind of refusal.
SOME = (
    "llama",
    "llama, with a sliding_window",
    "llama4_text, chunks",
    "mistral",
    "qwen2, window in some layers",
    "gemma2",
    "gemma3_text",
    "cohere2",
    "granite",
    "phi",
    "gpt2",
    "gpt_oss",
    "mpt",
    "deepseek_v3",
    "bloom",
    "jamba",
    "bert",
)


def kinds(text):
    """Return what the page says of each model: "works", or the words of the refusal without numbers."""
    rows = re.findall(r"^\| ([\w-][^|]*?) \| (.*) \|$", text, re.MULTILINE)
    table = {name: rest for name, rest in rows if name not in ("model type", "---")}
    return {name: "works" if "e-" in rest else re.sub(r"[\d.]+", "#", rest) for name, rest in table.items()}


def check(name, found, bound):
    """Check an outcome, and that the page agrees with it."""
    assert (found.refusal is None) == (kinds(PAGE.read_text())[name] == "works"), name
    if found.refusal is None:
        assert max(found.replayed, found.alone) <= bound, name
    else:
        assert "\n" not in found.refusal, name


@pytest.mark.parametrize("name", SOME)
def test_a_model_agrees_with_itself_or_is_refused(name):
    page = script("models")
    if page.MODELS[name][0] not in CONFIG_MAPPING:
        pytest.skip("this version of transformers lacks it")
    check(name, page.outcome(*page.MODELS[name]), page.BOUND)


@pytest.mark.slow
def test_the_page_is_what_its_command_writes(tmp_path):
    page = script("models")
    outcomes = page.tried()
    for name, found in outcomes.items():
        if found.refusal is None:
            assert max(found.replayed, found.alone) <= page.BOUND, name
        else:
            assert "\n" not in found.refusal, name
    if f"transformers {transformers.__version__};" in PAGE.read_text():
        assert kinds(page.page(outcomes)) == kinds(PAGE.read_text()), f"run `{page.COMMAND}`"
