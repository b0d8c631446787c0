"""What a model must do to be used, and the one line that says why it is not."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from support.models import tiny
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaForCausalLM

from latent_grpo import LatentSampling, LatentSFTConfig, LatentSFTTrainer, generate_latent
from latent_grpo.errors import ModelError
from latent_grpo.model import check_compatible, load_model


def altered(**methods: Any) -> Any:
    """Return a tiny Llama whose class has other methods."""
    model = tiny("llama")
    model.__class__ = type("Altered", (LlamaForCausalLM,), methods)
    return model


def refusal(model: Any) -> str:
    """Return the line with which a model is refused."""
    with pytest.raises(ModelError) as caught:
        check_compatible(model)
    (line,) = str(caught.value).splitlines()
    return line


def with_logits(change: Any) -> Any:
    """Return a tiny Llama that changes its logits."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = LlamaForCausalLM.forward(self, *args, **kwargs)
        out.logits = change(out.logits)
        return out

    return altered(forward=forward)


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits + 0.01 * torch.randn_like(logits),
        lambda logits: logits.sin(),
        lambda logits: logits - logits[..., :1].relu(),
    ],
    ids=["noise", "sine", "relu"],
)
def test_logits_that_are_neither_scaled_nor_capped_are_refused(change: Any) -> None:
    assert re.search(r"Altered cannot be used: behind (its LM|the) head", refusal(with_logits(change)))


def test_a_token_that_is_ruled_out_is_refused() -> None:
    mask = torch.zeros(48).index_fill(0, torch.tensor([7]), -torch.inf)
    assert "behind the head it treats tokens differently" in refusal(with_logits(lambda logits: logits + mask))


def test_a_head_of_another_input_is_refused_with_the_distance() -> None:
    model = tiny("llama")
    model.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0].relu(),))
    assert re.search(r"between its body and its LM head .* by up to [\d.]+ nats", refusal(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ids_that_reach_the_layers_beside_their_embeddings_are_refused(dtype: torch.dtype) -> None:
    """As in Gemma 3n, whose layers have embeddings of their own."""
    model = tiny("llama", dtype=dtype)
    own = torch.nn.Embedding(48, 32, dtype=dtype)
    kept: list[Tensor | None] = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: kept.append(kwargs.get("input_ids", args[0] if args else None)), with_kwargs=True
    )
    model.model.layers[0].register_forward_hook(lambda _, args, out: out if kept[-1] is None else out + own(kept[-1]))
    assert re.search(r"makes more of token ids than of their embeddings, by up to [\d.]+ nats", refusal(model))


def test_an_embedding_that_is_no_multiple_of_its_row_is_refused() -> None:
    model = tiny("llama")
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: out + 1.0)
    assert "embedding module feeds something else" in refusal(model)


def test_an_adapter_on_the_head_is_refused() -> None:
    model = tiny("llama", dtype=torch.bfloat16)
    adapter = torch.nn.Linear(32, 48, dtype=torch.bfloat16)
    model.lm_head.register_forward_hook(lambda module, args, out: out + 5 * adapter(args[0]))
    assert re.search(r"its LM head is more than a product, by up to [\d.]+ nats", refusal(model))


def test_a_row_that_depends_on_its_padding_is_refused() -> None:
    model = tiny("llama")
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "attention_mask": None}), with_kwargs=True
    )
    assert re.search(r"a row that is padded and cached differs from the row alone by up to [\d.]+ nats", refusal(model))


def test_weights_that_are_not_finite_are_refused() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    assert "not finite" in refusal(model)


def test_what_is_no_causal_model_with_weights_is_refused() -> None:
    config = tiny("llama").config
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    assert "meta device" in refusal(empty)
    assert "has no LM head" in refusal(AutoModel.from_config(config))
    assert "no model of transformers" in refusal(torch.nn.Linear(2, 2))
    t5 = dict(vocab_size=48, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    assert "encoder and a decoder" in refusal(AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **t5)))


def test_a_folder_without_the_weights_of_its_head_is_refused(tmp_path: Any) -> None:
    model = tiny("llama", tie_word_embeddings=False)
    kept = {name: value for name, value in model.state_dict().items() if "lm_head" not in name}
    model.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(ModelError, match=r"lack 1 weights of the model, such as 'lm_head\.weight'"):
        load_model(str(tmp_path))


def test_a_peft_model_is_refused() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    assert "merge_and_unload" in refusal(model)


@pytest.mark.parametrize(("target", "part"), [("lm_head", "LM head"), ("embed_tokens", "embedding")])
def test_a_new_adapter_on_a_table_is_refused(target: str, part: str) -> None:
    peft = pytest.importorskip("peft")
    model = tiny("llama", tie_word_embeddings=False)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=[target]), model)
    assert f"adapter on its {part}" in refusal(model)


def test_every_way_in_refuses_an_object(tokenizer: Any, tmp_path: Any) -> None:
    from support.trainers import ROWS, grpo

    model = with_logits(lambda logits: logits.sin())
    ids = torch.tensor([[5, 6]])
    with pytest.raises(ModelError, match="cannot be used"):
        generate_latent(model, ids, torch.ones_like(ids), LatentSampling(latent=False, max_new_tokens=2))
    with pytest.raises(ModelError, match="cannot be used"):
        grpo(tmp_path, tokenizer, model=model)
    with pytest.raises(ModelError, match="cannot be used"):
        LatentSFTTrainer(model, LatentSFTConfig(output_dir=str(tmp_path)), ROWS, tokenizer)


def test_the_proof_leaves_a_model_as_it_is_and_runs_once() -> None:
    model = tiny("gemma2").train()
    model.model.layers[0].eval()
    modes, state, config = [m.training for m in model.modules()], torch.get_rng_state(), model.config.to_dict()
    calls: list[Any] = []
    model.register_forward_pre_hook(lambda *_: calls.append(None))
    check_compatible(model)
    made = len(calls)
    check_compatible(model)
    assert 0 < len(calls) == made <= 4
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config.to_dict() == config
    assert not model.get_output_embeddings()._forward_hooks
    assert all(p.grad is None for p in model.parameters())
