"""What makes a checkpoint a run's own. A run resumes only a checkpoint that it could have written itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from latent_grpo.config import PromptOptions, RunOptions
from latent_grpo.errors import ConfigError
from latent_grpo.parallel.process_group import world_size
from latent_grpo.prompts import PromptFormat

# What versions without an option did, where the option's default is something else.
EARLIER = {"use_bias_correction_kl": False, "reward_completions": "visible"}
EARLIER_CISPO_WEIGHT = 5.0  # the default of epsilon_high with cispo in versions without max_rollouts
FINGERPRINT_ROWS = 1000  # hashed rows of the training data at most, spread over all of it

# Options that a resumed run may change. Options of the evaluation (`eval_...`) are free too.
FREE_OPTIONS = frozenset(
    (
        # They say where the run writes and what it reports. They do not reach the parameters.
        *(
            "output_dir",
            "overwrite",
            "resume_from_checkpoint",
            "save_steps",
            "save_total_limit",
            "logging_steps",
            "report_to",
        ),
        *("save_failure", "max_skipped_updates", "max_hours", "reward_timeout"),
        *("project", "run_name", "log_table", "log_completions", "num_completions_to_print", "probe_steps"),
        # They say which phases `encode` runs, and when it measures.
        *("phases", "read_back_steps"),
        # A run may move to another machine.
        "device",
        # They set the number of steps, which `total_steps` compares if the learning rate depends on it.
        *("max_steps", "max_rollouts", "num_train_epochs"),
        # They name the training data, whose rows `data` compares: a file may have moved.
        *("dataset", "dataset_split", "prompt_column", "answer_column", "chain_column", "limit"),
        *("expected_columns", "deduplicate", "repeated_prompts", "long_prompts", "missing_chains"),
        # They give the prompt format, which is compared as a whole: the model's own may come in their place.
        *(item.name for item in fields(PromptOptions)),
        # They give the size of an update, together with the number of processes. `update_size` compares the product.
        *("per_device_train_batch_size", "gradient_accumulation_steps"),
    )
)


def run_identity(
    kind: str, args: RunOptions, rows: Sequence[Any], total_steps: int, model: Any, prompt_format: PromptFormat
) -> dict[str, Any]:
    """Return what identifies a run, in the types that JSON keeps.

    kind: the training phase, "train" or "sft". rows: the training data. total_steps: length of the schedule.
    prompt_format: how prompts are put to the model.
    """
    options = asdict(args)
    if options["dtype"] == "auto":  # what it stands for is another on another device
        options["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    identity = {
        "kind": kind,
        "options": options,
        "update_size": args.update_size(world_size()),
        "total_steps": total_steps,
        "data": fingerprint(rows),
        "prompt_format": asdict(prompt_format),
        "parameters": {name: list(p.shape) for name, p in model.named_parameters()},
    }
    # Through JSON, so that it compares equal to one that was read from a file: tuples become lists.
    return dict(json.loads(json.dumps(identity)))


def check_identity(folder: Path, saved: dict[str, Any], own: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Raise ConfigError that names the first difference between the run of a checkpoint and this run.

    defaults: those of the run's options.
    """
    for difference in _differences(saved, own, defaults):
        remedy = "resume with what it was written with, or start anew in another output_dir"
        raise ConfigError(f"checkpoint {str(folder)!r} {difference}; {remedy}")


def _differences(saved: dict[str, Any], own: dict[str, Any], defaults: dict[str, Any]) -> Iterator[str]:
    """Say in which respects the identities of a checkpoint and of this run differ."""
    if saved["kind"] != own["kind"]:
        yield f"is of {saved['kind']!r} training, this is {own['kind']!r}"
    written, given = _in_own_words(saved["options"]), own["options"]
    # An option that the checkpoint does not have is newer than the checkpoint.
    for name in sorted(given.keys() - FREE_OPTIONS):
        value = written.get(name, EARLIER.get(name, defaults[name]))
        if value != given[name] and not name.startswith("eval_"):
            yield f"was written with {name} {value!r}, this run has {given[name]!r}"
    if saved["kind"] == "train" and "max_rollouts" not in written and given["max_steps"] > 0:
        yield "is of a version whose max_steps counted rollouts, as max_rollouts does now"
    # Checkpoints of earlier versions hold no prompt format.
    for name, value in saved.get("prompt_format", {}).items():
        if value != own["prompt_format"].get(name):
            yield f"was written with {name} {value!r}, this run has {own['prompt_format'].get(name)!r}"
    if saved["update_size"] != own["update_size"]:
        yield (
            f"was written with updates of {saved['update_size']} (per_device_train_batch_size times "
            f"gradient_accumulation_steps times processes), this run has {own['update_size']}"
        )
    schedule = given["lr_scheduler_type"]
    # A constant learning rate does not depend on the number of steps, so such a run can be made longer.
    constant = schedule.startswith("constant") and not given["warmup_ratio"]
    if saved["total_steps"] != own["total_steps"] and not constant:
        yield f"has a {schedule} schedule over {saved['total_steps']} steps, this run has one over {own['total_steps']}"
    if saved["data"] != own["data"]:
        yield "was written with other training data"
    for name in sorted(saved["parameters"].keys() | own["parameters"].keys()):
        then, now = saved["parameters"].get(name), own["parameters"].get(name)
        if then != now:
            yield f"is of another model: {name} is {then} there and {now} here"


def _in_own_words(written: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a checkpoint with the values that mean here what they meant to their own version."""
    if "max_rollouts" in written or written.get("loss_type") != "cispo" or written.get("epsilon_high") is not None:
        return written
    return {**written, "epsilon_high": EARLIER_CISPO_WEIGHT}


def fingerprint(rows: Sequence[Any]) -> str:
    """Return the number of rows, with a hash of up to FINGERPRINT_ROWS of them."""
    digest = hashlib.sha256()
    for i in range(0, len(rows), -(-len(rows) // FINGERPRINT_ROWS)):
        digest.update(json.dumps(dict(rows[i]), sort_keys=True, default=str).encode())
    return f"{len(rows)} rows, sha256 {digest.hexdigest()}"
