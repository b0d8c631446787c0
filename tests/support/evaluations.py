"""A reward and sampling options for tests of the evaluation, in the test's process and in others."""

from __future__ import annotations

from latent_grpo import LatentSampling
from latent_grpo.model import end_marker_ids
from latent_grpo.quickstart.toy_task import make_problems

ROWS = make_problems(10, seed=1)


def even(completions, **kwargs):
    """Return 1.0 for texts whose character codes have an even sum, which holds for half of random texts."""
    return [float(sum(map(ord, text)) % 2 == 0) for text in completions]


def sampling(tokenizer, **options) -> LatentSampling:
    """Return options for short responses with two components per mixture."""
    ids = {"end_token_id": end_marker_ids(tokenizer, "</think>")[0], "eos_token_id": tokenizer.eos_token_id}
    return LatentSampling(latent_top_k=2, max_new_tokens=6, temperature=1.0, **ids, **options)
