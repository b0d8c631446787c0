"""The worlds of the quickstart and of comparisons: tasks that are made on the spot, a tiny model, and their options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from latent_grpo.quickstart import graph_world, toy_task

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class World:
    """A task that is made from a seed."""

    about: str  # the problems in a few words
    headroom: str  # what the warm start lacks
    problems: Callable[[int, int], Rows]  # (number, seed) -> problems
    examples: Callable[[Rows, int], Rows]  # (problems, seed) -> rows of the warm start
    tokenizer: Callable[[], Any]
    model: Callable[[Any, int], Any]  # (tokenizer, seed) -> a new model
    base_share: float = 0.0  # steps on searches in text before a warm start, as a share of the warm start's own
    sft: dict[str, Any] = field(default_factory=dict)  # options of the warm start
    grpo: dict[str, Any] = field(default_factory=dict)  # options of the reinforcement


WORLDS = {
    "graph": World(
        about="graphs: which candidate can be reached?",
        headroom="The warm start's latent steps are breadth-first searches, and two tokens a step hold them in part.",
        problems=lambda n, seed: graph_world.make_problems(n, seed=seed),
        examples=lambda problems, seed: problems,
        tokenizer=graph_world.make_tokenizer,
        model=lambda tokenizer, seed: graph_world.make_model(tokenizer, seed=seed),
        base_share=0.4,  # a search has more look-ups than a frontier, so they are learned sooner
        sft={"max_steps": 1300, "per_device_train_batch_size": 32, "learning_rate": 4e-3, "warmup_steps": 50},
        grpo={
            "max_rollouts": 200,
            "learning_rate": 3e-4,
            "warmup_steps": 10,
            "eval_steps": 20,
            "per_device_train_batch_size": 256,
            # Nodes of a frontier differ by less than the noise of scale 1, which would choose among them alone.
            "noise_scale": 0.5,
            # With the loss on latent steps only, nothing trains the step that ends the latent run, and it is lost.
            "max_latent_steps": graph_world.GraphWorld().depth,
        },
    ),
    "arithmetic": World(
        about="word problems: how many are there now?",
        headroom="Four in ten of the warm start's examples forget the last change.",
        problems=lambda n, seed: toy_task.make_problems(n, seed=seed),
        examples=lambda problems, seed: toy_task.worked_examples(problems, seed=seed),
        tokenizer=toy_task.make_tokenizer,
        model=lambda tokenizer, seed: toy_task.make_model(tokenizer, seed=seed),
        sft={"max_steps": 450, "per_device_train_batch_size": 64, "learning_rate": 3e-3, "warmup_steps": 20},
        grpo={
            # With the loss on latent steps only, nothing keeps the end of the latent run in its place for long.
            "max_rollouts": 50,
            "learning_rate": 1e-4,
            "eval_steps": 10,
            "per_device_train_batch_size": 128,
            # One to three latent steps. First-token selection would act on too large a share of them.
            "first_token": "all",
        },
    ),
}
