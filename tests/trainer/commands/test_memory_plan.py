"""The memory planner against measured peaks, and what its terms follow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import tolerances as tol

from bench.planner import CASES, make_config, measured_in_fresh_process, options, plan_of
from latent_grpo.commands.main import main
from latent_grpo.commands.memory_plan import make_plan, model_size
from latent_grpo.config import ConfigError

SMALL = CASES["small"]


# The planner measures resident memory, which needs /proc.
MEASURES_PEAKS = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc to measure peaks with")


@pytest.mark.slow
@MEASURES_PEAKS
@pytest.mark.parametrize("name", list(CASES)[1:])
def test_predicted_peaks_are_those_measured(name: str) -> None:
    measured = measured_in_fresh_process(name)
    assert plan_of(name).peak == pytest.approx(measured, rel=tol.MEMORY_PLAN)


@MEASURES_PEAKS
def test_a_peak_is_measured_in_a_fresh_process() -> None:
    assert 0 <= measured_in_fresh_process("warm-up") < plan_of("small").peak


def test_both_phases_are_tried() -> None:
    larger = {name: sum(plan_of(name).rollout.values()) > sum(plan_of(name).update.values()) for name in CASES}
    assert set(larger.values()) == {True, False}


def test_a_model_is_counted_without_being_made() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    size = model_size(config, torch.bfloat16)
    assert size.parameters == 8_030_261_248  # of Llama 3 8B
    assert size.trained == size.parameters - 128256 * 4096


def test_what_grows_with_what() -> None:
    size = model_size(make_config(SMALL), torch.float32)
    args = options(SMALL, "")
    base = make_plan(size, args, "cpu")
    half = make_plan(size, replace(args, per_device_train_batch_size=16), "cpu")
    assert half.update["activations"] == pytest.approx(base.update["activations"] / 2, rel=0.01)
    assert half.rollout == base.rollout
    longer = make_plan(size, replace(args, max_completion_length=2 * args.max_completion_length), "cpu")
    assert base.rollout["key-value cache"] < longer.rollout["key-value cache"] < 2 * base.rollout["key-value cache"]
    narrow = make_plan(replace(size, itemsize=2), args, "cpu")
    assert narrow.update["weights"] == base.update["weights"] / 2
    assert narrow.update["optimizer"] == base.update["optimizer"]
    assert narrow.update["float32 copies"] == 4 * size.trained
    plain = make_plan(replace(size, itemsize=2), replace(args, master_weights=False), "cpu")
    saved = sum(narrow.update.values()) - sum(plain.update.values())
    assert saved == 12 * size.trained  # copies 4, moments 4, and float32 gradients 4 beside the pass's own
    eight = make_plan(size, replace(args, optim="adamw_8bit"), "cpu")
    assert eight.update["optimizer"] == base.update["optimizer"] / 4
    recomputed = make_plan(size, replace(args, gradient_checkpointing=True), "cpu")
    assert recomputed.update["activations"] < base.update["activations"] / 2
    with pytest.raises(ConfigError, match="use_peft"):
        make_plan(size, replace(args, use_peft=True), "cpu")
    assert narrow.update["activations"] > base.update["activations"] / 2  # norms keep float32
    assert make_plan(size, replace(args, beta=0.1), "cpu").update["reference model"] == base.update["weights"]


def test_doctor_plans_from_the_configuration_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_config(SMALL).save_pretrained(tmp_path / "model")  # no weights, no tokenizer
    command = [
        "doctor",
        "--model",
        str(tmp_path / "model"),
        "--plan",
        "--config",
        "low-difficulty",
        "--dtype",
        "float32",
    ]
    assert main([*command, "--generation_batch_size", "64"]) == 0
    shown = capsys.readouterr().out
    assert "key-value cache" in shown
    assert "64 responses a rollout, 32 in a pass, prompts of 192 and responses of 128 tokens" in shown
    for wrong, named in (
        (["doctor", "--plan"], "model is not given"),
        (["doctor", "--plan", "--model", "./none"], "'./none' does not exist"),
        ([*command, "--generation_batch_sise", "64"], "generation_batch_size"),
    ):
        try:
            code = main(wrong)
        except SystemExit as stop:
            code = stop.code
        assert code == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1
        assert named in error[0]
