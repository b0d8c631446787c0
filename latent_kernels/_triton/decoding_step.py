"""The decoding step of latent and text rows: the LM head with its sidecar, and one selection for rows of both kinds.

The methods of other papers replace the mixtures of latent rows in a launch of their own, and take one more pass over
the logits for log-probs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from latent_kernels._loss_types import LogprobSpec
from latent_kernels._triton.latent_logprob import FromLogits
from latent_kernels._triton.latent_step import decoding_step_from_sidecar
from latent_kernels._triton.latent_step_methods import latent_step_with_method
from latent_kernels._triton.lm_head import RowTemperatures, Sidecar
from latent_kernels._types import DecodingStep, LatentStepOptions, TextOptions
from latent_kernels.reference.latent_step import UNUSED_ID, clean_options


def row_temperatures(options: LatentStepOptions, text: TextOptions, vocab: int) -> RowTemperatures | None:
    """Return how the sums of the sidecar are tempered, or None if all rows are at 1."""
    if options.latent_mask is None or text.temperature == 1 or text.kind(vocab) == "greedy":
        return None
    return RowTemperatures(options.latent_mask, text.temperature)


def decoding_step_triton(
    sidecar: Sidecar, embedding: Tensor, options: LatentStepOptions, text: TextOptions
) -> DecodingStep:  # fmt: skip
    """Compute the step on checked arguments from a sidecar with `row_temperatures`."""
    if options.method == "latent_grpo":
        return decoding_step_from_sidecar(sidecar, embedding, options, text)
    of_text = decoding_step_from_sidecar(sidecar, embedding, clean_options(options), text)
    step = latent_step_with_method(sidecar, embedding, options)
    token, hard = step.top_token, ~step.is_latent.unsqueeze(-1)
    if options.latent_mask is not None:
        token = torch.where(options.latent_mask, token, of_text.token)
    ids = torch.where(hard, F.pad(token.unsqueeze(-1), (0, options.top_k - 1), value=UNUSED_ID), step.ids)
    scores, embeds = step.scores.masked_fill(hard, 0.0), torch.where(hard, embedding[token], step.embedding)
    spec = LogprobSpec(ids, scores, None, text.temperature or 1.0, "none", options.method)
    logprob = FromLogits.apply(sidecar.logits[:, : len(embedding)], spec)
    return DecodingStep(ids, scores, embeds, token, step.is_latent, logprob)
