"""Options that save memory: 16-bit parameters with float32 copies, 8-bit state, recomputed layers, LoRA."""

from __future__ import annotations

import copy
import json
import random
import sys
import types
from pathlib import Path

import pytest
import torch
from support import tolerances as tol
from support.trainers import gradients
from transformers import AutoModelForCausalLM

from latent_grpo import LatentGRPOConfig, LatentGRPOTrainer, LatentSFTConfig, LatentSFTTrainer
from latent_grpo.errors import ConfigError
from latent_grpo.model import body, embedding_table
from latent_grpo.quickstart.toy_task import make_model, make_problems, make_tokenizer
from latent_grpo.update.activation_checkpointing import recomputed
from latent_grpo.update.lora import has_adapters, merged_model, without_adapters
from latent_grpo.update.optimizer import Updater
from latent_grpo.update.replay import replay

ROWS = make_problems(16, seed=1)


def mixed_reward(completions, **columns):
    """Draw rewards from a stream that the trainer seeds and checkpoints keep."""
    return [random.random() for _ in completions]


def grpo(out: Path, dtype=torch.float32, **options) -> LatentGRPOTrainer:
    sampling = dict(latent_top_k=3, temperature=1.0, top_k=0, top_p=1.0)
    size = dict(num_generations=4, generation_batch_size=8, max_completion_length=6, max_steps=2)
    base = dict(
        output_dir=str(out),
        group_filter=False,
        save_steps=0,
        invalid="keep",
        learning_rate=1e-3,
        log_table=False,
        **sampling,
        **size,
    )
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed=0).to(dtype)
    return LatentGRPOTrainer(model, mixed_reward, LatentGRPOConfig(**{**base, **options}), ROWS, None, tokenizer)


def sft(out: Path, **options) -> LatentSFTTrainer:
    base = dict(
        output_dir=str(out),
        max_steps=2,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        answer_template="{answer}",
        log_table=False,
        save_steps=0,
    )
    tokenizer = make_tokenizer()
    args = LatentSFTConfig(**{**base, **options})
    return LatentSFTTrainer(make_model(tokenizer, seed=0), args, ROWS, tokenizer)


def metrics(out: Path) -> list[dict[str, float]]:
    """Return the metrics of a run, without times."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    times = ("time_", "step_time", "tokens_per_second")
    return [{k: v for k, v in row.items() if not k.startswith(times)} for row in rows]


def one_weight(value: float, dtype=torch.bfloat16) -> torch.nn.Module:
    """Return a model with a single parameter."""
    model = torch.nn.Linear(1, 1, bias=False, dtype=dtype)
    torch.nn.init.constant_(model.weight, value)
    return model


@pytest.mark.parametrize("masters", [True, False])
def test_updates_smaller_than_bfloat16_can_hold_add_up_in_float32_copies_only(masters):
    model = one_weight(1.0)
    args = LatentGRPOConfig(learning_rate=1e-4, master_weights=masters, max_grad_norm=0.0)
    updater = Updater(model, args, 200, freeze_embeddings=False)
    for _ in range(200):
        updater.backward(model.weight.sum())
        updater.step()
    assert model.weight.dtype == torch.bfloat16
    moved = 1.0 - float(model.weight.detach())
    assert moved == (pytest.approx(0.02, rel=0.2) if masters else 0.0)
    (state,) = updater.optimizer.state.values()
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == (torch.float32 if masters else torch.bfloat16)


def test_gradients_of_micro_batches_add_up_in_float32():
    model = one_weight(1.0)
    updater = Updater(model, LatentGRPOConfig(max_grad_norm=0.0), 1, freeze_embeddings=False)
    for scale in (256.0, 1.0):  # bfloat16 cannot hold their sum
        updater.backward(scale * model.weight.sum())
    assert updater.step() == 257.0
    assert model.weight.grad is None
    assert updater.masters[0].grad is None


def test_float32_parameters_have_no_copies():
    model = one_weight(1.0, torch.float32)
    updater = Updater(model, LatentGRPOConfig(), 1, freeze_embeddings=False)
    assert updater.masters[0] is model.weight


@pytest.mark.parametrize("options", [{}, {"use_peft": True}], ids=["float32 copies", "LoRA"])
def test_a_bfloat16_run_is_resumed_bit_for_bit(options, tmp_path):
    grpo(tmp_path / "whole", torch.bfloat16, max_steps=4, **options).train()
    grpo(tmp_path / "cut", torch.bfloat16, max_steps=2, save_steps=2, **options).train()
    grpo(tmp_path / "cut", torch.bfloat16, max_steps=4, **options).train(resume_from_checkpoint=True)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert all(row["grad_norm"] > 0 for row in metrics(tmp_path / "whole"))
    cut, whole = (tmp_path / name / "model.safetensors" for name in ("cut", "whole"))
    assert cut.read_bytes() == whole.read_bytes()


def fake_bitsandbytes(monkeypatch) -> list[dict]:
    """Install a bitsandbytes whose AdamW8bit is PyTorch's AdamW. Return the list of the options it is made with."""
    made = []

    class AdamW8bit(torch.optim.AdamW):
        def __init__(self, parameters, **options):
            made.append(options)
            super().__init__(parameters, **options)

    package, module = types.ModuleType("bitsandbytes"), types.ModuleType("bitsandbytes.optim")
    module.AdamW8bit = AdamW8bit
    package.optim = module
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    return made


