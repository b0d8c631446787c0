"""Every option of the trainer, with its meaning and its range. Names are those of TRL's `GRPOConfig` where it has one.

Options stand in small dataclasses by subject. The configurations of `train`, `sft` and `compare` inherit the ones they
need, and `--help` and docs/options.md show the options in the same groups. After a change here, run
`python docs/options.py docs/options.md`. An option that may change when a run resumes also belongs into
`saving/run_identity.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields
from numbers import Real
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from latent_grpo.errors import require

SINKS = ("tensorboard", "wandb", "trackio")


@dataclass(frozen=True)
class Range:
    """The values that a number may take. Bounds belong to the range unless they are open."""

    low: float | None = None
    high: float | None = None
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: Any) -> bool:
        """Return whether a value is in the range. NaN never is."""
        above = self.low is None or (value > self.low if self.open_low else value >= self.low)
        below = self.high is None or (value < self.high if self.open_high else value <= self.high)
        return above and below and value == value

    def __str__(self) -> str:
        """Return the range in words, as `0 to 1` or `0 or more, below 1`."""
        if None not in (self.low, self.high) and not (self.open_low or self.open_high):
            return f"{self.low} to {self.high}"
        words = []
        if self.low is not None:
            words.append(f"above {self.low:g}" if self.open_low else f"{self.low:g} or more")
        if self.high is not None:
            words.append(f"below {self.high}" if self.open_high else f"at most {self.high}")
        return ", ".join(words)


POSITIVE, NON_NEGATIVE, ONE_OR_MORE = Range(0, open_low=True), Range(0), Range(1)
SHARE, BELOW_ONE = Range(0, 1), Range(0, 1, open_high=True)


def option(default: Any, help: str, range: Range | None = None) -> Any:
    """Return a dataclass field with its documentation and, for a number, its range."""
    metadata = {"help": help, "range": range}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check_options(config: Any) -> None:
    """Raise ConfigError for the first option that is no choice of its annotation, no list, no number or out of range.

    Configuration files and Python code can hold any value, so the command line's own checks are not enough.
    """
    kinds = get_type_hints(type(config))
    for item in fields(config):
        name, value, kind = item.name, getattr(config, item.name), kinds[item.name]
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        require(not choices or value in choices, name, value, f"choose from {', '.join(map(str, choices))}")
        if value is None:
            require(NoneType in get_args(kind), name, value, "give a value")
            continue
        listed = any(get_origin(alternative) is list for alternative in (kind, *get_args(kind)))
        require(not listed or isinstance(value, list), name, value, "give a list")
        allowed = item.metadata.get("range")
        if allowed is not None:
            if isinstance(value, Real) and hasattr(value, "item"):
                value = value.item()  # a NumPy number, which no checkpoint could write as JSON
                setattr(config, name, value)
            is_number = isinstance(value, Real) and not isinstance(value, bool)
            require(is_number and allowed.holds(value), name, value, f"give a number, {allowed}")


@dataclass
class SamplingOptions:
    """How a response is sampled."""

    latent: bool = option(True, "Reason in latent steps. False gives plain text through the same code.")
    latent_top_k: int = option(10, "Mixture size K of a latent step. Keep it near compression of sft.", Range(2))
    latent_top_p: float = option(0.95, "Nucleus mass of latent candidates.", SHARE)
    tau: float = option(1.0, "Gumbel-softmax temperature of the mixture weights.", POSITIVE)
    noise: Literal["one_sided", "two_sided", "none"] = option("one_sided", "Noise of latent steps while sampling.")
    noise_scale: float = option(1.0, "Factor on the noise.", NON_NEGATIVE)
    temperature: float = option(0.6, "Sampling temperature of text tokens. 0 is greedy.", NON_NEGATIVE)
    top_p: float = option(0.95, "Nucleus mass of text tokens.", Range(0, 1, open_low=True))
    top_k: int = option(30, "Candidates of text tokens. 0 keeps all.", NON_NEGATIVE)
    cuda_graphs: bool = option(
        True, "Decode in captured CUDA graphs on a GPU. Their cache then stays allocated between rollouts."
    )

    def check(self) -> None:
        """Raise ConfigError for the first option that cannot be used."""
        check_options(self)


@dataclass
class LatentSampling(SamplingOptions):
    """Sampling options of `generate_latent`, with the ids that it needs from the tokenizer."""

    max_new_tokens: int = option(128, "Limit of a response, latent and text steps together.")
    end_token_id: int | None = option(None, "First token of the end marker. Latent responses need it.")
    eos_token_id: tuple[int, ...] | int | None = option(None, "Ids that end a response. Default: the model's.")
    seed: int = option(0, "Seed of the noise streams.")


@dataclass
class ModelOptions:
    """Which model is used, in what precision, on what device."""

    model_name_or_path: str = option("", "Model folder or Hub name.")
    end_marker: str = option("</think>", "Text whose first token ends a latent run.")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "Precision of the parameters.")
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

    dataset: str = option("", "Training data: JSON, JSONL or Parquet file, or Hub name (name:config).")
    dataset_split: str = option("train", "Split of a Hub dataset.")
    prompt_column: str | None = option(None, "Column of the question, for data in an unknown format.")
    answer_column: str | None = option(None, "Column of the answer, for data in an unknown format.")
    chain_column: str | None = option(None, "Column of the chain of thought, for data in an unknown format.")
    limit: int | None = option(None, "Use only the first rows.")


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
    learning_rate: float = option(1e-6, "Peak learning rate of AdamW.", POSITIVE)
    lr_scheduler_type: str = option("constant_with_warmup", "Name of a transformers scheduler.")
    warmup_steps: int = option(0, "Optimizer steps of linear warm-up.", NON_NEGATIVE)
    weight_decay: float = option(0.0, "AdamW weight decay.", NON_NEGATIVE)
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
    seed: int = option(0, "Seed of data order, sampling and noise.", Range(0, 2**32, open_high=True))
    max_steps: int = option(-1, "Steps. -1 goes by num_train_epochs.")
    num_train_epochs: float = option(1.0, "Passes over the data where max_steps is -1.", POSITIVE)
    max_prompt_length: int | None = option(None, "Longest prompt in tokens. A longer prompt is an error.")
    max_completion_length: int = option(128, "Limit of a response, latent and text steps together.", ONE_OR_MORE)
    logging_steps: int = option(1, "Steps between lines of metrics.", ONE_OR_MORE)
    save_steps: int = option(500, "Steps between checkpoints. 0 saves only at the end.", NON_NEGATIVE)
    save_total_limit: int | None = option(None, "Newest checkpoints that are kept. null keeps all.", ONE_OR_MORE)
    resume_from_checkpoint: str | None = option(
        None, "A checkpoint folder of this run, or true for the newest in output_dir."
    )
    log_table: bool = option(True, "Print a line of metrics at every logged step.")
    report_to: list[str] = option([], "Extra sinks of metrics: tensorboard, wandb, trackio.")
    project: str = option("latent-grpo", "Project name in wandb and trackio.")
    run_name: str | None = option(None, "Name of the run in wandb and trackio. Default: output_dir's.")

    def update_size(self, processes: int) -> int:
        """Return the responses (for `sft`, the examples) per optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * processes

    def check_run(self) -> None:
        """Raise ConfigError for the first option that cannot be used."""
        check_options(self)
        require(self.max_steps != 0, "max_steps", self.max_steps, "give 1 or more, or -1 to go by epochs")
        for sink in self.report_to:
            require(sink in SINKS, "report_to", sink, f"choose from {', '.join(SINKS)}")


