"""Fused operators for latent reasoning with reinforcement learning.

The package can be imported without Triton and without a GPU. Equation numbers are those of arXiv 2604.27998.
"""

from latent_kernels._chunks import chunk_bytes
from latent_kernels._dispatch import kernels_for
from latent_kernels._noise import GUMBEL_HIGH, GUMBEL_LOW
from latent_kernels._types import DecodingStep, GroupAdvantages, LatentStep, LatentStepOptions, PolicyStats
from latent_kernels.ops.decoding_step import decoding_step
from latent_kernels.ops.fused_policy_loss import fused_policy_loss
from latent_kernels.ops.group_advantages import group_advantages
from latent_kernels.ops.latent_logprob import latent_logprob, latent_logprob_from_logits
from latent_kernels.ops.latent_step import latent_step, latent_step_from_logits, latent_step_with_logits
from latent_kernels.ops.mix_embeddings import mix_embeddings
from latent_kernels.ops.philox_uniform import philox_uniform
from latent_kernels.ops.policy_loss import policy_loss
from latent_kernels.ops.project_with_noise import project_with_noise
from latent_kernels.reference.latent_step import UNUSED_ID
from latent_kernels.reference.loss import STD_EPSILON

__version__ = "0.1.0"
__all__ = [
    "GUMBEL_HIGH",
    "GUMBEL_LOW",
    "STD_EPSILON",
    "UNUSED_ID",
    "DecodingStep",
    "GroupAdvantages",
    "LatentStep",
    "LatentStepOptions",
    "PolicyStats",
    "chunk_bytes",
    "decoding_step",
    "fused_policy_loss",
    "group_advantages",
    "kernels_for",
    "latent_logprob",
    "latent_logprob_from_logits",
    "latent_step",
    "latent_step_from_logits",
    "latent_step_with_logits",
    "mix_embeddings",
    "philox_uniform",
    "policy_loss",
    "project_with_noise",
]
