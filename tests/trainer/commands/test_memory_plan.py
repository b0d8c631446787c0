"""The memory planner: predicted against measured peaks, and how each term follows the options."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import tolerances as tol
from support.commands import exit_code

from bench.planner import CASES, make_config, measured_in_fresh_process, options, plan_of
from latent_grpo.commands.memory_plan import Plan, make_plan, model_size
from latent_grpo.errors import ConfigError

SMALL = CASES["small"]
# The planner measures resident memory, which needs /proc.
MEASURES_PEAKS = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc to measure peaks with")


@pytest.mark.slow
@MEASURES_PEAKS
@pytest.mark.parametrize("name", list(CASES)[1:])
def test_a_predicted_peak_is_near_the_measured_one(name: str) -> None:
    measured = measured_in_fresh_process(name)
    assert plan_of(name).peak == pytest.approx(measured, rel=tol.MEMORY_PLAN)


@MEASURES_PEAKS
def test_a_peak_is_measured_in_a_fresh_process() -> None:
    assert 0 <= measured_in_fresh_process("warm-up") < plan_of("small").peak


def test_the_cases_have_their_peak_in_either_phase() -> None:
    larger = {name: sum(plan_of(name).rollout.values()) > sum(plan_of(name).update.values()) for name in CASES}
    assert set(larger.values()) == {True, False}


def test_a_model_is_counted_without_being_made() -> None:
    from transformers import LlamaConfig

    llama_3_8b = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    size = model_size(llama_3_8b, torch.bfloat16)
    assert size.parameters == 8_030_261_248
    assert size.trained == size.parameters - 128256 * 4096


def plan_for(itemsize: int = 4, **changes) -> Plan:
    """Return the plan of the small case with changed options, for parameters of `itemsize` bytes."""
    size = replace(model_size(make_config(SMALL), torch.float32), itemsize=itemsize)
    return make_plan(size, replace(options(SMALL, ""), **changes), "cpu")


def test_activations_follow_the_rows_per_pass_and_recomputation() -> None:
    base, half = plan_for(), plan_for(per_device_train_batch_size=16)
    assert half.update["activations"] == pytest.approx(base.update["activations"] / 2, rel=0.01)
    assert half.rollout == base.rollout
    assert plan_for(gradient_checkpointing=True).update["activations"] < base.update["activations"] / 2


def test_the_cache_follows_the_length_of_responses() -> None:
    base, longer = plan_for(), plan_for(max_completion_length=2 * SMALL["steps"])
    # The prompt's part of the cache stays as it is.
    assert base.rollout["key-value cache"] < longer.rollout["key-value cache"] < 2 * base.rollout["key-value cache"]


def test_16_bit_parameters_halve_the_weights_and_keep_the_float32_optimizer() -> None:
    base, narrow = plan_for(), plan_for(itemsize=2)
    trained = model_size(make_config(SMALL), torch.float32).trained
    assert narrow.update["weights"] == base.update["weights"] / 2
    assert narrow.update["optimizer"] == base.update["optimizer"]
    assert narrow.update["float32 copies"] == 4 * trained
    assert narrow.update["activations"] > base.update["activations"] / 2  # norms keep float32
    without_copies = plan_for(itemsize=2, master_weights=False)
    saved = sum(narrow.update.values()) - sum(without_copies.update.values())
    assert saved == 12 * trained  # copies 4, moments 4, and float32 gradients 4 beside the pass's own


def test_the_optimizer_in_8_bits_and_the_reference_model_are_counted() -> None:
    base = plan_for()
    assert plan_for(optim="adamw_8bit").update["optimizer"] == base.update["optimizer"] / 4
    assert plan_for(beta=0.1).update["reference model"] == base.update["weights"]


def test_a_plan_with_adapters_is_refused() -> None:
    with pytest.raises(ConfigError, match="use_peft"):
        plan_for(use_peft=True)


def test_doctor_plans_from_the_configuration_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_config(SMALL).save_pretrained(tmp_path / "model")  # no weights, no tokenizer
    command = ["doctor", "--plan", "--model", str(tmp_path / "model"), "--config", "low-difficulty"]
    command += ["--dtype", "float32"]
    assert exit_code([*command, "--generation_batch_size", "64"]) == 0
    printed = capsys.readouterr().out
    assert "key-value cache" in printed
    assert "64 responses per rollout, 32 per pass, prompts of 192 and responses of 128 tokens" in printed
    for mistake, message in (
        (["doctor", "--plan"], "model is not given"),
        (["doctor", "--plan", "--model", "./none"], "'./none' does not exist"),
        ([*command, "--generation_batch_sise", "64"], "generation_batch_size"),
    ):
        assert exit_code(mistake) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert message in line
