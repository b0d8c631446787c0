"""Every option of the trainer, with its meaning. Names are TRL's `GRPOConfig` names wherever TRL has one."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml


class ConfigError(ValueError):
    """An option or configuration file that cannot be used, in one line with the remedy."""


SINKS = ("tensorboard", "wandb", "trackio")


def check_choices(config: Any) -> None:
    """ConfigError for an option that is not one of the choices that its annotation names, or no list where one is due.

    A configuration file and Python code may say anything; command-line flags are checked by their parser too.
    """
    kinds = get_type_hints(type(config))
    for option in fields(config):
        value, kind = getattr(config, option.name), kinds[option.name]
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        require(not choices or value in choices, option.name, value, f"choose of {', '.join(map(str, choices))}")
        listed = any(get_origin(part) is list for part in (kind, *get_args(kind)))
        require(not listed or value is None or isinstance(value, list), option.name, value, "give a list")


def option(default: Any, help: str) -> Any:
    """A dataclass field with its documentation."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class SamplingOptions:
    """How a response is sampled."""

    latent: bool = option(True, "Reason in latent steps; False is plain text through the same code.")
    latent_top_k: int = option(10, "Mixture size K of a latent step; match the warm start's.")
    latent_top_p: float = option(0.95, "Nucleus mass of latent candidates.")
    tau: float = option(1.0, "Gumbel-softmax temperature of the mixture weights.")
    noise: Literal["one_sided", "two_sided", "none"] = option("one_sided", "Noise of latent steps while sampling.")
    noise_scale: float = option(1.0, "Factor on the noise.")
    temperature: float = option(0.6, "Sampling temperature of text tokens; 0 is greedy.")
    top_p: float = option(0.95, "Nucleus mass of text tokens.")
    top_k: int = option(30, "Candidates of text tokens; 0 is all.")
    cuda_graphs: bool = option(
        True, "Decode in captured CUDA graphs on a GPU, whose cache then stays between rollouts."
    )

    def check(self) -> None:
        """Raise ConfigError for the first option out of range."""
        require(self.latent_top_k >= 2, "latent_top_k", self.latent_top_k, "a mixture needs at least 2 components")
        require(0 <= self.latent_top_p <= 1, "latent_top_p", self.latent_top_p, "give a mass between 0 and 1")
        require(self.tau > 0, "tau", self.tau, "give a positive temperature")
        require(self.noise_scale >= 0, "noise_scale", self.noise_scale, "give 0 or more")
        require(self.temperature >= 0, "temperature", self.temperature, "give 0 (greedy) or more")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "give a mass in (0, 1]")
        require(self.top_k >= 0, "top_k", self.top_k, "give 0 (all) or more")


@dataclass
class LatentSampling(SamplingOptions):
    """Sampling options of `generate_latent`, with the ids that it needs of the tokenizer."""

    max_new_tokens: int = option(128, "Limit of a response, latent and text steps together.")
    end_token_id: int | None = option(None, "First token of the end marker; needed for latent responses.")
    eos_token_id: tuple[int, ...] | int | None = option(None, "Ids that end a response; default: the model's.")
    seed: int = option(0, "Seed of the noise streams.")


@dataclass
class ModelOptions:
    """Which model, in what precision, on what device."""

    model_name_or_path: str = option("", "Model folder or Hub name.")
    end_marker: str = option("</think>", "Text whose first token ends a latent run.")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "Precision of the parameters.")
    device: str | None = option(None, "Device; default: the GPU if there is one.")
    use_peft: bool = option(
        False, "Train LoRA adapters alone. Checkpoints hold the adapters; the finished model has them merged."
    )
    lora_r: int = option(16, "Rank of the adapters.")
    lora_alpha: int = option(32, "Scale of the adapters, over the rank.")
    lora_target_modules: list[str] | None = option(
        None, "Linear layers with adapters, or all-linear; default: PEFT's choice for the model."
    )

    def check_model(self) -> None:
        """Raise ConfigError for the first option out of range."""
        require(self.lora_r >= 1, "lora_r", self.lora_r, "give 1 or more")
        require(self.lora_alpha >= 1, "lora_alpha", self.lora_alpha, "give 1 or more")


