"""Write docs/trl.md: every option of TRL's GRPOConfig beside ours. `python docs/trl.py docs/trl.md`."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from latent_grpo.config import LatentGRPOConfig, default_of
from latent_grpo.trl_names import HINTS

VERSION = "1.16"
# Every option of TRL's GRPOConfig that exists here, with TRL's default.
SHARED: dict[str, Any] = {
    "output_dir": None,
    "per_device_train_batch_size": 8,
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "learning_rate": 1e-06,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "optim": "adamw_torch_fused",
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "gradient_accumulation_steps": 1,
    "max_grad_norm": 1.0,
    "gradient_checkpointing": True,
    "logging_steps": 10,
    "report_to": "none",
    "run_name": None,
    "project": "huggingface",
    "eval_steps": None,
    "save_steps": 500,
    "save_total_limit": None,
    "seed": 42,
    "resume_from_checkpoint": None,
    "num_generations": 8,
    "max_completion_length": 512,
    "generation_batch_size": None,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "chat_template_kwargs": None,
    "beta": 0.0,
    "num_iterations": 1,
    "epsilon": 0.2,
    "delta": None,
    "epsilon_high": None,
    "sapo_temperature_neg": 1.05,
    "sapo_temperature_pos": 1.0,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
    "importance_sampling_level": "token",
    "reward_weights": None,
    "scale_rewards": "group",
    "loss_type": "dapo",
    "mask_truncated_completions": False,
    "entropy_coef": 0.0,
    "use_bias_correction_kl": True,
    "log_completions": False,
    "num_completions_to_print": None,
}
# Why a default differs, or what differs under the name.
NOTES = {
    "per_device_train_batch_size": "responses in both; the last pass of an update may have fewer here",
    "num_train_epochs": "prompts that the group filter drops count as seen; a run is as long as the epochs say",
    "lr_scheduler_type": "the paper's learning rate is constant",
    "optim": "the same algorithm",
    "max_steps": "optimizer steps in both; `max_rollouts` counts rollouts",
    "gradient_accumulation_steps": "passes per update; a rollout of `generation_batch_size` has as many updates as fit",
    "gradient_checkpointing": "off: it costs time, and the loss holds no logits",
    "logging_steps": "counts rollouts here, each with all its updates; every rollout is logged",
    "save_steps": "counts rollouts here: a checkpoint lies between two rollouts",
    "eval_steps": "counts rollouts here; 0 evaluates never",
    "report_to": "a list; metrics.jsonl is always written",
    "generation_batch_size": "64 responses; TRL takes one update's",
    "max_completion_length": "the paper's low-difficulty limit; latent and text steps together",
    "temperature": "the paper's; of text steps. Log-probs divide by it in both",
    "top_p": "the paper's; of text steps",
    "top_k": "the paper's; of text steps",
    "beta": (
        "the k3 estimate is at most 10, as in the paper; TRL's has no bound. Beyond a log-ratio of 2.6 they differ. "
        "`kl_estimator` chooses k1 or k2"
    ),
    "use_bias_correction_kl": "the paper has no such factor; its recipes give `false`",
    "delta": (
        "the paper's dual clip. With `null` there is none, as in TRL. Below 1 + `epsilon_high` it also clips positive "
        "advantages, in both"
    ),
    "epsilon_high": "with `cispo` and no value, `epsilon` is the largest weight, in both; ScaleRL takes 5",
    "loss_type": (
        "`gspo` is ours: `grpo` on sequence ratios. The means of `dapo`, `cispo` and `vespo` are over the tokens of an "
        "update; TRL takes the average over the updates of a rollout for their number"
    ),
    "importance_sampling_level": "`component` is ours",
    "scale_rewards": "1e-6 is added to the deviation (the paper); TRL adds 1e-4",
    "mask_truncated_completions": (
        "`invalid` says what cut-off responses do to the advantages of others: TRL counts them, which is `keep`; the "
        "default here is the paper's `exclude`"
    ),
    "entropy_coef": "the mean entropy of text steps, whatever the loss type; latent steps have none",
    "log_completions": "Parquet files in both",
    "num_completions_to_print": "0 prints none; `null` in TRL prints all",
}  # fmt: skip
TEXT = f"""# Options of TRL

Every option of `GRPOConfig` of TRL {VERSION}, written by `python docs/trl.py docs/trl.md`. An option with TRL's name
has TRL's meaning, and `latent: false` is TRL's algorithm: `tests/trainer/update/test_trl.py` compares losses and
gradients with `GRPOTrainer._compute_loss`, for every loss type, to 1e-5. For TRL's defaults on text, set
`latent: false`, `delta: null`, `invalid: keep`, `group_filter: false`, `temperature: 1.0`, `top_p: 1.0` and `top_k: 0`.

Two defaults are not in the table: `group_filter` drops groups of equal rewards and samples again, where TRL trains on
what it has; `freeze_embeddings` keeps the embedding table.

## The same name

A default in bold differs.

| option | TRL | here | |
| --- | --- | --- | --- |
"""
MISSING = """
## Not here

The command line answers with the same words.

| option of TRL | use |
| --- | --- |
"""


def shown(value: Any) -> str:
    """Return a value as YAML has it."""
    words = {None: "null", True: "true", False: "false"}
    return f"`{words[value] if value is None or isinstance(value, bool) else value}`"


def page() -> str:
    """Return the page in Markdown."""
    own = {item.name: default_of(item) for item in fields(LatentGRPOConfig)}
    rows = []
    for name, default in SHARED.items():
        differs = own[name] != default or type(own[name]) is not type(default)
        here = f"**{shown(own[name])}**" if differs else shown(own[name])
        rows.append(f"| `{name}` | {shown(default)} | {here} | {NOTES.get(name, '')} |")
    by_hint: dict[str, list[str]] = {}
    for name, hint in HINTS.items():
        by_hint.setdefault(hint, []).append(f"`{name}`")
    missing = [f"| {', '.join(names)} | {hint} |" for hint, names in by_hint.items()]
    return TEXT + "\n".join(rows) + "\n" + MISSING + "\n".join(missing) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(prog="python docs/trl.py", description=__doc__)
    parser.add_argument("file", type=Path, help="Markdown file to write")
    parser.parse_args(arguments).file.write_text(page())


if __name__ == "__main__":
    main()