@dataclass
class LatentSFTConfig(RunOptions, DataOptions, AdapterOptions, ModelOptions):
    """The warm start: chain-of-thought tokens become latent targets (arXiv 2510.15522)."""

    latent: bool = option(True, "False keeps the chain as text: the warm start of the text baseline.")
    learning_rate: float = option(1e-5, "Peak learning rate of AdamW.", POSITIVE)
    compression: int = option(2, "Consecutive chain tokens per latent step.", Range(1, 4096))
    gumbel_scale: float = option(0.0, "Scale of the Gumbel noise on latent inputs. 0 adds none.", NON_NEGATIVE)
    answer_template: str = option("\\boxed{{{answer}}}", "Text of the visible answer, a Python format of {answer}.")
    freeze_embeddings: bool = option(False, "Keep the embedding table (and a tied head) as it is.")

    def __post_init__(self) -> None:
        self.check_run()
        require("{answer}" in self.answer_template, "answer_template", self.answer_template, "it must hold {answer}")


@dataclass
class RewardOptions:
    """What a response is worth."""

    reward_funcs: list[str] = option(
        ["accuracy"], "Rewards: accuracy, exact_match, soft_overlong (DAPO), module:function, file.py:function."
    )
    reward_weights: list[float] | None = option(None, "Weights of the rewards. Default: 1 each.")
    soft_punish_cache: int | None = option(
        None,
        "Last steps before the limit, over which soft_overlong falls from 0 to -1. Default: a fifth of the limit.",
        ONE_OR_MORE,
    )


