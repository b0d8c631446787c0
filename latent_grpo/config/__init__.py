"""Every option of the trainer, with its meaning and its range. Names are those of TRL's `GRPOConfig` where it has one.

Options stand in small dataclasses by subject. The configurations of `train`, `sft` and `compare` inherit the ones they
need, and `--help` and docs/options.md show the options in the same groups. After a change here, run
`python docs/options.py docs/options.md`. An option that may change when a run resumes also belongs into
`saving/run_identity.py`.
"""

from latent_grpo.config.fields import Range, check_options, default_of, groups_of, option
from latent_grpo.config.prompt import PromptOptions
from latent_grpo.config.sampling import LatentSampling, SamplingOptions
from latent_grpo.config.sft import PHASES, EncodeConfig, LatentSFTConfig, WarmStartOptions
from latent_grpo.config.shared import AdapterOptions, DataOptions, ModelOptions, OptimizerOptions, RunOptions
from latent_grpo.config.train import (
    AdvantageOptions,
    LatentGRPOConfig,
    RewardOptions,
    RolloutOptions,
    UpdateOptions,
    WatchingOptions,
)

__all__ = [
    "PHASES",
    "AdapterOptions",
    "AdvantageOptions",
    "DataOptions",
    "EncodeConfig",
    "LatentGRPOConfig",
    "LatentSFTConfig",
    "LatentSampling",
    "ModelOptions",
    "OptimizerOptions",
    "PromptOptions",
    "Range",
    "RewardOptions",
    "RolloutOptions",
    "RunOptions",
    "SamplingOptions",
    "UpdateOptions",
    "WarmStartOptions",
    "WatchingOptions",
    "check_options",
    "default_of",
    "groups_of",
    "option",
]
