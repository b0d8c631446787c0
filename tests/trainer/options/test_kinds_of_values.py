"""Values of the wrong kind are refused by every configuration, and flags can empty a list."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest

from latent_grpo.commands.main import main
from latent_grpo.commands.options import parse_config
from latent_grpo.config import EncodeConfig, LatentGRPOConfig, LatentSampling, LatentSFTConfig
from latent_grpo.errors import ConfigError
from latent_grpo.prompts import PromptFormat
from latent_grpo.study.config import CompareConfig

CONFIGURATIONS = (LatentGRPOConfig, LatentSFTConfig, EncodeConfig, CompareConfig)


def options_of(kind: type) -> dict[str, tuple[type, str]]:
    """Return the options of a kind by the name of a test: (configuration, option)."""
    return {
        f"{config.__name__}.{item.name}": (config, item.name)
        for config in CONFIGURATIONS
        for item in fields(config)
        if kind in (get_type_hints(config)[item.name], *get_args(get_type_hints(config)[item.name]))
        and not any(get_args(part) for part in get_args(get_type_hints(config)[item.name]))
        and "list" not in str(get_type_hints(config)[item.name])
    }


def message_of(config: type, **options) -> str:
    with pytest.raises(ConfigError) as error:
        config(**options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("config", "name"), options_of(int).values(), ids=options_of(int))
@pytest.mark.parametrize("value", [2.5, 3.0, np.float64(4.0), "3"], ids=str)
def test_a_whole_number_is_no_float_and_no_text(value, config, name):
    message = message_of(config, **{name: value})
    assert message.startswith(f"{name} is {value.item() if hasattr(value, 'item') else value!r}: give a ")
    assert "number" in message


@pytest.mark.parametrize(("config", "name"), options_of(bool).values(), ids=options_of(bool))
@pytest.mark.parametrize("value", ["False", 0, 1], ids=repr)
def test_a_switch_is_true_or_false(value, config, name):
    assert message_of(config, **{name: value}) == f"{name} is {value!r}: give true or false"


@pytest.mark.parametrize(("config", "name"), options_of(str).values(), ids=options_of(str))
def test_a_text_is_no_number(config, name):
    assert message_of(config, **{name: 3}) == f"{name} is 3: give a text"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(limit=-3), "limit is -3: give a number, 1 or more"),
        (dict(limit=0), "limit is 0: give a number, 1 or more"),
        (dict(max_steps=-5), "max_steps is -5: give a number, -1 or more"),
        (dict(max_prompt_length=0), "max_prompt_length is 0: give a number, 1 or more"),
    ],
    ids=str,
)
@pytest.mark.parametrize("config", [LatentGRPOConfig, LatentSFTConfig, EncodeConfig])
def test_numbers_without_a_meaning_are_refused(config, options, message):
    assert message_of(config, **options) == message


@pytest.mark.parametrize(("config", "name"), options_of(float).values(), ids=options_of(float))
def test_a_number_is_finite_unless_infinity_has_a_meaning(config, name):
    if name == "tau":
        assert config(tau=float("inf")).tau == float("inf")
    else:
        assert message_of(config, **{name: float("inf")}).startswith(f"{name} is inf: give a ")


@pytest.mark.parametrize("weights", [["a"], [None], [True], [float("nan")], [1.0, float("inf")]], ids=str)
def test_weights_of_rewards_are_finite_numbers(weights):
    assert message_of(LatentGRPOConfig, reward_weights=weights).startswith(f"reward_weights is {weights!r}: give a ")


def test_a_name_of_another_trainer_is_answered_with_ours(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--max_new_tokens", "8"])
    assert "unknown option 'max_new_tokens'; give max_completion_length" in capsys.readouterr().err


def test_arguments_of_the_chat_template_that_a_prompt_sets_are_refused():
    with pytest.raises(ConfigError, match="leave out add_generation_prompt, which is set already"):
        PromptFormat(chat_template_kwargs={"add_generation_prompt": False, "enable_thinking": True})


def test_paths_and_numpy_numbers_become_what_a_checkpoint_can_write():
    config = LatentGRPOConfig(output_dir=Path("runs") / "x", limit=np.int64(3), latent=np.bool_(True).item())
    assert (config.output_dir, config.limit, type(config.limit)) == (str(Path("runs") / "x"), 3, int)
    LatentSampling(max_new_tokens=np.int32(4), eos_token_id=(1, 2), end_token_id=3).check()
    with pytest.raises(ConfigError, match=r"max_new_tokens is 4\.5: give a whole number"):
        LatentSampling(max_new_tokens=4.5).check()


@pytest.mark.parametrize(
    "template", ["{answer", "{answer} {x}", "{answer} {}", "{answer.x}", "{0} {answer}", "{answer} {answer.x}"]
)
def test_an_answer_template_that_cannot_be_filled_is_refused(template):
    assert message_of(LatentSFTConfig, answer_template=template).startswith(f"answer_template is {template!r}: ")


def test_a_flag_empties_a_list_of_a_configuration_file(tmp_path, capsys):
    file = tmp_path / "own.yaml"
    file.write_text("expected_columns: [a, b]\nreport_to: [tensorboard]\n")
    words = ["--config", str(file), "--dataset", "d", "--expected_columns", "--report_to"]
    config = parse_config("train", LatentGRPOConfig, "", words)
    assert (config.expected_columns, config.report_to) == ([], [])
    assert parse_config("train", LatentGRPOConfig, "", words[:2]).expected_columns == ["a", "b"]
    with pytest.raises(SystemExit):
        main(["train", "--reward_funcs", "--dataset", "d"])
    assert "reward_funcs" in capsys.readouterr().err
