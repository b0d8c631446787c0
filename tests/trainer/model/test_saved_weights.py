"""What is trained is what a saved folder gives back: a weight that would be lost is refused before the first step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import ARCHITECTURES, tiny
from support.trainers import ROWS, even, grpo

from latent_grpo import LatentSFTConfig, LatentSFTTrainer
from latent_grpo.errors import ModelError
from latent_grpo.model import load_model
from latent_grpo.saving.model_files import check_saved_weights


def biased_head(vocab: int = 48) -> Any:
    return tiny("llama_bias", vocab)


def biased_layer(vocab: int = 48) -> Any:
    model = tiny("llama", vocab)
    model.model.layers[0].self_attn.q_proj.bias = torch.nn.Parameter(torch.randn(32))
    return model


def untied_head(vocab: int = 48) -> Any:
    model = tiny("llama", vocab)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    return model


def tied_head(vocab: int = 48) -> Any:
    model = tiny("llama", vocab, tie_word_embeddings=False)
    model.lm_head.weight = model.get_input_embeddings().weight
    return model


CHANGED = {
    "lm_head.bias": biased_head,
    "model.layers.0.self_attn.q_proj.bias": biased_layer,
    "lm_head.weight": untied_head,
    "lm_head.weight ": tied_head,
}


@pytest.mark.parametrize(("name", "make"), CHANGED.items())
@pytest.mark.parametrize("adapters", [False, True])
def test_both_trainers_refuse_a_model_that_cannot_be_saved_whole(
    name: str, make: Callable[[int], Any], adapters: bool, tokenizer: Any, tmp_path: Path
) -> None:
    match = f"cannot be saved whole.* '{name.strip()}'.*tie_word_embeddings"
    model = make(len(tokenizer))
    with pytest.raises(ModelError, match=match):
        grpo(tmp_path, tokenizer, even, model, use_peft=adapters, rows=ROWS[:8])
    with pytest.raises(ModelError, match=match):
        LatentSFTTrainer(model, LatentSFTConfig(output_dir=str(tmp_path), use_peft=adapters), ROWS[:8], tokenizer)


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES.keys() - {"llama_bias"}))
@pytest.mark.parametrize("tied", [False, True])
def test_models_that_are_what_their_configuration_says_can_be_saved(kind: str, tied: bool) -> None:
    check_saved_weights(tiny(kind, tie_word_embeddings=tied))


def test_adapters_are_no_weights_of_their_own() -> None:
    peft = pytest.importorskip("peft")
    model = tiny("llama")
    config = peft.LoraConfig(target_modules=["q_proj"])
    peft.inject_adapter_in_model(config, model, "default")
    model.peft_config = {"default": config}
    check_saved_weights(model)


@pytest.mark.parametrize("make", [biased_head, biased_layer])
def test_a_folder_with_a_weight_that_its_class_leaves_out_is_refused(make: Callable[[], Any], tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"hold '.*\.bias', which LlamaForCausalLM would leave out of its layer"):
        load_model(str(tmp_path))
