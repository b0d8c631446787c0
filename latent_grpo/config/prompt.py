"""How a prompt is put to the model, and where its reasoning opens and ends."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from latent_grpo.config.fields import option


@dataclass
class PromptOptions:
    """How a prompt is put to the model. An option that is not given is that of prompt_format, else of the model."""

    prompt_format: Literal["latent-grpo-low", "latent-grpo-high", "latent-grpo-gpqa", "latent-sft-llama"] | None = (
        option(
            None,
            "Named values of the options below. Default: what the model was trained with, else the question alone.",
        )
    )
    instruction: str | None = option(None, "Text that tells the model what to do with the question.")
    instruction_role: Literal["user", "system"] | None = option(
        None, "Where the instruction stands: before the question, on a line of its own, or in a system message."
    )
    prompt_suffix: str | None = option(None, "Text behind the question.")
    opening_marker: str | None = option(
        None, "Text that opens the reasoning. It ends the prompt, unless the chat template ends with it already."
    )
    end_marker: str | None = option(
        None, "Text whose first token ends a latent run. Default: what the model was trained with, else </think>."
    )
    chat_template: bool | None = option(
        None, "Use the tokenizer's chat template. Default: if it has one. true makes a missing one an error."
    )
    prompt_template: str | None = option(
        None, "Text around the question, a Python format of {prompt}, in place of a chat template."
    )
    chat_template_kwargs: dict[str, Any] | None = option(
        None, "Arguments of the chat template, as '{\"enable_thinking\": false}'."
    )

    def given_prompt_options(self) -> dict[str, Any]:
        """Return the options that were given, by name, without `prompt_format`."""
        names = [item.name for item in fields(PromptOptions) if item.name != "prompt_format"]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}
