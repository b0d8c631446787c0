"""Options of the warm start's stages that no other test turns, and their recipes."""

from __future__ import annotations

import json

import pytest
import torch
from support.options import ROWS, record_optimizer_steps
from support.trainers import grpo

from latent_grpo import LatentSFTConfig, LatentSFTTrainer
from latent_grpo.commands.main import main
from latent_grpo.config import EncodeConfig
from latent_grpo.errors import ConfigError
from latent_grpo.quickstart.toy_task import make_model
from latent_grpo.recipes.read import read_yaml
from latent_grpo.sft.encode import LABEL_FILE

RECIPES = {
    "encode-low-difficulty": (EncodeConfig, 1e-4, 10, 64, 2),
    "encode-high-difficulty": (EncodeConfig, 1e-5, 10, 8, 16),
    "sft-low-difficulty": (LatentSFTConfig, 3e-4, 70, 64, None),
    "sft-high-difficulty": (LatentSFTConfig, 2e-5, 50, 32, None),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_holds_the_released_settings(recipe):
    kind, rate, epochs, rows, compression = RECIPES[recipe]
    config = kind(**read_yaml(recipe, kind))
    assert (config.learning_rate, config.num_train_epochs, config.update_size(1)) == (rate, epochs, rows)
    assert (config.lora_r, config.lora_alpha, config.lora_dropout) == (64, 128, 0.1)
    assert (config.lr_scheduler_type, config.warmup_ratio, config.weight_decay) == ("cosine", 0.05, 0.01)
    if kind is EncodeConfig:
        assert (config.compression, config.label_size) == (compression, 10)
    else:
        assert (config.gumbel_scale, config.ce_weight, config.kl_weight) == (1.0, 1.0, 1.0)


def warm_start(tokenizer, folder, **options) -> LatentSFTTrainer:
    base = dict(output_dir=str(folder), answer_template="{answer}", log_table=False, save_steps=0)
    return LatentSFTTrainer(make_model(tokenizer, seed=0), LatentSFTConfig(**base, **options), ROWS, tokenizer)


def test_warmup_ratio_is_a_share_of_all_steps(tokenizer, tmp_path):
    trainer = warm_start(tokenizer, tmp_path / "run", max_steps=5, warmup_ratio=0.3, learning_rate=1e-3)
    steps = record_optimizer_steps(trainer)
    trainer.train()
    assert [rate for rate, _ in steps] == pytest.approx([0.0, 5e-4, 1e-3, 1e-3, 1e-3])  # 1.5 steps, rounded up
    trainer = grpo(tmp_path / "train", tokenizer, max_steps=5, warmup_ratio=0.3)
    assert trainer.updater.scheduler.lr_lambdas[0](1) == 0.5
    with pytest.raises(ConfigError, match=r"^warmup_ratio is 0\.1: warmup_steps is 3; give only one$"):
        LatentSFTConfig(warmup_ratio=0.1, warmup_steps=3)


def test_a_run_with_warmup_ratio_keeps_its_length_when_it_resumes(tokenizer, tmp_path):
    options = dict(warmup_ratio=0.5, learning_rate=1e-3)
    trainer = warm_start(tokenizer, tmp_path / "saved", **options, max_steps=2)
    trainer.train()
    trainer.save()
    with pytest.raises(ConfigError, match="over 2 steps, this run has one over 4"):
        warm_start(tokenizer, tmp_path / "saved", **options, max_steps=4).train(resume_from_checkpoint=True)


def test_lora_dropout_acts_on_adapters_in_training(tokenizer, tmp_path):
    pytest.importorskip("peft")
    losses = {}
    for dropout in (0.0, 0.5):
        options = dict(use_peft=True, lora_target_modules=["q_proj", "v_proj"], lora_dropout=dropout)
        trainer = warm_start(tokenizer, tmp_path / str(dropout), max_steps=2, learning_rate=1e-2, **options)
        dropped = [m.p for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout)]
        assert dropped == [0.5] * 6 if dropout else not dropped
        losses[dropout] = trainer.train()["loss"]
    assert losses[0.0] != losses[0.5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(targets="soft_labels"), "soft_labels is None: targets is soft_labels; name them"),
        (dict(soft_labels="x"), "soft_labels is 'x': give --targets soft_labels too"),
        (
            dict(targets="soft_labels", soft_labels="x", latent=False),
            "targets is 'soft_labels': latent is False, and text has no latent targets",
        ),
    ],
)
def test_targets_and_their_file_go_together(options, message):
    with pytest.raises(ConfigError) as error:
        LatentSFTConfig(**options)
    assert str(error.value) == message


def test_the_commands_run_both_stages(tokenizer, tmp_path, capsys):
    make_model(tokenizer, seed=0).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    common = ["--dataset", str(tmp_path / "rows.jsonl"), "--max_steps", "1", "--save_steps", "0", "--no_log_table"]
    common += ["--answer_template", "{answer}", "--per_device_train_batch_size", "4"]
    out, start = str(tmp_path / "encode"), ["--model_name_or_path", str(tmp_path / "base")]
    assert main(["encode", *start, *common, "--output_dir", out, "--read_back_rows", "2"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"{tmp_path / 'base'}: float32 on cpu (dtype auto)"
    phases = ["encoder", "decoder", "union"]
    assert [name for line in lines if (name := line.split(":")[0]) in phases][:3] == phases
    labels = ["--targets", "soft_labels", "--soft_labels", f"{out}/{LABEL_FILE}", "--gumbel_scale", "1"]
    start = ["--model_name_or_path", f"{out}/union/decoder"]
    assert main(["sft", *start, *common, *labels, "--output_dir", str(tmp_path / "sft")]) == 0
    assert (tmp_path / "sft" / "model.safetensors").exists()
    assert main(["sft", *start, *common, *labels, "--limit", "5", "--output_dir", str(tmp_path / "other")]) == 2
    assert "has labels of 16 rows, the data set has 5" in capsys.readouterr().err
