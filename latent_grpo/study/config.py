"""Options of `latent-grpo compare`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from latent_grpo.config.fields import NON_NEGATIVE, ONE_OR_MORE, check_options, option
from latent_grpo.errors import require


@dataclass
class CompareConfig:
    """A comparison: warm starts, methods and ablations over several seeds."""

    output_dir: str = option("runs/compare", "Folder of runs, table and figure. Finished runs in it are kept.")
    seeds: list[int] = option([0, 1, 2], "Seeds. Each seed has its own warm starts and problems.")
    world: Literal["graph", "arithmetic"] = option(
        "graph", "The task that is made on the spot: reachability in graphs, or word problems."
    )
    arms: list[str] = option([], "Arms to run. Default: all.")
    sft_config: str | None = option(None, "YAML of the warm starts, options of `sft`. Default: the quickstart's.")
    grpo_config: str | None = option(None, "YAML of the reinforcement, options of `train`. Give it with sft_config.")
    sft_steps: int = option(0, "Steps of a warm start. 0 takes the configured number.", NON_NEGATIVE)
    grpo_steps: int = option(0, "Rollouts of a reinforced run. 0 takes the configured length.", NON_NEGATIVE)
    train_problems: int = option(20_000, "Problems of the world to train on.", ONE_OR_MORE)
    held_out_problems: int = option(1000, "Problems of the world to evaluate on.", ONE_OR_MORE)
    watched_problems: int = option(
        200, "Held-out problems that a run evaluates every eval_steps, for its curve.", ONE_OR_MORE
    )
    num_samples: int = option(4, "Sampled responses per held-out problem, for Pass@1 under noise.", ONE_OR_MORE)
    workers: int = option(1, "Runs at a time, a process each.", ONE_OR_MORE)
    threads: int = option(1, "CPU threads of a run. Results depend on their number.", ONE_OR_MORE)

    def __post_init__(self) -> None:
        check_options(self)
        require(len(self.seeds) > 0, "seeds", self.seeds, "give at least one")
        require(len(set(self.seeds)) == len(self.seeds), "seeds", self.seeds, "give each once")
