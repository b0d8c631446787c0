"""Latent-GRPO: reinforcement learning of latent reasoning for any Hugging Face causal LM (arXiv 2604.27998)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latent_grpo.config import LatentGRPOConfig, LatentSampling, LatentSFTConfig
    from latent_grpo.evaluation import evaluate, pass_at_k
    from latent_grpo.parallel.process_group import process_group
    from latent_grpo.rollout.generate import generate_latent
    from latent_grpo.rollout.trajectory import Rollout
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

# Imported when asked for: `latent-grpo --help` should not wait seconds for a trainer that it does not use.
_HOME = {
    "LatentGRPOConfig": "config",
    "LatentGRPOTrainer": "trainer",
    "LatentSFTConfig": "config",
    "LatentSFTTrainer": "sft",
    "LatentSampling": "config",
    "Rollout": "rollout.trajectory",
    "evaluate": "evaluation",
    "generate_latent": "rollout.generate",
    "pass_at_k": "evaluation",
    "process_group": "parallel.process_group",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