@dataclass
class RolloutOptions:
    """How many responses are sampled, and which groups are kept."""

    num_generations: int = option(8, "Responses per prompt, G.", Range(2))
    generation_batch_size: int = option(64, "Responses per rollout: prompts times G.", ONE_OR_MORE)
    rollout_memory: float | None = option(
        None,
        "GiB of key-value cache that a rollout may take. Further responses wait for a free slot. Default: no bound.",
        POSITIVE,
    )
    group_filter: bool = option(True, "Drop groups whose rewards are all equal and sample again (dynamic sampling).")
    max_generation_batches: int = option(
        50, "Most rollouts per step. Afterwards the step trains on the groups it has.", ONE_OR_MORE
    )


@dataclass
class AdvantageOptions:
    """How rewards become advantages."""

    invalid: Literal["exclude", "zero", "keep"] = option(
        "exclude", "What becomes of responses cut off by the limit, see group_advantages."
    )
    first_token: Literal["best_of_correct", "best_of_group", "all"] = option(
        "best_of_correct", "Whose advantage counts at the first response step."
    )
    scale_rewards: Literal["group", "batch", "none"] = option(
        "group", "Divide advantages by the standard deviation of the group's or of the batch's rewards, or not at all."
    )


@dataclass
class UpdateOptions:
    """The policy loss and its passes over a rollout."""

    loss_type: Literal["dapo", "grpo", "dr_grpo", "bnpo", "gspo", "cispo"] = option(
        "dapo",
        "dapo: mean over the tokens of an update. bnpo: mean over the tokens of a forward and backward pass. grpo: "
        "mean over responses of their token means. dr_grpo: token sums over the limit. gspo: grpo with "
        "importance_sampling_level sequence. cispo: dapo with a clipped weight on the log-prob, so that no token loses "
        "its gradient.",
    )
    loss_on: Literal["all", "latent", "text"] = option("all", "Response steps that carry the policy loss.")
    margin_gradient: Literal["aligned", "released", "none"] = option("aligned", "Backward coefficient past the target.")
    importance_sampling_level: Literal["token", "sequence"] = option(
        "token",
        "Ratio of a token, or the geometric mean over its response (GSPO, with epsilon 3e-4 and epsilon_high 4e-4).",
    )
    epsilon: float = option(0.2, "Clip range below 1.", SHARE)
    epsilon_high: float | None = option(
        None,
        "Clip range above 1. Default: epsilon. With cispo it is the largest weight itself; default 5.",
        NON_NEGATIVE,
    )
    delta: float | None = option(3.0, "Dual clip of negative advantages. null is none.", Range(1, open_low=True))
    beta: float = option(
        0.0, "Coefficient of the KL to the initial model, which is loaded only if this is above 0.", NON_NEGATIVE
    )
    kl_estimator: Literal["k1", "k2", "k3"] = option(
        "k3", "Estimate of the KL from samples: log-ratio, half its square, or k3 (positive, low variance)."
    )
    entropy_coef: float = option(
        0.0, "Coefficient of the entropy of text tokens, a bonus that keeps them exploring.", NON_NEGATIVE
    )
    num_iterations: int = option(1, "Passes over a rollout (PPO epochs).", ONE_OR_MORE)
    micro_batch_tokens: int | None = option(
        None,
        "Tokens, padding included, in one forward and backward pass, in place of per_device_train_batch_size.",
        POSITIVE,
    )
    old_logprobs: Literal["recompute", "rollout"] = option(
        "recompute", "Old log-probs: computed by the trainer, or as sampled."
    )
    max_logprob_gap: float = option(
        0.05, "Mean gap between sampled and recomputed log-probs, in nats, above which a warning is printed.", POSITIVE
    )
    importance_sampling_cap: float | None = option(
        None,
        "Weigh advantages by the recomputed over the sampled probability, at most this (TIS). null is none.",
        POSITIVE,
    )
    freeze_embeddings: bool = option(True, "Keep the embedding table (and a tied head) as it is.")


