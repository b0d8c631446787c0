"""Latent-GRPO: reinforcement learning of latent reasoning for any Hugging Face causal LM (arXiv 2604.27998)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latent_grpo.config import LatentGRPOConfig, LatentSampling, LatentSFTConfig
    from latent_grpo.data.rows import load_rows
    from latent_grpo.evaluation import evaluate, pass_at_k
    from latent_grpo.parallel.process_group import process_group
    from latent_grpo.rollout.generate import generate_latent
    from latent_grpo.rollout.trajectory import Rollout
    from latent_grpo.sft import LatentSFTTrainer
    from latent_grpo.trainer import LatentGRPOTrainer
    from latent_grpo.update.loss import step_advantages
    from latent_grpo.update.replay import replay
    from latent_grpo.watching.page import RunPage

__all__ = [
    "LatentGRPOConfig",
    "LatentGRPOTrainer",
    "LatentSFTConfig",
    "LatentSFTTrainer",
    "LatentSampling",
    "Rollout",
    "RunPage",
    "evaluate",
    "generate_latent",
    "load_rows",
    "pass_at_k",
    "process_group",
    "replay",
    "step_advantages",
]

# The module of each export, which is imported when the export is first used: `latent-grpo --help` must not wait seconds
# for a trainer that it does not need.
_HOME = {
    "LatentGRPOConfig": "config",
    "LatentGRPOTrainer": "trainer",
    "LatentSFTConfig": "config",
    "LatentSFTTrainer": "sft",
    "LatentSampling": "config",
    "Rollout": "rollout.trajectory",
    "RunPage": "watching.page",
    "evaluate": "evaluation",
    "generate_latent": "rollout.generate",
    "load_rows": "data.rows",
    "pass_at_k": "evaluation",
    "process_group": "parallel.process_group",
    "replay": "update.replay",
    "step_advantages": "update.loss",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    export = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = export  # Python does not call this function again for a name that is here
    return export


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