def test_the_options_reach_the_8_bit_optimizer_of_the_library(monkeypatch, tmp_path):
    made = fake_bitsandbytes(monkeypatch)
    trainer = grpo(tmp_path / "run", optim="adamw_8bit", adam_beta1=0.8, adam_beta2=0.95, weight_decay=0.1, max_steps=1)
    assert made == [{"lr": 1e-3, "betas": (0.8, 0.95), "weight_decay": 0.1}]
    before = trainer.model.model.norm.weight.detach().clone()
    trainer.train()
    assert not torch.equal(trainer.model.model.norm.weight, before)


def test_8_bit_state_is_8_bits_and_resumes_bit_for_bit(tmp_path):
    pytest.importorskip("bitsandbytes")
    options = {"optim": "adamw_8bit"}
    whole = grpo(tmp_path / "whole", max_steps=4, **options)
    whole.train()
    dtypes = {state["state1"].dtype for state in whole.updater.optimizer.state.values()}
    assert torch.uint8 in dtypes
    grpo(tmp_path / "cut", max_steps=2, save_steps=2, **options).train()
    grpo(tmp_path / "cut", max_steps=4, **options).train(resume_from_checkpoint=True)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_the_default_optimizer_is_that_of_pytorch(tmp_path):
    assert type(grpo(tmp_path).updater.optimizer) is torch.optim.AdamW


@pytest.mark.parametrize(
    ("options", "module", "match"),
    [
        ({"optim": "adamw_8bit"}, "bitsandbytes.optim", r"optim is 'adamw_8bit': .*pip install bitsandbytes"),
        ({"use_peft": True}, "peft", r"use_peft is True: .*pip install peft"),
    ],
)
def test_a_library_that_is_not_installed_is_refused_with_the_command_to_install_it(
    options, module, match, monkeypatch, tmp_path
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=match):
        grpo(tmp_path, **options)


class LayerCalls:
    """Count the forward passes of the first decoder layer's attention."""

    def __init__(self, model) -> None:
        self.count = 0
        model.model.layers[0].self_attn.register_forward_hook(self.add)

    def add(self, *_args) -> None:
        self.count += 1