@dataclass
class WatchingOptions:
    """Evaluation during the run, and the log of responses."""

    eval_dataset: str | None = option(None, "Evaluation data, given like dataset.")
    eval_steps: int = option(0, "Steps between evaluations. 0 evaluates never.", NON_NEGATIVE)
    eval_limit: int | None = option(None, "Use only the first evaluation rows.")
    log_completions: bool = option(
        False, "Write the responses of every logged step to output_dir/completions, as Parquet."
    )
    num_completions_to_print: int = option(0, "Responses printed at every logged step.", NON_NEGATIVE)


@dataclass
class LatentGRPOConfig(
    WatchingOptions,
    UpdateOptions,
    AdvantageOptions,
    RolloutOptions,
    RewardOptions,
    SamplingOptions,
    RunOptions,
    DataOptions,
    AdapterOptions,
    ModelOptions,
):
    """Latent-GRPO. Defaults are the paper's, with a batch that fits a small card."""

    def __post_init__(self) -> None:
        self.check_run()
        latent_without_noise = self.latent and self.noise == "none"
        require(not latent_without_noise, "noise", self.noise, "latent training needs noise to explore")
        require(self.temperature > 0, "temperature", self.temperature, "training needs sampled text; give more than 0")
        whole_groups = self.generation_batch_size % self.num_generations == 0
        remedy = f"give a multiple of num_generations {self.num_generations}"
        require(whole_groups, "generation_batch_size", self.generation_batch_size, remedy)
        cap, recomputed = self.importance_sampling_cap, self.old_logprobs == "recompute"
        require(cap is None or recomputed, "importance_sampling_cap", cap, "it needs old_logprobs recompute")
        high = self.epsilon_high
        bounded = self.loss_type != "cispo" or high is None or high >= 1
        require(bounded, "epsilon_high", high, "cispo's largest weight is 1 or more")
        cache = self.soft_punish_cache
        fits = cache is None or cache <= self.max_completion_length
        require(fits, "soft_punish_cache", cache, "give at most max_completion_length, or null for a fifth of it")

    def sampling(self) -> LatentSampling:
        """Return the sampling options alone."""
        values = {item.name: getattr(self, item.name) for item in fields(SamplingOptions)}
        return LatentSampling(**values, max_new_tokens=self.max_completion_length)


def groups_of(config_class: type) -> Iterator[tuple[type, list[Field[Any]]]]:
    """Yield each dataclass that a configuration is made of, with the options that it introduces.

    An option that a subclass gives a new default stays in the group that introduced it.
    """
    seen: set[str] = set()
    by_name = {item.name: item for item in fields(config_class)}
    for part in reversed(config_class.__mro__[:-1]):
        own = [name for name in inspect.get_annotations(part) if name in by_name and name not in seen]
        seen.update(own)
        if own:
            yield part, [by_name[name] for name in own]
