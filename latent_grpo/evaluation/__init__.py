"""Evaluation: accuracy with and without noise, unbiased pass@k and lengths, all with bootstrap intervals."""

from latent_grpo.evaluation.results import evaluate
from latent_grpo.evaluation.statistics import bootstrap_interval, pass_at_k

__all__ = ["bootstrap_interval", "evaluate", "pass_at_k"]
