"""The names of metrics: TRL's where TRL has one, under `latent/` what only latent steps have.

`docs/metrics.md` is written from METRICS. OLD_NAMES keeps the logs of earlier versions readable.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple


class Metric(NamedTuple):
    """What a metric is. `trl`: TRL logs the same under this name."""

    phases: str  # that log it
    trl: bool
    meaning: str


RUN, WARM, CHAINS, EVALUATION = "train", "sft", "encode", "train, every eval_steps"
ALL = f"{RUN}, {WARM}, {CHAINS}"
METRICS = {
    "loss": Metric(ALL, True, "the loss, mean over the updates of a step"),
    "grad_norm": Metric(ALL, True, "norm of the gradient before clipping"),
    "learning_rate": Metric(ALL, True, "of the last update"),
    "epoch": Metric(ALL, True, "passes over the data so far"),
    "num_tokens": Metric(RUN, True, "tokens of prompts and responses so far; a latent step counts as one"),
    "step_time": Metric(RUN, True, "seconds of the step with its rollout, without evaluation and saving"),
    "reward": Metric(RUN, True, "mean of the weighted sums of rewards, over all sampled responses"),
    "reward_std": Metric(RUN, True, "their standard deviation"),
    "frac_reward_zero_std": Metric(RUN, True, "share of sampled groups whose rewards agree: they teach nothing"),
    "rewards/NAME/mean": Metric(RUN, True, "mean reward of one function, without its weight, where it applies"),
    "rewards/NAME/std": Metric(RUN, True, "its standard deviation"),
    "completions/mean_length": Metric(
        RUN, True, "steps of a response, latent ones and text; like all of `completions/`, of the groups trained on"
    ),
    "completions/min_length": Metric(RUN, True, "of the shortest response"),
    "completions/max_length": Metric(RUN, True, "of the longest"),
    "completions/clipped_ratio": Metric(RUN, True, "share of responses that the length limit cut off"),
    "completions/mean_terminated_length": Metric(RUN, True, "mean length of those that ended; 0 if none did"),
    "completions/min_terminated_length": Metric(RUN, True, "of the shortest of them"),
    "completions/max_terminated_length": Metric(RUN, True, "of the longest of them"),
    "entropy": Metric(
        RUN,
        True,
        "entropy of text steps in nats: exact with `entropy_coef`, else the estimate -mean log-prob of the sampled "
        "tokens, whose expectation is the entropy where `top_k` and `top_p` leave out none",
    ),
    "kl": Metric(
        f"{RUN}, {WARM}",
        True,
        "train: KL term to the reference model, with `beta`. sft: KL of latent steps to their targets, nats",
    ),
    "clip_ratio/region_mean": Metric(
        RUN, True, "share of the steps with an advantage whose ratio is clipped; with `cispo`, whose weight is capped"
    ),
    "clip_ratio/dual_mean": Metric(RUN, False, "share of the same steps that the dual clip, `delta`, bounds"),
    "sampling/sampling_logp_difference/mean": Metric(
        RUN, True, "mean difference of the log-probs of sampler and trainer, nats: above 0.05 something is wrong"
    ),
    "approx_kl": Metric(RUN, False, "mean of old minus new log-prob, nats"),
    "groups_kept": Metric(RUN, False, "share of the sampled groups that are trained on"),
    "skipped_updates": Metric(RUN, False, "updates of the run that were skipped for a gradient that is not finite"),
    "tokens_per_second": Metric(RUN, False, "steps of the responses over the time of their rollouts"),
    "time_rollout": Metric(RUN, False, "seconds of sampling and rewards"),
    "time_old_logprob": Metric(RUN, False, "seconds of log-probs and advantages before the update"),
    "time_update": Metric(RUN, False, "seconds of the updates"),
    "latent/mean_length": Metric(RUN, False, "latent steps of a response"),
    "latent/share": Metric(RUN, False, "latent steps among all steps"),
    "latent/share_per_prompt": Metric(RUN, False, "the same for the responses to one prompt, mean over prompts"),
    "latent/mixture_entropy": Metric(RUN, False, "entropy of the weights of a latent step, nats"),
    "latent/margin_crossed": Metric(RUN, False, "share of components whose margin is negative in the loss"),
    "latent/margins_not_positive": Metric(
        RUN, False, "share of components whose margin is 0 or less after the update; of the probe, as the next two"
    ),
    "latent/upper_atom": Metric(RUN, False, "share of components whose noise was at the upper end of its clamp"),
    "latent/nucleus_overlap": Metric(RUN, False, "share of components whose token would still be a candidate"),
    "ce": Metric(WARM, False, "cross-entropy of the text behind the latent steps, nats"),
    "latent/end_on_top": Metric(
        WARM, False, "soft labels: share of rows with the end marker on top of a latent step in 100 draws of its noise"
    ),
    "latent/read_back": Metric(CHAINS, False, "share of held-out chain tokens that the decoder reads from their steps"),
    "latent/read_answers": Metric(CHAINS, False, "share of held-out rows whose text it predicts"),
    "eval_pass_at_1": Metric(EVALUATION, False, "share of problems that one noise-free, greedy response solves"),
    "eval_reasoning_steps": Metric(EVALUATION, False, "steps before the end marker"),
    "eval_completions/mean_length": Metric(EVALUATION, True, "steps of a response, latent ones and text"),
    "eval_completions/clipped_ratio": Metric(EVALUATION, True, "share of responses that the length limit cut off"),
    "eval_end_marker_rate": Metric(EVALUATION, False, "share of responses with an end marker"),
    "eval_problems": Metric(EVALUATION, False, "problems evaluated"),
    "eval_num_samples": Metric(EVALUATION, False, "samples under noise of each; 0 in a run"),
}
OLD_NAMES = {
    "response_length": "completions/mean_length",
    "truncated": "completions/clipped_ratio",
    "clip_fraction": "clip_ratio/region_mean",
    "dual_clip_fraction": "clip_ratio/dual_mean",
    "logprob_gap": "sampling/sampling_logp_difference/mean",
    "latent_length": "latent/mean_length",
    "latent_share": "latent/share",
    "latent_share_per_question": "latent/share_per_prompt",
    "mixture_entropy": "latent/mixture_entropy",
    "margin_crossed": "latent/margin_crossed",
    "margins_not_positive": "latent/margins_not_positive",
    "upper_atom": "latent/upper_atom",
    "nucleus_overlap": "latent/nucleus_overlap",
    "end_on_top": "latent/end_on_top",
    "read_back": "latent/read_back",
    "read_answers": "latent/read_answers",
    "eval_response_length": "eval_completions/mean_length",
    "eval_truncation_rate": "eval_completions/clipped_ratio",
}
OF_FUNCTION = re.compile(r"rewards/.+/(mean|std)")


def renamed(row: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics of a step with today's names in place of those of earlier versions."""
    return {OLD_NAMES.get(name, name): value for name, value in row.items()}


def evaluation_metrics(result: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of an evaluation as metrics of a run, each named `eval_` and so on."""
    return renamed({f"eval_{name}": value for name, value in result.items() if isinstance(value, int | float)})


def documented(name: str) -> str:
    """Return the name that METRICS has for a metric: that of a reward function with NAME for the function's."""
    return OF_FUNCTION.sub(r"rewards/NAME/\1", name)