@dataclass
class DataOptions:
    """Which rows."""

    dataset: str = option("", "Training data: JSON, JSONL or Parquet file, or Hub name (name:config).")
    dataset_split: str = option("train", "Split of a Hub dataset.")
    prompt_column: str | None = option(None, "Column of the question, for data in no known format.")
    answer_column: str | None = option(None, "Column of the answer, for data in no known format.")
    chain_column: str | None = option(None, "Column of the chain of thought, for data in no known format.")
    limit: int | None = option(None, "Use only the first rows.")


@dataclass
class RunOptions:
    """What every training run has."""

    output_dir: str = option("runs/latent", "Folder for checkpoints and metrics.")
    seed: int = option(0, "Seed of data order, sampling and noise.")
    optim: Literal["adamw_torch", "adamw_8bit"] = option(
        "adamw_torch", "Optimizer; adamw_8bit keeps its state in 8 bits (bitsandbytes)."
    )
    master_weights: bool = option(
        True, "Float32 copies, gradients and optimizer state of 16-bit parameters; without, 10 bytes a parameter are "
        "saved, and updates under the parameters' precision lost.",
    )  # fmt: skip
    gradient_checkpointing: bool = option(
        False, "Keep only the inputs of decoder layers for the backward pass, which computes the rest again."
    )
    learning_rate: float = option(1e-6, "Peak learning rate of AdamW.")
    lr_scheduler_type: str = option("constant_with_warmup", "A transformers scheduler name.")
    warmup_steps: int = option(0, "Optimizer steps of linear warm-up.")
    weight_decay: float = option(0.0, "AdamW weight decay.")
    adam_beta1: float = option(0.9, "AdamW beta1.")
    adam_beta2: float = option(0.999, "AdamW beta2.")
    max_grad_norm: float = option(1.0, "Gradient clipping norm; 0 is none.")
    per_device_train_batch_size: int = option(32, "Responses in one forward and backward pass of a process.")
    gradient_accumulation_steps: int = option(1, "Such passes an optimizer step, in every process.")
    max_steps: int = option(-1, "Steps; -1 goes by num_train_epochs.")
    num_train_epochs: float = option(1.0, "Passes over the data where max_steps is -1.")
    max_prompt_length: int | None = option(None, "Longest prompt in tokens; a longer one is an error.")
    max_completion_length: int = option(128, "Limit of a response, latent and text steps together.")
    logging_steps: int = option(1, "Steps between lines of metrics.")
    save_steps: int = option(500, "Steps between checkpoints; 0 saves at the end only.")
    save_total_limit: int | None = option(None, "Checkpoints kept, the newest; null keeps all.")
    resume_from_checkpoint: str | None = option(
        None, "A checkpoint folder of this run, or true for the newest in output_dir."
    )
    log_table: bool = option(True, "A line of figures on the terminal at every logged step.")
    report_to: list[str] = option([], "Extra sinks of metrics: tensorboard, wandb, trackio.")
    project: str = option("latent-grpo", "Project name in wandb and trackio.")
    run_name: str | None = option(None, "Name of the run in wandb and trackio; default: output_dir's.")

    def update_size(self, processes: int) -> int:
        """Responses (of `sft`, examples) an optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * processes

    def check_run(self) -> None:
        """Raise ConfigError for the first option out of range."""
        check_choices(self)
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "max_completion_length"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "give 1 or more")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "give a positive rate")
        require(self.max_steps != 0, "max_steps", self.max_steps, "give 1 or more, or -1 to go by epochs")
        limit = self.save_total_limit
        require(limit is None or limit >= 1, "save_total_limit", limit, "give 1 or more, or null for all")
        require(0 <= self.seed < 2**32, "seed", self.seed, "give 0 or more, below 2**32")
        require(self.logging_steps >= 1, "logging_steps", self.logging_steps, "give 1 or more")
        for name in ("save_steps", "warmup_steps", "weight_decay"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "give 0 or more")
        require(self.max_grad_norm >= 0, "max_grad_norm", self.max_grad_norm, "give a positive norm, or 0 for none")
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "give 0 or more, below 1")
        require(self.num_train_epochs > 0, "num_train_epochs", self.num_train_epochs, "give a positive number")
        for sink in self.report_to:
            require(sink in SINKS, "report_to", sink, f"choose of {', '.join(SINKS)}")


@dataclass
class LatentSFTConfig(RunOptions, DataOptions, ModelOptions):
    """Latent-SFT, the warm start: chain-of-thought tokens become latent targets (arXiv 2510.15522)."""

    latent: bool = option(True, "False keeps the chain as text: the warm start of the text baseline.")
    learning_rate: float = option(1e-5, "Peak learning rate of AdamW.")
    compression: int = option(2, "Consecutive chain tokens that one latent step stands for.")
    gumbel_scale: float = option(0.0, "Gumbel noise on the latent inputs (0 is none), a step towards sampled mixtures.")
    answer_template: str = option("\\boxed{{{answer}}}", "Text of the visible answer, a Python format of {answer}.")
    freeze_embeddings: bool = option(False, "Keep the embedding table (and a tied head) as it is.")

    def __post_init__(self) -> None:
        self.check_run()
        self.check_model()
        require(1 <= self.compression <= 4096, "compression", self.compression, "give 1 to 4096 tokens")
        require(self.gumbel_scale >= 0, "gumbel_scale", self.gumbel_scale, "give 0 or more")
        require("{answer}" in self.answer_template, "answer_template", self.answer_template, "it must hold {answer}")


@dataclass
class LatentGRPOConfig(SamplingOptions, RunOptions, DataOptions, ModelOptions):
    """Latent-GRPO. Defaults are the paper's, at a batch that a small card takes."""

    reward_funcs: list[str] = option(
        ["accuracy"], "Rewards: accuracy, exact_match, soft_overlong (DAPO), module:function, file.py:function."
    )
    reward_weights: list[float] | None = option(None, "Weights of the rewards; default 1 each.")
    soft_punish_cache: int | None = option(
        None, "Last steps before the limit, over which soft_overlong falls from 0 to -1; default a fifth of the limit."
    )
    eval_dataset: str | None = option(None, "Evaluation data, as dataset.")
    eval_steps: int = option(0, "Steps between evaluations; 0 is none.")
    eval_limit: int | None = option(None, "Use only the first evaluation rows.")
    num_generations: int = option(8, "Responses a prompt, G.")
    generation_batch_size: int = option(64, "Responses a rollout, prompts times G.")
    rollout_memory: float | None = option(
        None, "GiB of key-value cache a rollout may take; responses beyond it wait for a free slot. Default: no bound."
    )
    num_iterations: int = option(1, "Passes over a rollout (PPO epochs).")
    micro_batch_tokens: int | None = option(
        None, "Tokens, padding included, in one forward and backward pass, in place of per_device_train_batch_size."
    )
    group_filter: bool = option(True, "Drop groups whose rewards are all equal and sample again (dynamic sampling).")
    max_generation_batches: int = option(50, "Rollouts a step at most; then train on what there is.")
    invalid: Literal["exclude", "zero", "keep"] = option(
        "exclude", "Responses cut off by the limit, see group_advantages."
    )
    first_token: Literal["best_of_correct", "best_of_group", "all"] = option(
        "best_of_correct", "Whose advantage counts at the first response step."
    )
    scale_rewards: Literal["group", "batch", "none"] = option(
        "group", "Divide advantages by the standard deviation of the group's or of the batch's rewards, or not."
    )
    margin_gradient: Literal["aligned", "released", "none"] = option("aligned", "Backward coefficient past the target.")
    loss_on: Literal["all", "latent", "text"] = option("all", "Response steps that carry the policy loss.")
    loss_type: Literal["dapo", "grpo", "dr_grpo", "bnpo", "gspo", "cispo"] = option(
        "dapo",
        "dapo: mean over the tokens of an update; bnpo: of a forward and backward pass; grpo: over responses of their "
        "token means; dr_grpo: token sums over the limit; gspo: grpo with importance_sampling_level sequence; cispo: "
        "dapo with a clipped weight on the log-prob, so that no token loses its gradient.",
    )
    importance_sampling_level: Literal["token", "sequence"] = option(
        "token", "Ratio of a token, or the geometric mean over its response (GSPO; epsilon 3e-4, epsilon_high 4e-4)."
    )
    epsilon: float = option(0.2, "Clip below.")
    epsilon_high: float | None = option(
        None, "Clip above; default epsilon. With cispo the largest weight itself; default 5."
    )
    delta: float | None = option(3.0, "Dual clip of negative advantages; null is none.")
    beta: float = option(0.0, "Coefficient of the KL to the initial model, which is loaded only if this is above 0.")
    kl_estimator: Literal["k1", "k2", "k3"] = option(
        "k3", "Estimate of the KL from samples: log-ratio, half its square, or k3 (positive, low variance)."
    )
    entropy_coef: float = option(0.0, "Coefficient of the entropy of text tokens, a bonus that keeps them exploring.")
    old_logprobs: Literal["recompute", "rollout"] = option("recompute", "Old log-probs: by the trainer, or as sampled.")
    max_logprob_gap: float = option(
        0.05, "Mean gap between sampled and recomputed log-probs, in nats, above which a warning says so."
    )
    importance_sampling_cap: float | None = option(
        None, "Weigh advantages by the recomputed over the sampled probability, at most this (TIS); null is none."
    )
    freeze_embeddings: bool = option(True, "Keep the embedding table (and a tied head) as it is.")
    log_completions: bool = option(
        False, "Write the responses of every logged step to output_dir/completions, as Parquet."
    )
    num_completions_to_print: int = option(0, "Responses printed at every logged step.")

    def __post_init__(self) -> None:
        self.check()
        self.check_run()
        self.check_model()
        remedy = "a group of one has no advantage; give 2 or more"
        require(self.num_generations >= 2, "num_generations", self.num_generations, remedy)
        require(self.num_iterations >= 1, "num_iterations", self.num_iterations, "give 1 or more")
        require(self.eval_steps >= 0, "eval_steps", self.eval_steps, "give 0 (none) or more")
        shown = self.num_completions_to_print
        require(shown >= 0, "num_completions_to_print", shown, "give 0 (none) or more")
        for name in ("rollout_memory", "micro_batch_tokens", "max_logprob_gap", "importance_sampling_cap"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "give a positive number")
        require(
            self.importance_sampling_cap is None or self.old_logprobs == "recompute",
            "importance_sampling_cap", self.importance_sampling_cap, "it needs old_logprobs recompute",
        )  # fmt: skip
        whole = self.generation_batch_size >= 1 and self.generation_batch_size % self.num_generations == 0
        remedy = f"give a multiple of num_generations {self.num_generations}"
        require(whole, "generation_batch_size", self.generation_batch_size, remedy)
        require(
            self.max_generation_batches >= 1, "max_generation_batches", self.max_generation_batches, "give 1 or more"
        )
        require(
            not (self.latent and self.noise == "none"), "noise", self.noise, "latent training needs noise to explore"
        )
        require(
            self.temperature > 0, "temperature", self.temperature, "training needs sampled text; 0 is for evaluation"
        )
        self.check_loss()

    def check_loss(self) -> None:
        """Raise ConfigError for the first option of the loss or the rewards out of range."""
        require(0 <= self.epsilon <= 1, "epsilon", self.epsilon, "give a share between 0 and 1")
        high, lowest = self.epsilon_high, 1.0 if self.loss_type == "cispo" else 0.0
        remedy = "cispo's largest weight is 1 or more" if lowest else "give 0 or more, or null for epsilon"
        require(high is None or high >= lowest, "epsilon_high", high, remedy)
        require(self.delta is None or self.delta > 1, "delta", self.delta, "give more than 1, or null for none")
        require(self.beta >= 0, "beta", self.beta, "give 0 (no reference model) or more")
        require(self.entropy_coef >= 0, "entropy_coef", self.entropy_coef, "give 0 (no bonus) or more")
        cache = self.soft_punish_cache
        inside = cache is None or 1 <= cache <= self.max_completion_length
        require(inside, "soft_punish_cache", cache, "give 1 step to max_completion_length, or null for a fifth of it")

    def sampling(self) -> LatentSampling:
        """The sampling options alone."""
        return LatentSampling(
            **{f.name: getattr(self, f.name) for f in fields(SamplingOptions)},
            max_new_tokens=self.max_completion_length,
        )


