"""A reward and sampling options that tests of the evaluation use, in this process and in others."""

from __future__ import annotations

from latent_grpo import LatentSampling
from latent_grpo.model import end_marker_ids


def even(completions, **kwargs):
    """A reward that a random text meets half the time."""
    return [float(sum(map(ord, text)) % 2 == 0) for text in completions]


def sampling(tokenizer, **options) -> LatentSampling:
    return LatentSampling(
        latent_top_k=2, max_new_tokens=6, end_token_id=end_marker_ids(tokenizer, "</think>")[0],
        eos_token_id=tokenizer.eos_token_id, temperature=1.0, **options,
    )  # fmt: skip
