"""Reward models: what they read, where they come from, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from latent_grpo.errors import ConfigError
from latent_grpo.quickstart.toy_task import make_tokenizer
from latent_grpo.rewards.resolve import resolve_reward, resolve_rewards
from latent_grpo.rewards.scoring import reward_names, score

PROMPTS = ["Mia has 2 coins .", "Tom has 3 apples ."]
COMPLETIONS = ["2 3", "4"]


def config_of(tokenizer: Any, **options: Any) -> LlamaConfig:
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    return LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """A reward model with its tokenizer."""
    path, tokenizer = tmp_path_factory.mktemp("judges") / "my-judge", make_tokenizer()
    torch.manual_seed(0)
    LlamaForSequenceClassification(config_of(tokenizer, num_labels=1)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@torch.no_grad()
def expected(folder: Path, texts: list[str]) -> list[float]:
    """Return the logit at the last token of each text, one text at a time."""
    model, tokenizer = LlamaForSequenceClassification.from_pretrained(folder).float(), make_tokenizer()
    return [
        float(model.score(model.model(**tokenizer(text, return_tensors="pt", add_special_tokens=False))[0])[0, -1, 0])
        for text in texts
    ]


def test_a_folder_and_an_object_give_the_logits_of_single_texts(folder: Path) -> None:
    texts = [prompt + completion for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)]
    model = LlamaForSequenceClassification.from_pretrained(folder)
    for judge in (resolve_reward(str(folder)), resolve_reward(model), resolve_reward(model, make_tokenizer())):
        scores = score([judge], None, PROMPTS, COMPLETIONS, {"completion_ids": [[1], [2]], "answer": ["3", "4"]})
        assert scores.total == pytest.approx(expected(folder, texts), abs=1e-5)
        assert reward_names([judge]) == ["my-judge"]


def test_a_model_reads_the_visible_text(folder: Path) -> None:
    judge = resolve_reward(str(folder))
    whole = ["<think>5 6</think>2 3", "<think>7</think>4"]
    assert judge(prompts=PROMPTS, completions=whole, visible_text=COMPLETIONS) == pytest.approx(
        judge(prompts=PROMPTS, completions=COMPLETIONS)
    )


def test_a_chat_is_read_in_the_models_own_template(folder: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} . {% endfor %}"
    judge = resolve_reward(LlamaForSequenceClassification.from_pretrained(folder), tokenizer)
    chat = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    replies = [[{"role": "assistant", "content": text}] for text in COMPLETIONS]
    texts = [f"{prompt} . {text} . " for prompt, text in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert judge(prompts=chat, completions=replies) == pytest.approx(expected(folder, texts), abs=1e-5)


def test_what_is_no_reward_model_is_refused(folder: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    LlamaForCausalLM(config_of(tokenizer)).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    with pytest.raises(ConfigError, match=r"lm' is no reward model: its weights lack 'score.weight'"):
        resolve_rewards(str(tmp_path / "lm"), None)
    two = LlamaForSequenceClassification(config_of(tokenizer, num_labels=2))
    with pytest.raises(ConfigError, match="has 2 labels; give a sequence classifier with num_labels=1"):
        resolve_rewards(two, None)
    one = LlamaForSequenceClassification(config_of(tokenizer, num_labels=1))
    with pytest.raises(ConfigError, match=r"no tokenizer beside it .*; give reward_processing_classes"):
        resolve_rewards(one, None)
    with pytest.raises(ConfigError, match="reward_processing_classes is 'a list of 1': give one for each of the 2"):
        resolve_rewards([one, "accuracy"], None, [tokenizer])
    with pytest.raises(ConfigError, match="reward 'no-owner/no-model': cannot load a reward model"):
        resolve_rewards("no-owner/no-model", None)


def test_only_safetensors_are_read_and_no_code_runs(folder: Path, tmp_path: Path) -> None:
    pickled, coded = tmp_path / "pickled", tmp_path / "coded"
    for copy in (pickled, coded):
        copy.mkdir()
        for file in folder.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="cannot load a reward model"):
        resolve_rewards(str(pickled), None)
    config = json.loads((coded / "config.json").read_text("utf-8"))
    config |= {
        "model_type": "own",
        "auto_map": {"AutoModelForSequenceClassification": "own.Own", "AutoConfig": "own.C"},
    }
    (coded / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (coded / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot load a reward model"):
        resolve_rewards(str(coded), None)
    assert not (tmp_path / "ran").exists()
