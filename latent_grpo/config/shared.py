"""The options that several commands share: model, adapters, data, optimizer, and the run itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from latent_grpo.config.fields import (
    BELOW_ONE,
    NON_NEGATIVE,
    ONE_OR_MORE,
    POSITIVE,
    RATE,
    SHARE,
    Range,
    check_options,
    option,
)
from latent_grpo.errors import require

SINKS = ("tensorboard", "wandb", "trackio")


@dataclass
class ModelOptions:
    """Which model is used, in what precision, on what device."""

    model_name_or_path: str = option("", "Model folder or Hub name.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        "Precision of the parameters, whatever that of the model's files is, and of the models that are saved. auto: "
        "bfloat16 on CUDA, float32 on a CPU.",
    )
    device: str | None = option(None, "Device. Default: the GPU if there is one.")


@dataclass
class AdapterOptions:
    """LoRA adapters."""

    use_peft: bool = option(
        False, "Train only LoRA adapters. Checkpoints hold the adapters; the finished model has them merged."
    )
    lora_r: int = option(16, "Rank of the adapters.", ONE_OR_MORE)
    lora_alpha: int = option(32, "Scale of the adapters, divided by the rank.", ONE_OR_MORE)
    lora_target_modules: list[str] | None = option(
        None, "Linear layers with adapters, or all-linear. Default: PEFT's choice for the model."
    )


@dataclass
class DataOptions:
    """Where the training data comes from and which columns are read."""

    dataset: str = option(
        "", "Training data: JSON, JSONL or Parquet file, or Hub name (name:config or owner/name:file)."
    )
    dataset_split: str = option("train", "Split of a Hub dataset.")
    prompt_column: str | None = option(None, "Column of the question, for data in an unknown format.")
    answer_column: str | None = option(None, "Column of the answer, for data in an unknown format.")
    chain_column: str | None = option(None, "Column of the chain of thought, for data in an unknown format.")
    limit: int | None = option(None, "Use only the first rows.", ONE_OR_MORE)
    expected_columns: list[str] = option([], "Columns without which dataset is another set than was meant, an error.")
    deduplicate: bool = option(False, "Keep only the first row of each prompt of dataset.")
    repeated_prompts: float = option(
        0.1, "Share of repeated prompts in dataset, above which a warning names them.", SHARE
    )


@dataclass
class OptimizerOptions:
    """The optimizer, its schedule, and the size of an update."""

    optim: Literal["adamw_torch", "adamw_8bit"] = option(
        "adamw_torch", "Optimizer. adamw_8bit keeps its state in 8 bits (bitsandbytes)."
    )
    master_weights: bool = option(
        True,
        "Keep float32 copies, gradients and optimizer state of 16-bit parameters. Without them, 10 bytes per parameter "
        "are saved and updates below the parameters' precision are lost.",
    )
    gradient_checkpointing: bool = option(
        False, "Keep only the inputs of decoder layers for the backward pass, which computes the rest again."
    )
    learning_rate: float = option(1e-6, "Peak learning rate of AdamW.", RATE)
    lr_scheduler_type: str = option("constant_with_warmup", "Name of a transformers scheduler.")
    warmup_steps: int = option(0, "Optimizer steps of linear warm-up.", NON_NEGATIVE)
    warmup_ratio: float = option(0.0, "Share of all optimizer steps that is warm-up, in place of warmup_steps.", SHARE)
    weight_decay: float = option(0.0, "AdamW weight decay.", Range(0, 10))
    adam_beta1: float = option(0.9, "AdamW beta1.", BELOW_ONE)
    adam_beta2: float = option(0.999, "AdamW beta2.", BELOW_ONE)
    max_grad_norm: float = option(1.0, "Gradient clipping norm. 0 does not clip.", NON_NEGATIVE)
    per_device_train_batch_size: int = option(32, "Responses per forward and backward pass, per process.", ONE_OR_MORE)
    gradient_accumulation_steps: int = option(
        1, "Forward and backward passes per optimizer step, in every process.", ONE_OR_MORE
    )


@dataclass
class RunOptions(OptimizerOptions):
    """How long a run is, what it writes and what it shows."""

    output_dir: str = option("runs/latent", "Folder for checkpoints and metrics.")
    overwrite: bool = option(False, "Remove the run that output_dir holds, and start anew.")
    seed: int = option(0, "Seed of data order, sampling and noise.", Range(0, 2**32, open_high=True))
    max_steps: int = option(
        -1,
        "Optimizer steps after which training ends, in the middle of a rollout if need be. -1 sets no limit.",
        Range(-1),
    )
    num_train_epochs: float = option(
        1.0, "Passes over the data. They count where max_steps (of train: and max_rollouts) is -1.", POSITIVE
    )
    max_prompt_length: int | None = option(
        None, "Longest prompt in tokens. Longer ones are counted before the first step.", ONE_OR_MORE
    )
    long_prompts: Literal["error", "drop"] = option(
        "error", "What becomes of prompts over max_prompt_length. drop leaves their rows out, error ends the run."
    )
    max_completion_length: int = option(128, "Limit of a response, latent and text steps together.", ONE_OR_MORE)
    logging_steps: int = option(1, "Steps between lines of metrics.", ONE_OR_MORE)
    save_steps: int = option(500, "Steps between checkpoints. 0 saves only at the end.", NON_NEGATIVE)
    save_total_limit: int | None = option(None, "Newest checkpoints that are kept. null keeps all.", ONE_OR_MORE)
    resume_from_checkpoint: str | None = option(
        None, "A checkpoint folder of this run, true for the newest in output_dir, or auto to start or continue."
    )
    save_failure: Literal["stop", "continue"] = option(
        "stop", "What a checkpoint that could not be written, as on a full disk, does to the run."
    )
    max_skipped_updates: int = option(
        5, "Updates in a row with gradients that are not finite, after which the run stops.", ONE_OR_MORE
    )
    max_hours: float | None = option(
        None, "Hours of training, after which the run saves and stops. A slow step or save has its time.", POSITIVE
    )
    log_table: bool = option(True, "Print a line of metrics at every logged step.")
    report_to: list[str] = option([], "Extra sinks of metrics: tensorboard, wandb, trackio.")
    project: str = option("latent-grpo", "Project name in wandb and trackio.")
    run_name: str | None = option(None, "Name of the run in wandb and trackio. Default: output_dir's.")

    def update_size(self, processes: int) -> int:
        """Return the responses (for `sft`, the examples) per optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * processes

    def warmup_of(self, total_steps: int) -> int:
        """Return the optimizer steps of warm-up in a run of `total_steps`."""
        return self.warmup_steps or math.ceil(self.warmup_ratio * total_steps)

    def check_run(self) -> None:
        """Raise ConfigError for the first option that cannot be used."""
        check_options(self)
        one_warmup = not (self.warmup_steps and self.warmup_ratio)
        require(one_warmup, "warmup_ratio", self.warmup_ratio, f"warmup_steps is {self.warmup_steps}; give only one")
        require(self.max_steps != 0, "max_steps", self.max_steps, "give 1 or more, or -1 to go by epochs")
        fresh = not (self.overwrite and self.resume_from_checkpoint)
        require(fresh, "overwrite", self.overwrite, "resume_from_checkpoint continues the run; give only one")
        bounded = self.long_prompts == "error" or self.max_prompt_length is not None
        require(bounded, "long_prompts", self.long_prompts, "it needs max_prompt_length")
        for sink in self.report_to:
            require(sink in SINKS, "report_to", sink, f"choose from {', '.join(SINKS)}")
