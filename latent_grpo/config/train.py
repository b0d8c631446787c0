"""The options of Latent-GRPO."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from latent_grpo.config.fields import NON_NEGATIVE, ONE_OR_MORE, POSITIVE, Range, named, option
from latent_grpo.config.prompt import PromptOptions
from latent_grpo.config.sampling import LatentSampling, SamplingOptions
from latent_grpo.config.shared import AdapterOptions, DataOptions, ModelOptions, RunOptions
from latent_grpo.errors import require


@dataclass
class RewardOptions:
    """What a response is worth."""

    reward_funcs: list[str] = option(
        ["accuracy"],
        "Rewards: accuracy, exact_match, soft_overlong (DAPO), module:function, file.py:function, or the folder "
        "or Hub name of a reward model.",
    )
    reward_weights: list[float] | None = option(None, "Weights of the rewards. Default: 1 each.")
    reward_completions: Literal["response", "visible"] = option(
        "response",
        "What rewards get as completions: the whole response as in TRL, each latent step written as its most probable "
        "token, or only the visible text. They always get the latter as visible_text, too.",
    )
    reward_timeout: float | None = option(
        None, "Seconds that one call of a reward function may take before the run stops. null sets no limit.", POSITIVE
    )
    soft_punish_cache: int | None = option(
        None,
        "Last steps before the limit, over which soft_overlong falls from 0 to -1. Default: a fifth of the limit.",
        ONE_OR_MORE,
    )


@dataclass
class RolloutOptions:
    """How many responses are sampled, to which prompts, and which groups are kept."""

    num_generations: int = option(8, "Responses per prompt, G.", Range(2))
    generation_batch_size: int = option(64, "Responses per rollout: prompts times G.", ONE_OR_MORE)
    max_rollouts: int = option(
        -1,
        "Rollouts, each with all its updates, after which training ends. Give it or max_steps. -1 sets no limit.",
        Range(-1),
    )
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
        "best_of_group",
        "Whose advantage counts at the first response step. best_of_group: only that of the most probable correct "
        "response (the released code). best_of_correct: its own and those of incorrect responses (the paper). all: "
        "everyone's.",
    )
    winner_from: Literal["valid", "all"] = option(
        "valid",
        "With invalid zero, who can be the most probable correct response of first_token. all: cut-off ones too (the "
        "released code); if one of them is, no advantage above 0 is left at the first step.",
    )
    mask_truncated_completions: bool = option(
        False,
        "Leave responses cut off by the limit out of the loss: out of its sums, KL and entropy, and out of the number "
        "of tokens it divides by. What they do to the advantages of the others is up to invalid.",
    )
    scale_rewards: Literal["group", "batch", "none"] = option(
        "group",
        "Divide advantages by the standard deviation of the group's or of the batch's rewards, or not at all. true is "
        "group, false is none.",
    )


@dataclass
class UpdateOptions:
    """The policy loss and its passes over a rollout."""

    loss_type: Literal["dapo", "grpo", "dr_grpo", "bnpo", "gspo", "cispo", "sapo", "luspo", "vespo"] = option(
        "dapo",
        "dapo: mean over the tokens of an update. bnpo: mean over the tokens of a forward and backward pass. grpo: "
        "mean over responses of their token means. dr_grpo: token sums over the limit. gspo: grpo with "
        "importance_sampling_level sequence. cispo: dapo with a clipped weight on the log-prob, so that no token loses "
        "its gradient. sapo: grpo with a soft clip. luspo: mean over responses of their token sums, meant for "
        "importance_sampling_level sequence. vespo: dapo with a soft weight of each response.",
    )
    loss_on: Literal["all", "latent", "text"] = option("all", "Response steps that carry the policy loss.")
    margin_gradient: Literal["aligned", "released", "none"] = option(
        "aligned", "Backward coefficient past the target. Only method latent_grpo reads it."
    )
    importance_sampling_level: Literal["token", "sequence", "component"] = option(
        "token",
        "Ratio of a step, or the geometric mean over its response (GSPO, with epsilon 3e-4 and epsilon_high 4e-4). "
        "component: one ratio for each component of a latent step, only with method multiplex (its released code).",
    )
    epsilon: float = option(
        0.2, "Clip range below 1. From 1 on, the ratio has no lower bound; DeepSeek-R1 takes 10.", NON_NEGATIVE
    )
    epsilon_high: float | None = option(
        None,
        "Clip range above 1. Default: epsilon. With cispo it is the largest weight itself; ScaleRL takes 5.",
        NON_NEGATIVE,
    )
    delta: float | None = option(
        3.0,
        "Largest ratio of any loss with a clip: the dual clip of negative advantages, and below 1 + epsilon_high a "
        "clip of positive ones. null is none.",
        Range(1, open_low=True),
    )
    sapo_temperature_pos: float = option(1.0, "Steepness of sapo's clip where the advantage is positive.", POSITIVE)
    sapo_temperature_neg: float = option(1.05, "Steepness of sapo's clip where it is not.", POSITIVE)
    vespo_k_pos: float = option(2.0, "Power of the ratio in vespo's weight, advantage 0 or more.", NON_NEGATIVE)
    vespo_lambda_pos: float = option(3.0, "Decay of vespo's weight, advantage 0 or more.", POSITIVE)
    vespo_k_neg: float = option(3.0, "Power of the ratio in vespo's weight, advantage below 0.", NON_NEGATIVE)
    vespo_lambda_neg: float = option(2.0, "Decay of vespo's weight, advantage below 0.", POSITIVE)
    beta: float = option(
        0.0, "Coefficient of the KL to the initial model, which is loaded only if this is above 0.", NON_NEGATIVE
    )
    use_bias_correction_kl: bool = option(
        True,
        "Multiply the KL by the ratio, with its gradient (DeepSeek-V3.2). The paper does not; its recipes give false.",
    )
    kl_estimator: Literal["k1", "k2", "k3"] = option(
        "k3", "Estimate of the KL from samples: log-ratio, half its square, or k3 (positive, low variance)."
    )
    entropy_coef: float = option(
        0.0,
        "Coefficient of the mean entropy of text tokens, a bonus that keeps them exploring, whatever the loss_type.",
        NON_NEGATIVE,
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
    freeze_embeddings: bool = option(
        True,
        "Keep the embedding table (and a tied head with its bias) as it is. False: train it, with the gradients of the "
        "head and of all inputs.",
    )


@dataclass
class WatchingOptions:
    """Evaluation during the run, and the log of responses."""

    eval_dataset: str | None = option(None, "Evaluation data, given like dataset.")
    eval_steps: int = option(0, "Steps between evaluations. 0 evaluates never.", NON_NEGATIVE)
    eval_limit: int | None = option(None, "Use only the first evaluation rows.", ONE_OR_MORE)
    log_completions: bool = option(
        False, "Write the responses of every logged step to output_dir/completions, as Parquet."
    )
    num_completions_to_print: int = option(0, "Responses printed at every logged step.", NON_NEGATIVE)
    probe_steps: int = option(
        256,
        "Latent steps that are replayed before and after the update of a logged step, for latent/margins_not_positive, "
        "latent/upper_atom and latent/nucleus_overlap. 0 leaves these metrics out.",
        NON_NEGATIVE,
    )


@named
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
    PromptOptions,
    AdapterOptions,
    ModelOptions,
):
    """Latent-GRPO. Defaults are the paper's, with a batch that fits a small card."""

    def __post_init__(self) -> None:
        if isinstance(self.scale_rewards, bool):
            self.scale_rewards = "group" if self.scale_rewards else "none"
        self.check_run()
        self.check_latent_steps(self.max_completion_length)
        latent_without_noise = self.latent and self.noise == "none"
        require(not latent_without_noise, "noise", self.noise, "latent training needs noise to explore")
        clamped = self.latent and self.method == "soft_grpo" and self.noise == "one_sided"
        remedy = "the margins of soft_grpo are clamped to the range of two-sided noise; give two_sided"
        require(not clamped, "noise", self.noise, remedy)
        require(self.temperature > 0, "temperature", self.temperature, "training needs sampled text; give more than 0")
        if self.importance_sampling_level == "component":
            self.check_component_ratios()
        require(self.max_rollouts != 0, "max_rollouts", self.max_rollouts, "give 1 or more, or -1 for no limit")
        one_limit = self.max_steps < 0 or self.max_rollouts < 0
        require(one_limit, "max_rollouts", self.max_rollouts, f"max_steps is {self.max_steps}; give only one")
        whole_groups = self.generation_batch_size % self.num_generations == 0
        remedy = f"give a multiple of num_generations {self.num_generations}"
        require(whole_groups, "generation_batch_size", self.generation_batch_size, remedy)
        cap, recomputed = self.importance_sampling_cap, self.old_logprobs == "recompute"
        require(cap is None or recomputed, "importance_sampling_cap", cap, "it needs old_logprobs recompute")
        high = self.epsilon_high
        weighs = self.loss_type != "cispo" or high is None or high > 0
        require(weighs, "epsilon_high", high, "it is cispo's largest weight; give more than 0")
        alone = self.loss_type != "vespo" or cap is None
        require(alone, "importance_sampling_cap", cap, "loss_type vespo weighs responses already; give null")
        cache = self.soft_punish_cache
        fits = cache is None or cache <= self.max_completion_length
        require(fits, "soft_punish_cache", cache, "give at most max_completion_length, or null for a fifth of it")

    def check_component_ratios(self) -> None:
        """Raise ConfigError for the first option that does not go with a ratio for each component."""
        level, drawn = self.importance_sampling_level, self.latent and self.method == "multiplex"
        require(drawn, "importance_sampling_level", level, "only latent steps of method multiplex have such ratios")
        whole = self.loss_type not in ("gspo", "vespo")
        remedy = f"loss_type {self.loss_type} takes ratios of responses; give token"
        require(whole, "importance_sampling_level", level, remedy)
        recomputed = self.old_logprobs == "recompute"
        require(recomputed, "importance_sampling_level", level, "it needs old_logprobs recompute")

    def label(self) -> str:
        """Return the name of the method, for a progress bar."""
        names = {"latent_grpo": "Latent-GRPO", "soft_grpo": "SofT-GRPO", "multiplex": "Multiplex Thinking"}
        return names[self.method] if self.latent else "text GRPO"

    def sampling(self) -> LatentSampling:
        """Return the sampling options alone."""
        values = {item.name: getattr(self, item.name) for item in fields(SamplingOptions)}
        return LatentSampling(**values, max_new_tokens=self.max_completion_length)
