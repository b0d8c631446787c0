"""How a data set is evaluated: by the protocol of this package, or by that of the paper's released scripts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from latent_grpo.data.benchmarks import ReleasedRuns
from latent_grpo.prompts import FORMATS, PromptFormat

TRIES = (1, 4, 8, 16, 32, 64)  # the k of pass@k in the released scripts


@dataclass(frozen=True)
class Setting:
    """What `evaluate` is asked for on one data set. The fields are its arguments, and the limit of a response."""

    max_new_tokens: int
    pass_at: list[int]
    prompt_format: PromptFormat
    run_seeds: list[int] = field(default_factory=list)
    num_samples: int | None = None
    length_of: Literal["all", "finished"] = "all"


def released_setting(
    released: ReleasedRuns,
    base_seed: int,
    own_format: PromptFormat,
    *,
    keep_format: bool = True,
    pass_at: list[int] | None = None,
    limit: int | None = None,
    length_of: Literal["all", "finished"] | None = None,
) -> Setting:
    """Return the setting of the released scripts for a data set. What is given replaces a part of it.

    own_format: the prompt format that flags and model name. keep_format: they do name one. Without one, the released
    format of the benchmark applies. Its suffix, which asks for a letter, applies where there is no other.
    """
    prompt_format = own_format
    if released.prompt_format is not None:
        published = replace(FORMATS[released.prompt_format], end_marker=own_format.end_marker)
        base = own_format if keep_format else published
        prompt_format = replace(base, prompt_suffix=base.prompt_suffix or published.prompt_suffix)
    return Setting(
        max_new_tokens=released.limit if limit is None else limit,
        pass_at=pass_at or [k for k in TRIES if k <= released.runs],
        prompt_format=prompt_format,
        run_seeds=released.seeds(base_seed),
        length_of=length_of or released.length_of,
    )
