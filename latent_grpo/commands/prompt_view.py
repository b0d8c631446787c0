"""What a row of data looks like to the model: its prompt, the last ids of it, its training text in the warm start."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from latent_grpo.config import LatentSFTConfig
from latent_grpo.model import end_marker_ids
from latent_grpo.prompts import PromptFormat
from latent_grpo.sft import build_example

LAST_IDS = 8  # ids of the prompt that are shown one by one


def show_row(console: Console, tokenizer: Any, prompt_format: PromptFormat, row: Any) -> None:
    """Print the prompt of a row as the model gets it, and its training text if it has a chain.

    The training text is that of `sft` with its defaults: prompt | latent steps | end marker | answer.
    """
    (ids,) = prompt_format.ids(tokenizer, [row["prompt"]])
    lines = [
        ("prompt", prompt_format.render(tokenizer, row["prompt"])),
        (f"last of {len(ids)} ids", spelled(tokenizer, ids[-LAST_IDS:])),
    ]
    if row.get("chain"):
        args, marker = LatentSFTConfig(), end_marker_ids(tokenizer, prompt_format.end_marker)
        response = build_example(tokenizer, row, args, prompt_format, marker, 1).response
        latents = -(-len(tokenizer(row["chain"], add_special_tokens=False)["input_ids"]) // args.compression)
        text = [token for (token,) in response[latents:]]
        parts = (
            "prompt",
            " ".join(f"[{tokenizer.decode(element)}]" for element in response[:latents]),
            tokenizer.decode(text[: len(marker)]),
            tokenizer.decode(text[len(marker) :]),
        )
        lines.append((f"warm start, {latents} latent steps", " | ".join(parts)))
    for name, value in lines:
        console.print(Text(f"{name}: ", style="bold").append(value, style="not bold"), soft_wrap=True)


def spelled(tokenizer: Any, ids: list[int]) -> str:
    """Return ids with their text, each on its own: `27963 '<think', 29 '>'`."""
    return ", ".join(f"{token} {tokenizer.decode([token])!r}" for token in ids)
