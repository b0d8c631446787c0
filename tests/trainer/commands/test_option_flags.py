"""What the command line takes: help by group, values of flags, configuration files, recipes and presets."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
from support.commands import exit_code

from latent_grpo.commands.evaluate import eval_parser
from latent_grpo.commands.generate import generate_parser
from latent_grpo.commands.options import SHORT, load_for_sampling, parse_config
from latent_grpo.config import EncodeConfig, LatentGRPOConfig, LatentSFTConfig, groups_of
from latent_grpo.errors import unknown_key
from latent_grpo.recipes.read import read_yaml
from latent_grpo.study.config import CompareConfig
from latent_grpo.trl_names import SYNONYMS

CONFIGURATIONS = {"encode": EncodeConfig, "sft": LatentSFTConfig, "train": LatentGRPOConfig, "compare": CompareConfig}


def help_text(command: str, monkeypatch, capsys) -> str:
    """Return the help of a command, with no line wrapped."""
    monkeypatch.setenv("COLUMNS", "1000")
    assert exit_code([command, "--help"]) == 0
    return capsys.readouterr().out


def entries(section: str) -> dict[str, str]:
    """Return the help of every option of a group, on one line."""
    # A line that begins with two spaces and a flag begins an entry; its help is indented further.
    parts = re.split(r"^  --(\w+)", section, flags=re.MULTILINE)[1:]
    return {name: " ".join(text.split()) for name, text in zip(parts[::2], parts[1::2], strict=True)}


def default_of(item) -> object:
    """Return the default of a dataclass field."""
    return item.default_factory() if callable(item.default_factory) else item.default


@pytest.mark.parametrize("command", ["quickstart", "eval", "generate", "inspect", "doctor"])
def test_every_command_has_help(command, monkeypatch, capsys):
    assert f"latent-grpo {command}" in help_text(command, monkeypatch, capsys)


@pytest.mark.parametrize("command", CONFIGURATIONS)
def test_help_shows_every_option_in_its_group_with_range_and_default(command, monkeypatch, capsys):
    text = help_text(command, monkeypatch, capsys)
    sections = text.split("\n\n")
    groups = list(groups_of(CONFIGURATIONS[command]))
    # The usage line, the description and the options that argparse adds come first.
    assert len(sections) == len(groups) + 3
    for section, (group, items) in zip(sections[3:], groups, strict=True):
        heading = section.splitlines()[0].removesuffix(":")
        assert heading == group.__doc__.splitlines()[0].rstrip(".")
        shown = entries(section)
        assert [name for name in shown if not name.startswith("no_")] == [item.name for item in items]
        for item in items:
            assert item.metadata["help"] in shown[item.name]
            facts = [] if item.metadata["range"] is None else [str(item.metadata["range"])]
            if default_of(item) not in (None, "", []):
                facts.append(f"default: {default_of(item)}")
            facts += [f"also --{short}" for short, name in SHORT.items() if name == item.name]
            assert shown[item.name].endswith(f"[{'; '.join(facts)}]" if facts else item.metadata["help"])


def test_help_of_train_names_groups_ranges_and_defaults_in_plain_words(monkeypatch, capsys):
    text = help_text("train", monkeypatch, capsys)
    for heading in ("How a response is sampled", "LoRA adapters", "How rewards become advantages"):
        assert f"\n\n{heading}:\n" in text
    shown = entries(text)
    assert shown["tau"].endswith("[above 0; default: 1.0]")
    assert shown["top_p"].endswith("[above 0, at most 1; default: 0.95]")
    assert shown["latent_top_p"].endswith("[0 to 1; default: 0.95]")
    assert shown["seed"].endswith("[0 or more, below 4294967296; default: 0]")
    assert shown["no_latent"] == "Same as --latent false."


def parse(*words: str) -> LatentGRPOConfig:
    """Return the configuration of `latent-grpo train WORDS`."""
    return parse_config("latent-grpo train", LatentGRPOConfig, "", words)


@pytest.mark.parametrize(
    ("words", "name", "expected"),
    [
        ("", "delta", 3.0),
        ("--delta null", "delta", None),
        ("--delta 5", "delta", 5.0),
        ("--limit null", "limit", None),
        ("--latent", "latent", True),
        ("--latent true", "latent", True),
        ("--latent False", "latent", False),
        ("--latent false", "latent", False),
        ("--latent off", "latent", False),
        ("--no_latent", "latent", False),
        ("--group_filter 0", "group_filter", False),
        ("--use_peft", "use_peft", True),
        ("--report_to tensorboard wandb", "report_to", ["tensorboard", "wandb"]),
        ("--report_to wandb", "report_to", ["wandb"]),
        ("--reward_weights 1 0.5", "reward_weights", [1.0, 0.5]),
        ("--learning_rate 1e-5", "learning_rate", 1e-5),
        ("--learning-rate 1e-5", "learning_rate", 1e-5),
        ("--learning-rate=1e-5", "learning_rate", 1e-5),
        ("--no-latent", "latent", False),
        ("--latent f", "latent", False),
        ("--use_peft y", "use_peft", True),
        ("--run_name null", "run_name", "null"),
        ("--run_name a-b", "run_name", "a-b"),
        ("--lora_target_modules null", "lora_target_modules", ["null"]),
        ("--model some/model", "model_name_or_path", "some/model"),
        ("--data=rows.jsonl", "dataset", "rows.jsonl"),
        ("--out runs/one", "output_dir", "runs/one"),
    ],
)
def test_a_flag_gives_its_option_the_value_of_its_type(words, name, expected):
    value = getattr(parse(*words.split()), name)
    assert value == expected
    assert type(value) is type(expected)


def test_commands_that_sample_take_the_names_of_training():
    names = ("--model_name_or_path", "some/model", "--dataset", "rows.jsonl", "--output-dir", "results")
    args = eval_parser("eval").parse_args(names)
    assert (args.model, args.data, args.out) == ("some/model", ["rows.jsonl"], "results")


def test_names_of_other_trainers_answer_with_what_to_give():
    known = [item.name for item in fields(LatentGRPOConfig)]
    assert set(SYNONYMS.values()) <= set(known)
    assert not set(SYNONYMS) & set(known)
    for name, ours in SYNONYMS.items():
        assert unknown_key(name, known) == f"unknown option {name!r}; give {ours}"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--tau 0", ["tau is 0.0", "above 0"]),
        ("--top_p nan", ["top_p is nan", "above 0, at most 1"]),
        ("--latent_top_p 1.5", ["latent_top_p is 1.5", "0 to 1"]),
        ("--num_generations 1", ["num_generations is 1", "2 or more"]),
        ("--tau x", ["--tau", "float", "'x'"]),
        ("--lora_r 1.5", ["--lora_r", "int", "'1.5'"]),
        ("--delta x", ["--delta", "float", "'x'"]),
        ("--tau null", ["--tau", "float", "'null'"]),
        ("--reward_weights null", ["--reward_weights", "float", "'null'"]),
        ("--latent maybe", ["--latent", "true or false", "'maybe'"]),
        ("--noise loud", ["--noise", "'loud'", "one_sided"]),
        ("--method multiplex", ["latent_top_p is 0.95", "method multiplex", "give 1"]),
        ("--noise two_sided --noise_delta 0.1", ["noise_delta is 0.1", "noise one_sided"]),
        ("--max_latent_steps 128", ["max_latent_steps is 128", "at most 128 steps"]),
        ("--report_to tensorbord", ["report_to is 'tensorbord'", "tensorboard, wandb, trackio"]),
    ],
)
def test_a_value_out_of_range_or_of_a_wrong_type_is_one_line_that_names_it(words, parts, capsys):
    assert exit_code(["train", *words.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(part in line for part in parts), line


OTHER_VALUES = dict(
    latent_top_k=3, top_k=7, min_latent_steps=2, max_latent_steps=9, end_rule="noisy", method="soft_grpo"
)


@pytest.mark.parametrize(
    "flag", ["latent_top_p", "tau", "noise_scale", "noise_delta", "temperature", "top_p", *OTHER_VALUES]
)
def test_sampling_flags_reach_the_sampler(flag, input_folder):
    value = OTHER_VALUES.get(flag, 0.25)
    parser = generate_parser("generate")
    args = parser.parse_args(["--model", str(input_folder / "model"), "--prompt", "x", f"--{flag}", str(value)])
    _, _, sampling, _ = load_for_sampling(args)
    assert getattr(sampling, flag) == value


PLAIN = dict(first_token="all", invalid="keep")
AS_RELEASED = dict(PLAIN, margin_gradient="none", end_rule="noisy", temperature=1.0, group_filter=False)
PRESETS = {
    "as-written": dict(
        invalid="exclude",
        first_token="best_of_correct",
        winner_from="valid",
        margin_gradient="aligned",
        end_rule="raw",
    ),
    "two-sided-noise": dict(PLAIN, latent=True, noise="two_sided", margin_gradient="none"),
    "soft-grpo": dict(
        AS_RELEASED,
        method="soft_grpo",
        latent_top_k=5,
        latent_top_p=0.95,
        tau=0.1,
        noise="two_sided",
        top_p=0.95,
        top_k=5,
        beta=0.001,
    ),
    "multiplex": dict(
        AS_RELEASED,
        method="multiplex",
        latent_top_k=3,
        latent_top_p=1.0,
        tau=float("inf"),
        top_p=1.0,
        top_k=0,
        beta=0.0,
        importance_sampling_level="component",
    ),
    "text-grpo": dict(PLAIN, latent=False, loss_type="grpo", delta=None),
}


@pytest.mark.parametrize(
    ("recipe", "invalid", "prompt_format"),
    [("low-difficulty", "zero", "latent-grpo-low"), ("high-difficulty", "exclude", "latent-grpo-high")],
)
def test_the_paper_recipes_run_the_rules_of_the_released_code(recipe, invalid, prompt_format):
    config = LatentGRPOConfig(**read_yaml(recipe, LatentGRPOConfig))
    rules = (config.invalid, config.first_token, config.winner_from, config.margin_gradient, config.end_rule)
    assert rules == (invalid, "best_of_group", "all", "released", "noisy")
    assert (config.prompt_format, config.long_prompts, config.weight_decay) == (prompt_format, "drop", 0.01)


@pytest.mark.parametrize("recipe", ["low-difficulty", "high-difficulty", "gsm8k-smollm2", *PRESETS])
def test_recipes_are_valid_configurations(recipe):
    config = LatentGRPOConfig(**read_yaml(recipe, LatentGRPOConfig))
    assert config.generation_batch_size % config.num_generations == 0


def test_a_number_in_exponent_form_in_a_config_file_is_a_number(tmp_path):
    path = tmp_path / "rate.yaml"
    path.write_text("learning_rate: 1e-6\n")
    config = parse("--config", str(path), "--seed", "3")
    assert (config.learning_rate, config.seed) == (1e-6, 3)


@pytest.mark.parametrize(("preset", "algorithm"), PRESETS.items(), ids=PRESETS.keys())
def test_a_preset_after_a_recipe_changes_only_the_algorithm(preset, algorithm):
    recipe = ["--config", "low-difficulty"]
    base, changed = vars(parse(*recipe)), vars(parse(*recipe, "--config", preset, "--seed", "5"))
    assert {name: changed[name] for name in algorithm} == algorithm
    different = {name for name in base if base[name] != changed[name]}
    assert different <= {*algorithm, "seed"}
    assert changed["seed"] == 5
