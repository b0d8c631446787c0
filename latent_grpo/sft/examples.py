"""Training texts of the warm start: the components of every response element, one by one and as padded batches."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latent_grpo.config import LatentSFTConfig, WarmStartOptions
from latent_grpo.errors import DataError
from latent_grpo.model import end_marker_ids
from latent_grpo.prompts import (
    PromptFormat,
    check_ids,
    fits_table,
    require_row,
    required_prompt,
    resolve_format,
    short_enough,
)
from latent_grpo.sft.soft_labels import SoftLabels


@dataclass
class Example:
    """One training text: the prompt's tokens, and the components of every response element (one id: a text token).

    With soft labels, `response` has only the text, and the latent elements before it are `labels`.
    """

    prompt: list[int]
    response: list[list[int]]
    number: int = 0  # of the row in the data set; names the noise streams
    latents: int = 0  # latent elements of the response
    labels: tuple[Tensor, Tensor] | None = None  # probabilities and ids [latents, K]

    @property
    def elements(self) -> int:
        """Number of response elements, latent and text together."""
        return len(self.response) + (self.latents if self.labels is not None else 0)

    @property
    def length(self) -> int:
        """Number of elements of prompt and response."""
        return len(self.prompt) + self.elements


@dataclass
class SFTBatch:
    """B examples padded to L elements of C components. Prompts are padded on the left, responses on the right."""

    ids: Tensor  # [B, L, C] int64, 0 in unused places
    weights: Tensor  # [B, L, C] float32, 0 in unused places; the weights of an element sum to 1
    mask: Tensor  # [B, L] int64, 0 on padding
    response: Tensor  # [B, L] bool, elements with a loss
    latent: Tensor  # [B, L] bool, latent elements
    numbers: Tensor  # [B] int64, numbers of the examples


def text_after(tokenizer: Any, row: Any, number: int, args: WarmStartOptions, marker: list[int]) -> list[int]:
    """Return the ids behind the latent steps: end marker, visible answer, end of the sequence.

    The visible answer is the row's "answer_text", or `answer_template` with its "answer". DataError if there is none;
    number: the row's, for the message.
    """
    visible, answer = row.get("answer_text"), row.get("answer")
    if not visible and answer in (None, ""):
        raise DataError(f"row {number} has no answer; remove the row, or name its column with --answer_column")
    visible = visible or args.answer_template.format(answer=answer)
    return [*marker, *plain_ids(tokenizer, visible, number, "answer"), tokenizer.eos_token_id]


def chain_ids(tokenizer: Any, row: Any, number: int, end_marker: str) -> list[int]:
    """Return the ids of a row's chain of thought. number: the row's, for the message.

    Raises:
        DataError: there is no chain, or the end marker stands inside it, which would teach the model to end there.
    """
    if not row.get("chain"):
        raise DataError(
            f"row {number} has no chain of thought; the warm start needs one, name its column with --chain_column"
        )
    ids = plain_ids(tokenizer, row["chain"], number, "chain of thought")
    inside = f"holds the end marker {end_marker!r} in its chain of thought; remove it, or choose another end_marker"
    require_row(end_marker not in row["chain"], number, inside)
    return ids


def plain_ids(tokenizer: Any, text: Any, number: int, name: str) -> list[int]:
    """Return the ids of a text without special tokens. DataError if it cannot be read."""
    try:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    except (TypeError, ValueError) as error:
        raise DataError(f"row {number}: the {name} is {text!r:.60}, not a text that can be read; correct it") from error
    return ids


def with_chains(rows: Any, missing_chains: str) -> Any:
    """Return the rows with a chain of thought. missing_chains: "drop" leaves others out, with a warning of how many.

    Raises:
        DataError: a row has no chain, unless such rows are dropped; or no row has one.
    """
    for number, row in enumerate(rows, 1):
        required_prompt(row, number)  # nothing else is known of a row that a caller has made
    kept = [i for i, row in enumerate(rows) if row.get("chain") and str(row["chain"]).strip()]
    if len(kept) == len(rows):
        return rows
    count, first = len(rows) - len(kept), min(set(range(len(rows))) - set(kept)) + 1
    remedy = "name its column with --chain_column"
    if missing_chains != "drop":
        remedy += ", or leave such rows out with --missing_chains drop"
    if missing_chains != "drop" or not kept:
        raise DataError(
            f"row {first} has no chain of thought, and {count:,} of {len(rows):,} rows have none; the warm start needs "
            f"one: {remedy}"
        )
    warnings.warn(f"{count:,} of {len(rows):,} rows are left out: they have no chain of thought", stacklevel=2)
    return [rows[i] for i in kept]


def build_example(
    tokenizer: Any, row: Any, args: LatentSFTConfig, prompt_format: PromptFormat, marker: list[int], number: int
) -> Example:
    """Return the tokens of a row with "prompt", "chain" and "answer". marker: ids of the end marker.

    A row's own `latent_steps` come before `compression`: a list of texts, each the tokens of one latent step.
    """
    own = row.get("latent_steps") if args.latent else None
    if own:
        steps = [chain_ids(tokenizer, {"chain": step}, number, prompt_format.end_marker) for step in own]
    else:
        chain = chain_ids(tokenizer, row, number, prompt_format.end_marker)
        width = args.compression if args.latent else 1
        steps = [chain[i : i + width] for i in range(0, len(chain), width)]
    text = [[token] for token in text_after(tokenizer, row, number, args, marker)]
    prompt = prompt_format.ids(tokenizer, [row["prompt"]])[0]
    return Example(prompt, steps + text, number, latents=len(steps) if args.latent else 0)


def build_examples(
    tokenizer: Any,
    rows: Sequence[Any],
    args: LatentSFTConfig,
    prompt_format: PromptFormat | None = None,
    labels: SoftLabels | None = None,
) -> list[Example]:
    """Return an example of every row that fits the length limits.

    prompt_format: the default is the one that the options and the model of `model_name_or_path` give.
    labels: the soft labels of the rows, which replace the targets that the chain gives.

    Raises:
        DataError: a row has no chain and no labels, or no row fits.
    """
    prompt_format = prompt_format or resolve_format(args, args.model_name_or_path)
    marker = end_marker_ids(tokenizer, prompt_format.end_marker)
    examples = []
    for number, row in enumerate(rows, 1):
        if labels is None:
            example = build_example(tokenizer, row, args, prompt_format, marker, number)
        else:
            text = [[token] for token in text_after(tokenizer, row, number, args, marker)]
            label, prompt = labels.row(number - 1), prompt_format.ids(tokenizer, [row["prompt"]])[0]
            example = Example(prompt, text, number, len(label[0]), label)
        examples.append(example)
    return fitting(args, examples, [len(example.prompt) for example in examples], [e.elements for e in examples])


def fitting(args: WarmStartOptions, examples: list[Any], prompts: list[int], responses: list[int]) -> list[Any]:
    """Return the examples whose prompts and responses, of these numbers of elements, are within the limits of length.

    Raises:
        DataError: a prompt is too long, unless `long_prompts` drops it; or no example fits.
    """
    kept = short_enough(prompts, args.max_prompt_length, args.long_prompts)
    short = [i for i in kept if responses[i] <= args.max_completion_length]
    if not short:
        raise DataError("no row fits max_prompt_length and max_completion_length; raise them")
    if len(short) < len(kept):
        warnings.warn(
            f"{len(kept) - len(short):,} of {len(examples):,} rows are left out: their responses have more than "
            f"max_completion_length {args.max_completion_length} elements",
            stacklevel=2,
        )
    return [examples[i] for i in short]


def check_examples(tokenizer: Any, examples: Sequence[Any], table_rows: int) -> None:
    """Raise ModelError for the first id of a response that has no row in an embedding table of `table_rows` rows."""
    if fits_table(tokenizer, table_rows):
        return
    for example in examples:
        response = (token for element in example.response for token in element)
        check_ids(tokenizer, response, table_rows, f"chain and answer of row {example.number}")


def collate(examples: Sequence[Example], device: torch.device) -> SFTBatch:
    """Pad examples to one batch on `device`."""
    prompt_width = max(len(e.prompt) for e in examples)
    length = prompt_width + max(e.elements for e in examples)
    components = max(len(element) for e in examples for element in e.response)
    components = max([components, *(e.labels[0].shape[-1] for e in examples if e.labels is not None)])
    ids = torch.zeros(len(examples), length, components, dtype=torch.long)
    weights = torch.zeros(ids.shape)
    latent = torch.zeros(ids.shape[:2], dtype=torch.bool)
    for row, example in enumerate(examples):
        start, place = prompt_width - len(example.prompt), prompt_width
        latent[row, place : place + example.latents] = True
        if example.labels is not None:
            steps = slice(place, place + example.latents)
            place = steps.stop
            weights[row, steps], ids[row, steps] = example.labels
        ids[row, start:prompt_width, 0] = torch.tensor(example.prompt)
        weights[row, start:prompt_width, 0] = 1.0
        text = slice(place, place + len(example.response))
        unused = [[0] * (components - len(element)) for element in example.response]
        padded = list(zip(example.response, unused, strict=True))
        ids[row, text] = torch.tensor([element + rest for element, rest in padded])
        weights[row, text] = torch.tensor([[1.0 / len(e)] * len(e) + [0.0] * len(rest) for e, rest in padded])
    mask = weights.sum(-1) > 0
    response = mask & (torch.arange(length) >= prompt_width)
    numbers = torch.tensor([example.number for example in examples])
    return SFTBatch(*(x.to(device) for x in (ids, weights, mask.long(), response, latent, numbers)))
