"""What configurations check, from Python too: ranges, types, choices, and options that do not go together."""

from __future__ import annotations

from dataclasses import fields
from types import NoneType
from typing import get_args, get_type_hints

import numpy as np
import pytest

from latent_grpo.config import EncodeConfig, LatentGRPOConfig, LatentSampling, LatentSFTConfig, Range
from latent_grpo.errors import ConfigError
from latent_grpo.study.config import CompareConfig

CONFIGURATIONS = (LatentGRPOConfig, LatentSFTConfig, EncodeConfig, CompareConfig)
COMPONENT = dict(importance_sampling_level="component", method="multiplex", latent_top_p=1.0)
WITH_RANGE = {
    f"{config.__name__}.{item.name}": (config, item.name, item.metadata["range"])
    for config in CONFIGURATIONS
    for item in fields(config)
    if item.metadata["range"] is not None
}


def message_of(config: type, **options) -> str:
    """Return the message of the ConfigError that a configuration raises."""
    with pytest.raises(ConfigError) as error:
        config(**options)
    return str(error.value)


def values_outside(allowed: Range) -> list[float]:
    """Return the nearest values on both sides of a range that do not belong to it."""
    values = []
    if allowed.low is not None:
        values.append(allowed.low if allowed.open_low else allowed.low - 1)
    if allowed.high is not None:
        values.append(allowed.high if allowed.open_high else allowed.high + 1)
    return values


@pytest.mark.parametrize(("config", "name", "allowed"), WITH_RANGE.values(), ids=WITH_RANGE.keys())
def test_a_value_out_of_range_or_of_a_wrong_type_is_refused_with_value_and_range(config, name, allowed):
    # A bool is an int in Python, and NaN compares as False with both bounds.
    for value in (*values_outside(allowed), float("nan"), "x", True):
        assert message_of(config, **{name: value}) == f"{name} is {value!r}: give a number, {allowed}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(tau="x"), "tau is 'x': give a number, above 0"),
        (dict(top_p=float("nan")), "top_p is nan: give a number, above 0, at most 1"),
        (dict(latent_top_p=-0.5), "latent_top_p is -0.5: give a number, 0 to 1"),
        (dict(seed=2**32), "seed is 4294967296: give a number, 0 or more, below 4294967296"),
        (dict(noise="loud"), "noise is 'loud': choose from one_sided, two_sided, none"),
        (dict(reward_funcs="accuracy"), "reward_funcs is 'accuracy': give a list"),
        (dict(report_to="wandb"), "report_to is 'wandb': give a list"),
        (dict(report_to=["wandb", "disk"]), "report_to is 'disk': choose from tensorboard, wandb, trackio"),
        (dict(max_steps=0), "max_steps is 0: give 1 or more, or -1 to go by epochs"),
        (dict(noise="none"), "noise is 'none': latent training needs noise to explore"),
        (dict(temperature=0.0), "temperature is 0.0: training needs sampled text; give more than 0"),
        (dict(generation_batch_size=10), "generation_batch_size is 10: give a multiple of num_generations 8"),
    ],
    ids=str,
)
def test_an_option_that_cannot_be_used_is_one_line_with_name_value_and_remedy(options, message):
    assert message_of(LatentGRPOConfig, **options) == message


@pytest.mark.parametrize(
    ("options", "name", "other"),
    [
        (dict(importance_sampling_cap=2.0, old_logprobs="rollout"), "importance_sampling_cap is 2.0", "old_logprobs"),
        (dict(loss_type="cispo", epsilon_high=0.0), "epsilon_high is 0.0", "cispo"),
        (dict(loss_type="vespo", importance_sampling_cap=2.0), "importance_sampling_cap is 2.0", "vespo"),
        (dict(max_steps=3, max_rollouts=2), "max_rollouts is 2", "max_steps is 3; give only one"),
        (dict(method="soft_grpo"), "noise is 'one_sided'", "give two_sided"),
        (dict(importance_sampling_level="component"), "importance_sampling_level is 'component'", "multiplex"),
        (dict(COMPONENT, latent=False), "importance_sampling_level is 'component'", "latent steps"),
        (dict(COMPONENT, loss_type="gspo"), "importance_sampling_level is 'component'", "loss_type gspo"),
        (dict(COMPONENT, old_logprobs="rollout"), "importance_sampling_level is 'component'", "old_logprobs recompute"),
        (dict(soft_punish_cache=200), "soft_punish_cache is 200", "max_completion_length"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_refused(options, name, other):
    message = message_of(LatentGRPOConfig, **options)
    assert message.startswith(name)
    assert other in message
    assert "\n" not in message


def test_a_warm_start_needs_a_template_that_holds_the_answer():
    message = message_of(LatentSFTConfig, answer_template="The answer")
    assert message == "answer_template is 'The answer': it must hold {answer}"


@pytest.mark.parametrize("options", [dict(delta=None), dict(latent=False, noise="none"), dict(tau=1), dict(top_k=0)])
def test_none_whole_numbers_and_bounds_are_taken_where_they_have_a_meaning(options):
    config = LatentGRPOConfig(**options)
    assert {name: getattr(config, name) for name in options} == options


@pytest.mark.parametrize("config", CONFIGURATIONS)
def test_none_is_refused_where_it_has_no_meaning(config):
    kinds = get_type_hints(config)
    for item in fields(config):
        if NoneType in get_args(kinds[item.name]):
            continue
        with pytest.raises(ConfigError, match=f"^{item.name} is None: "):
            config(**{item.name: None})


def test_numpy_numbers_become_numbers_that_a_checkpoint_can_write():
    config = LatentGRPOConfig(
        seed=np.int64(3), tau=np.float32(0.5), num_generations=np.int32(4), learning_rate=np.float64(1e-3)
    )
    assert (config.seed, config.tau, config.num_generations, config.learning_rate) == (3, 0.5, 4, 1e-3)
    assert {type(getattr(config, name)) for name in ("seed", "num_generations")} == {int}
    assert {type(getattr(config, name)) for name in ("tau", "learning_rate")} == {float}
    with pytest.raises(ConfigError, match="tau is "):
        LatentGRPOConfig(tau=np.float32(-1))


def test_sampling_options_can_be_checked_alone():
    LatentSampling(seed=1).check()
    with pytest.raises(ConfigError, match="latent_top_k is 1: give a number, 2 or more"):
        LatentSampling(latent_top_k=1).check()
