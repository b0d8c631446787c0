"""One response as a person reads it: the prompt, each latent step as a mixture, the answer, the reward."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from latent_grpo.rollout.trajectory import Rollout

Mixture = list[tuple[str, float]]  # (token's text, its weight) of each component, the heaviest first


@dataclass(frozen=True)
class Response:
    """What is shown of a response. A fact that is None is left out."""

    text: str  # the visible text: without the latent steps and their end marker
    finished: bool  # it ended by itself, before the length limit
    latent_steps: list[Mixture]
    prompt: str | None = None
    answer: str | None = None  # the true answer
    step: int | None = None  # the training step that sampled it
    reward: float | None = None
    advantage: float | None = None  # at the last step of the response
    latent_share: float | None = None  # of latent steps among all steps of the responses to its prompt


def mixtures(tokenizer: Any, rollout: Rollout, row: int) -> list[Mixture]:
    """Return every latent step of one row of a rollout as its mixture of all K components."""
    steps = rollout.is_latent[row]
    weights = (rollout.scores[row, steps] / rollout.tau).softmax(-1)
    weights, order = weights.sort(dim=-1, descending=True)
    ids = rollout.ids[row, steps].gather(-1, order)
    return [
        [(tokenizer.decode([token]), weight) for token, weight in zip(*step, strict=True)]
        for step in zip(ids.tolist(), weights.tolist(), strict=True)
    ]


def prompt_text(prompt: Any) -> str:
    """Return a prompt as text: a string as it is, a conversation as JSON."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def print_response(console: Console, response: Response, *, top: int = 4, indent: int = 0) -> None:
    """Print a response: its prompt, if there is one, then a line per latent step, then the answer.

    top: components shown of each mixture; `+ ...` stands for the others. indent: spaces before every line.
    """
    margin = " " * indent
    if response.prompt is not None:
        heading = response.prompt if response.step is None else f"step {response.step}: {response.prompt}"
        console.print(Text(f"\n{margin}{heading}", style="bold"), soft_wrap=True)
        margin += "  "
    for number, mixture in enumerate(response.latent_steps, 1):
        console.print(Text(f"{margin}latent {number}: {mixture_line(mixture, top)}", style="dim"), soft_wrap=True)
    console.print(Text(f"{margin}{answer_line(response)}"), soft_wrap=True)


def mixture_line(mixture: Mixture, top: int) -> str:
    """Return the `top` heaviest components as `0.61 '12' + 0.39 '7'`."""
    components = [f"{weight:.2f} {token!r}" for token, weight in mixture[:top]]
    return " + ".join([*components, "..."] if len(mixture) > top else components)


def answer_line(response: Response) -> str:
    """Return the visible text, whether it was cut off, and the facts that are known of the response."""
    facts = []
    if response.reward is not None:
        facts.append(f"reward {response.reward:.2f}")
    if response.advantage is not None:
        facts.append(f"advantage {response.advantage:+.2f}")
    if response.latent_share is not None:
        facts.append(f"latent share of the question {response.latent_share:.2f}")
    if response.answer is not None:
        facts.append(f"true answer {response.answer}")
    cut = "" if response.finished else "  (cut off by the limit)"
    return f"answer: {response.text}{cut}" + (f"  [{', '.join(facts)}]" if facts else "")
