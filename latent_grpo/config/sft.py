"""The options of the warm start: `sft` trains it, and `encode` makes the soft labels that it can learn from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from latent_grpo.config.fields import BELOW_ONE, NON_NEGATIVE, ONE_OR_MORE, RATE, Range, named, option
from latent_grpo.config.prompt import PromptOptions
from latent_grpo.config.shared import AdapterOptions, DataOptions, ModelOptions, RunOptions
from latent_grpo.errors import require

PHASES = ("encoder", "decoder", "union", "labels")  # of `encode`, in the order in which they run


@dataclass
class WarmStartOptions(RunOptions):
    """How a chain of thought becomes latent steps."""

    learning_rate: float = option(1e-5, "Peak learning rate of AdamW.", RATE)
    compression: int = option(
        2, "Consecutive chain tokens per latent step. Soft labels have their own.", Range(1, 4096)
    )
    answer_template: str = option(
        "\\boxed{{{answer}}}",
        "Text of the visible answer, a Python format of {answer}. A row with an answer text of its own keeps that.",
    )
    missing_chains: Literal["error", "drop"] = option(
        "error", "What becomes of rows without a chain of thought. drop leaves them out, error ends the run."
    )
    lora_dropout: float = option(0.0, "Share of the inputs of LoRA adapters that training drops.", BELOW_ONE)
    freeze_embeddings: bool = option(
        False,
        "Keep the embedding table (and a tied head with its bias) as it is. False: train it, with the gradients of the "
        "head and of the inputs; in `encode`, the latent steps' mixtures give it none.",
    )

    def check_warm_start(self) -> None:
        """Raise ConfigError for the first option that cannot be used."""
        self.check_run()
        template = self.answer_template
        require("{answer}" in template, "answer_template", template, "it must hold {answer}")
        try:
            holds = "\0" in template.format(answer="\0")
        except (LookupError, ValueError, AttributeError):
            holds = False
        require(holds, "answer_template", template, "give a Python format with {answer} and no other field")


@named
@dataclass
class LatentSFTConfig(WarmStartOptions, DataOptions, PromptOptions, AdapterOptions, ModelOptions):
    """The warm start: chain-of-thought tokens become latent targets (arXiv 2510.15522)."""

    latent: bool = option(True, "False keeps the chain as text: the warm start of the text baseline.")
    targets: Literal["uniform", "soft_labels"] = option(
        "uniform",
        "Target of a latent step: the uniform distribution over its chain tokens, a short cut that needs no other "
        "model, or a soft label (Latent-SFT).",
    )
    soft_labels: str | None = option(
        None, "The file that `encode` wrote, or a folder of released batch_START_END.pt files. One row per data row."
    )
    ce_weight: float = option(1.0, "Weight of the cross-entropy of the text beside soft labels.", NON_NEGATIVE)
    kl_weight: float = option(1.0, "Weight of the divergence from soft labels.", NON_NEGATIVE)
    gumbel_scale: float = option(
        0.0, "Scale of the Gumbel noise on latent inputs, and on soft labels as targets. 0 adds none.", NON_NEGATIVE
    )

    def __post_init__(self) -> None:
        self.check_warm_start()
        soft = self.targets == "soft_labels"
        require(not soft or self.latent, "targets", self.targets, "latent is False, and text has no latent targets")
        require(
            not soft or bool(self.soft_labels), "soft_labels", self.soft_labels, "targets is soft_labels; name them"
        )
        require(soft or not self.soft_labels, "soft_labels", self.soft_labels, "give --targets soft_labels too")


@named
@dataclass
class EncodeConfig(WarmStartOptions, DataOptions, PromptOptions, AdapterOptions, ModelOptions):
    """The first stage of Latent-SFT: an encoder turns chains of thought into soft labels (arXiv 2510.15522)."""

    phases: list[str] = option(
        list(PHASES), "Phases to run: train the encoder, the decoder and both, and write the labels."
    )
    label_size: int = option(10, "Components of a soft label.", Range(2))
    read_back_rows: int = option(
        64, "Rows held out of training, on which the share of chain tokens read back is measured.", ONE_OR_MORE
    )
    read_back_steps: int = option(50, "Steps between these measurements.", ONE_OR_MORE)

    def __post_init__(self) -> None:
        self.check_warm_start()
        for phase in self.phases:
            require(phase in PHASES, "phases", phase, f"choose from {', '.join(PHASES)}")
        require(bool(self.phases), "phases", self.phases, f"choose from {', '.join(PHASES)}")
