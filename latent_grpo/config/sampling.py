"""How a response is sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from latent_grpo.config.fields import NON_NEGATIVE, POSITIVE, SHARE, Range, check_options, option


@dataclass
class SamplingOptions:
    """How a response is sampled."""

    latent: bool = option(True, "Reason in latent steps. False gives plain text through the same code.")
    latent_top_k: int = option(10, "Mixture size K of a latent step. Keep it near compression of sft.", Range(2))
    latent_top_p: float = option(0.95, "Nucleus mass of latent candidates.", SHARE)
    tau: float = option(1.0, "Gumbel-softmax temperature of the mixture weights.", POSITIVE)
    noise: Literal["one_sided", "two_sided", "none"] = option("one_sided", "Noise of latent steps while sampling.")
    noise_scale: float = option(1.0, "Factor on the noise.", NON_NEGATIVE)
    temperature: float = option(0.6, "Sampling temperature of text tokens. 0 is greedy.", NON_NEGATIVE)
    top_p: float = option(0.95, "Nucleus mass of text tokens.", Range(0, 1, open_low=True))
    top_k: int = option(30, "Candidates of text tokens. 0 keeps all.", NON_NEGATIVE)
    cuda_graphs: bool = option(
        True, "Decode in captured CUDA graphs on a GPU. Their cache then stays allocated between rollouts."
    )

    def check(self) -> None:
        """Raise ConfigError for the first option that cannot be used."""
        check_options(self)


@dataclass
class LatentSampling(SamplingOptions):
    """Sampling options of `generate_latent`, with the ids that it needs from the tokenizer."""

    max_new_tokens: int = option(128, "Limit of a response, latent and text steps together.")
    end_token_id: int | None = option(None, "First token of the end marker. Latent responses need it.")
    eos_token_id: tuple[int, ...] | int | None = option(None, "Ids that end a response. Default: the model's.")
    seed: int = option(0, "Seed of the noise streams.")
