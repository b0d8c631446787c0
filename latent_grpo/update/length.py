"""How long a run of `train` is: by rollouts, by optimizer steps, or by passes over the data."""

from __future__ import annotations

from typing import NamedTuple

from latent_grpo.config import LatentGRPOConfig


class RunLength(NamedTuple):
    """The planned length of a run."""

    rollouts: int
    updates: int  # optimizer steps
    by_updates: bool  # whether the updates end the run. The rollouts are then an estimate.

    def updates_left(self, updates: int) -> int | None:
        """Return how many updates a rollout may still make after `updates`; None without such a limit."""
        return self.updates - updates if self.by_updates else None

    def reached(self, rollouts: int, updates: int) -> bool:
        """Return whether a run is over. A rollout that the group filter left short has fewer updates than planned."""
        return updates >= self.updates if self.by_updates else rollouts >= self.rollouts

    def note(self) -> str | None:
        """Return a line that says what `max_steps` stands for, where it is not the number of rollouts."""
        if not self.by_updates or self.updates == self.rollouts:
            return None
        return (
            f"max_steps {self.updates} counts optimizer steps: about {self.rollouts} rollouts; "
            "max_rollouts counts rollouts"
        )


def run_length(args: LatentGRPOConfig, prompts: int, update_size: int) -> RunLength:
    """Return the length of a run over `prompts` prompts with updates of `update_size` responses."""
    # The last update of an epoch over a rollout may be smaller than the others.
    updates = args.num_iterations * -(-args.generation_batch_size // update_size)
    if args.max_steps > 0:
        return RunLength(-(-args.max_steps // updates), args.max_steps, by_updates=True)
    of_epoch = max(1, prompts // (args.generation_batch_size // args.num_generations))
    planned = max(1, round(of_epoch * args.num_train_epochs))
    rollouts = args.max_rollouts if args.max_rollouts > 0 else planned
    return RunLength(rollouts, rollouts * updates, by_updates=False)
