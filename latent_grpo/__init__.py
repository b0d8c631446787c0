"""Latent-GRPO: reinforcement learning of latent reasoning for any Hugging Face causal LM (arXiv 2604.27998)."""

from latent_grpo.config import LatentGRPOConfig, LatentSampling, LatentSFTConfig
from latent_grpo.distributed import process_group
from latent_grpo.evaluate import evaluate, pass_at_k
from latent_grpo.generation import generate_latent
from latent_grpo.rollout import Rollout
from latent_grpo.sft import LatentSFTTrainer
from latent_grpo.trainer import LatentGRPOTrainer

__all__ = [
    "LatentGRPOConfig",
    "LatentGRPOTrainer",
    "LatentSFTConfig",
    "LatentSFTTrainer",
    "LatentSampling",
    "Rollout",
    "evaluate",
    "generate_latent",
    "pass_at_k",
    "process_group",
]
