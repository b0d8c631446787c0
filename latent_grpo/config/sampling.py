"""How a response is sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from latent_grpo.config.fields import NON_NEGATIVE, ONE_OR_MORE, SHARE, Range, check_options, named, option
from latent_grpo.errors import require


@dataclass
class SamplingOptions:
    """How a response is sampled."""

    latent: bool = option(True, "Reason in latent steps. False gives plain text through the same code.")
    method: Literal["latent_grpo", "soft_grpo", "multiplex"] = option(
        "latent_grpo",
        "Rule of a latent step. latent_grpo: noise on the nucleus, then the K best. soft_grpo: the K most probable "
        "tokens, then noise. multiplex: K tokens drawn from the model's distribution.",
    )
    latent_top_k: int = option(10, "Mixture size K of a latent step. Keep it near compression of sft.", Range(2))
    latent_top_p: float = option(0.95, "Nucleus mass of latent candidates. multiplex needs 1.", SHARE)
    tau: float = option(
        1.0,
        "Gumbel-softmax temperature of the mixture weights. inf weighs all components alike.",
        Range(0, open_low=True, infinite=True),
    )
    noise: Literal["one_sided", "two_sided", "none"] = option("one_sided", "Noise of latent steps while sampling.")
    noise_scale: float = option(1.0, "Factor on the noise.", NON_NEGATIVE)
    noise_delta: float = option(0.0, "Least one-sided noise, before noise_scale.", NON_NEGATIVE)
    end_rule: Literal["raw", "noisy"] = option(
        "raw",
        "What ends a latent run. raw: the end marker has the highest logit. noisy: or it is the first token of the "
        "sampled mixture (with soft_grpo and multiplex only this).",
    )
    min_latent_steps: int = option(0, "Latent steps before the end marker can end a latent run.", NON_NEGATIVE)
    max_latent_steps: int | None = option(
        None, "Latent steps after which a latent run is ended. null sets no limit.", ONE_OR_MORE
    )
    temperature: float = option(0.6, "Sampling temperature of text tokens. 0 is greedy.", NON_NEGATIVE)
    top_p: float = option(0.95, "Nucleus mass of text tokens.", Range(0, 1, open_low=True))
    top_k: int = option(30, "Candidates of text tokens. 0 keeps all.", NON_NEGATIVE)
    cuda_graphs: bool = option(
        True, "Decode in captured CUDA graphs on a GPU. Their cache then stays allocated between rollouts."
    )

    def check(self) -> None:
        """Raise ConfigError for the first option that cannot be used."""
        check_options(self)
        self.check_latent_steps()

    def check_latent_steps(self, limit: int | None = None) -> None:
        """Raise ConfigError for options of latent steps that do not fit each other or responses of `limit` steps."""
        if not self.latent:
            return
        whole = self.method != "multiplex" or self.latent_top_p == 1
        require(whole, "latent_top_p", self.latent_top_p, "method multiplex draws from all tokens; give 1")
        one_sided = self.noise_delta == 0 or self.noise == "one_sided"
        require(one_sided, "noise_delta", self.noise_delta, f"it needs noise one_sided, not {self.noise}; give 0")
        least, most = self.min_latent_steps, self.max_latent_steps
        require(most is None or least <= most, "min_latent_steps", least, f"give at most max_latent_steps {most}")
        for name, steps in (("min_latent_steps", least), ("max_latent_steps", most or 0)):
            short = limit is None or steps < limit
            require(short, name, steps, f"a response has at most {limit} steps; give less")


@named
@dataclass
class LatentSampling(SamplingOptions):
    """Sampling options of `generate_latent`, with the ids that it needs from the tokenizer."""

    max_new_tokens: int = option(128, "Limit of a response, latent and text steps together.")
    end_token_id: int | None = option(None, "First token of the end marker. Latent responses need it.")
    eos_token_id: tuple[int, ...] | int | None = option(None, "Ids that end a response. Default: the model's.")
    seed: int = option(0, "Seed of the noise streams.")

    def check(self) -> None:
        """Raise ConfigError for the first option that cannot be used."""
        check_options(self)
        self.check_latent_steps(self.max_new_tokens)