@dataclass
class CompareConfig:
    """A comparison: warm starts, methods and ablations over several seeds."""

    output_dir: str = option("runs/compare", "Folder of runs, table and figure; finished runs in it are kept.")
    seeds: list[int] = option([0, 1, 2], "Seeds; each has its own warm starts and problems.")
    arms: list[str] = option([], "Arms to run; default: all of them.")
    sft_config: str | None = option(None, "YAML of the warm starts, options of `sft`; default: the quickstart's.")
    grpo_config: str | None = option(None, "YAML of the reinforcement, options of `train`; given with sft_config.")
    sft_steps: int = option(0, "Steps of a warm start; 0 is as configured.")
    grpo_steps: int = option(0, "Steps of a reinforced run; 0 is as configured.")
    train_problems: int = option(20_000, "Problems to train on, of the quickstart's world.")
    held_out_problems: int = option(1000, "Problems to evaluate on, of the quickstart's world.")
    watched_problems: int = option(200, "Held-out problems that a run evaluates every eval_steps, for its curve.")
    num_samples: int = option(4, "Sampled responses a held-out problem, for Pass@1 under noise.")
    workers: int = option(1, "Runs at a time, a process each.")
    threads: int = option(1, "CPU threads of a run; figures depend on their number.")

    def __post_init__(self) -> None:
        for name in ("train_problems", "held_out_problems", "watched_problems", "num_samples", "workers", "threads"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "give 1 or more")
        for name in ("sft_steps", "grpo_steps"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "give 1 or more, or 0 for those configured")
        require(len(self.seeds) > 0, "seeds", self.seeds, "give at least one")
        require(len(set(self.seeds)) == len(self.seeds), "seeds", self.seeds, "give each once")


def require(holds: bool, name: str, value: Any, remedy: str) -> None:
    """ConfigError naming the option and its value unless `holds`."""
    if not holds:
        raise ConfigError(f"{name} is {value!r}: {remedy}")


def unknown_key(key: str, known: list[str]) -> str:
    """A sentence about an unknown key, with the nearest known one."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"unknown option {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def read_yaml(path: str, config_class: type) -> dict[str, Any]:
    """Options from a YAML file or a named recipe; ConfigError for unknown keys and files that are not a mapping."""
    named = resources.files("latent_grpo.recipes") / f"{path}.yaml"
    try:
        text = named.read_text() if named.is_file() and not Path(path).exists() else Path(path).read_text("utf-8")
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read the config {path!r}: {error.__class__.__name__}; recipes: {recipes()}"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of options, got {type(values).__name__}")
    known = [f.name for f in fields(config_class)]
    for key in values:
        if key not in known:
            raise ConfigError(f"{path}: {unknown_key(str(key), known)}")
    return values


def recipes() -> str:
    """Names of the shipped recipes."""
    folder = resources.files("latent_grpo.recipes")
    return ", ".join(sorted(p.name[:-5] for p in folder.iterdir() if p.name.endswith(".yaml")))
