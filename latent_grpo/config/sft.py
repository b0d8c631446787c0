"""The options of the warm start."""

from __future__ import annotations

from dataclasses import dataclass

from latent_grpo.config.fields import NON_NEGATIVE, POSITIVE, Range, option
from latent_grpo.config.prompt import PromptOptions
from latent_grpo.config.shared import AdapterOptions, DataOptions, ModelOptions, RunOptions
from latent_grpo.errors import require


@dataclass
class LatentSFTConfig(RunOptions, DataOptions, PromptOptions, AdapterOptions, ModelOptions):
    """The warm start: chain-of-thought tokens become latent targets (arXiv 2510.15522)."""

    latent: bool = option(True, "False keeps the chain as text: the warm start of the text baseline.")
    learning_rate: float = option(1e-5, "Peak learning rate of AdamW.", POSITIVE)
    compression: int = option(2, "Consecutive chain tokens per latent step.", Range(1, 4096))
    gumbel_scale: float = option(0.0, "Scale of the Gumbel noise on latent inputs. 0 adds none.", NON_NEGATIVE)
    answer_template: str = option("\\boxed{{{answer}}}", "Text of the visible answer, a Python format of {answer}.")
    freeze_embeddings: bool = option(False, "Keep the embedding table (and a tied head) as it is.")

    def __post_init__(self) -> None:
        self.check_run()
        require("{answer}" in self.answer_template, "answer_template", self.answer_template, "it must hold {answer}")