def saved_bytes(forward) -> int:
    """Return the bytes of the tensors, except parameters, that a forward pass keeps for its backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = forward()
    assert hidden.requires_grad
    return sum(kept.values())


def test_recomputed_layers_give_the_same_gradients_for_less_memory(tmp_path):
    trainer = grpo(tmp_path)
    rollout = trainer.collect()[0].rollout
    model, calls = trainer.model, LayerCalls(trainer.model)
    results = {}
    for enabled in (False, True):
        calls.count = 0
        with recomputed(model, enabled):
            hidden = replay(model, rollout)
        assert calls.count == 2  # the prompts, and the responses on top of their cache
        hidden.square().sum().backward()
        assert calls.count == (4 if enabled else 2)
        results[enabled] = (hidden.detach(), gradients(model))
        model.zero_grad()
    (hidden, gradient), (expected_hidden, expected_gradient) = results[True], results[False]
    assert torch.equal(hidden, expected_hidden)
    scale = float(expected_gradient.abs().max())
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=tol.REORDERED * scale)

    def forward(enabled):
        with recomputed(model, enabled):
            return replay(model, rollout)

    assert saved_bytes(lambda: forward(True)) < 0.2 * saved_bytes(lambda: forward(False))
    assert not any("forward" in vars(layer) for layer in model.model.layers)


def test_decoding_within_recomputed_layers_gives_the_same_hidden_states(tmp_path):
    trainer = grpo(tmp_path)
    model = trainer.model
    embeds = embedding_table(model)[torch.arange(5)].detach().unsqueeze(0)
    mask, positions = torch.ones(1, 5, dtype=torch.long), torch.arange(5).unsqueeze(0)
    with torch.no_grad():
        expected = body(model, embeds, mask, positions)
        with recomputed(model):
            assert torch.equal(body(model, embeds, mask, positions), expected)


@pytest.mark.parametrize("make", [grpo, sft], ids=["train", "sft"])
def test_gradient_checkpointing_trains_the_same_model_and_computes_layers_again(make, tmp_path):
    counts = {}
    for enabled in (False, True):
        trainer = make(tmp_path / str(enabled), gradient_checkpointing=enabled, max_steps=1)
        calls = LayerCalls(trainer.model)
        trainer.train()
        counts[enabled] = calls.count
    assert counts[True] > counts[False]
    for plain, again in zip(metrics(tmp_path / "False"), metrics(tmp_path / "True"), strict=True):
        assert again["loss"] == pytest.approx(plain["loss"], abs=tol.REORDERED)
        assert again["grad_norm"] == pytest.approx(plain["grad_norm"], rel=tol.REORDERED)


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def parameters(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("make", [grpo, sft], ids=["train", "sft"])
def test_lora_trains_only_adapters_and_saves_them_merged(make, peft, tmp_path):
    trainer = make(tmp_path / "run", use_peft=True, lora_r=4, lora_alpha=8, save_steps=1, save_total_limit=1)
    model = trainer.model
    assert model.model.layers[0].self_attn.q_proj.r["default"] == 4
    assert model.model.layers[0].self_attn.q_proj.scaling["default"] == 2.0
    before = parameters(model)
    trainer.train()
    changed = {name for name, p in parameters(model).items() if not torch.equal(p, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").exists()
    assert not (checkpoint / "model.safetensors").exists()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert not has_adapters(plain)
    assert parameters(plain).keys() == parameters(make_model(make_tokenizer(), seed=0)).keys()
    ids = torch.arange(6).unsqueeze(0)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=0, atol=tol.FLOAT32)
        with without_adapters(model):
            assert (plain(ids).logits - model(ids).logits).abs().max() > 10 * tol.FLOAT32


def test_adapters_are_resumed_bit_for_bit(peft, tmp_path):
    options = {"use_peft": True, "beta": 0.01, "loss_type": "grpo"}
    grpo(tmp_path / "whole", max_steps=4, **options).train()
    grpo(tmp_path / "cut", max_steps=2, save_steps=1, **options).train()
    trainer = grpo(tmp_path / "cut", max_steps=4, **options)
    trainer.train(resume_from_checkpoint=True)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    assert trainer.reference is trainer.model
    kl = [row["kl"] for row in metrics(tmp_path / "whole")]
    assert abs(kl[0]) < 1e-6  # new adapters change nothing
    assert kl[-1] > 1e-6


def test_the_reference_of_lora_is_the_model_without_adapters(peft, tmp_path):
    trainer = grpo(tmp_path, use_peft=True, beta=0.1)
    rollout = trainer.collect()[0].rollout
    expected = trainer.logprobs(make_model(make_tokenizer(), seed=0), rollout)
    for name, p in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    batch, _ = trainer.prepare(rollout, torch.arange(8.0))
    torch.testing.assert_close(batch.ref_logprob, expected.detach(), rtol=0, atol=tol.FLOAT32)
    assert (batch.old_logprob - expected).abs().max() > 0.01
    assert all(p.requires_grad for name, p in trainer.model.named_parameters() if "lora_" in name)


def test_adapters_of_bfloat16_models_are_float32_and_merge_into_bfloat16(peft, tmp_path):
    trainer = grpo(tmp_path, torch.bfloat16, use_peft=True)
    assert {p.dtype for p in trainer.updater.parameters} == {torch.float32}
    assert {p.dtype for p in merged_model(trainer.model).parameters()} == {torch.bfloat16}


def test_lora_adapts_the_layers_that_its_option_names(peft, tmp_path):
    def adapted(**options) -> set[str]:
        model = grpo(tmp_path, use_peft=True, **options).model
        return {name.split(".")[-1] for name, module in model.named_modules() if hasattr(module, "base_layer")}

    assert adapted() == {"q_proj", "v_proj"}
    assert adapted(lora_target_modules=["o_proj", "up_proj"]) == {"o_proj", "up_proj"}
    assert adapted(lora_target_modules=["q_proj"]) == {"q_proj"}
    every = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert adapted(lora_target_modules=["all-linear"]) == every


@pytest.mark.parametrize("targets", [["nowhere"], ["lm_head", "q_proj"], ["embed_tokens"]])
def test_lora_targets_that_do_not_exist_or_are_tables_are_refused(targets, peft, tmp_path):
    with pytest.raises(ConfigError, match="lora_target_modules is") as error:
        grpo(tmp_path, use_peft=True, lora_target_modules=targets)
    assert "\n" not in str(error.value)


def test_adapters_that_a_model_already_has_are_not_started_anew(peft, tmp_path):
    model = grpo(tmp_path / "run", use_peft=True).model
    options = LatentGRPOConfig(latent_top_k=3, use_peft=True)
    with pytest.raises(ConfigError, match="already has adapters; merge them first"):
        LatentGRPOTrainer(model, mixed_reward, options, ROWS, None, make_tokenizer())


def test_a_checkpoint_of_adapters_is_read_by_peft_and_names_its_base_model(peft, tmp_path):
    trainer = grpo(tmp_path / "run", use_peft=True, save_steps=1)
    model = trainer.model
    assert model.peft_config["default"].base_model_name_or_path == model.name_or_path
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert (checkpoint / "generation_config.json").exists()
    read = peft.PeftModel.from_pretrained(make_model(make_tokenizer(), seed=0), checkpoint).eval()
    ids = torch.arange(6).unsqueeze(0)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, model(ids).logits, rtol=0, atol=tol.FLOAT32)


def test_a_checkpoint_of_adapters_of_another_rank_is_refused(peft, tmp_path):
    grpo(tmp_path / "run", use_peft=True, save_steps=1).train()
    with pytest.raises(ConfigError, match="lora_r 16, this run has 8"):
        grpo(tmp_path / "run", use_peft=True, lora_r=8).train(resume_from_checkpoint=True)


def test_a_model_whose_adapters_are_frozen_is_refused(peft, tmp_path):
    trainer = grpo(tmp_path / "run", use_peft=True)
    model = copy.deepcopy(trainer.model).requires_grad_(False)
    with pytest.raises(ConfigError, match="adapters that are not trainable"):
        LatentGRPOTrainer(model, mixed_reward, LatentGRPOConfig(latent_top_k=3), ROWS, None, make_tokenizer())


@pytest.mark.parametrize(("option", "value"), [("lora_r", 0), ("lora_alpha", 0)])
def test_options_out_of_range_are_named(option, value):
    for config in (LatentGRPOConfig, LatentSFTConfig):
        with pytest.raises(ConfigError, match=f"{option} is {value}"):
            config(**{option: value})
