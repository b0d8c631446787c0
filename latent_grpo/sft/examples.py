"""Training texts of the warm start: the components of every response element, one by one and as padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latent_grpo.config import LatentSFTConfig
from latent_grpo.errors import DataError
from latent_grpo.model import end_marker_ids
from latent_grpo.prompts import PromptFormat, check_ids, fits_table, resolve_format


@dataclass
class Example:
    """One training text: the prompt's tokens, and the components of every response element (one id: a text token)."""

    prompt: list[int]
    response: list[list[int]]
    number: int = 0  # of the row in the data set; names the noise streams


@dataclass
class SFTBatch:
    """B examples padded to L elements of C components. Prompts are padded on the left, responses on the right."""

    ids: Tensor  # [B, L, C] int64, 0 in unused places
    weights: Tensor  # [B, L, C] float32, 0 in unused places; the weights of an element sum to 1
    mask: Tensor  # [B, L] int64, 0 on padding
    response: Tensor  # [B, L] bool, elements with a loss
    numbers: Tensor  # [B] int64, numbers of the examples


def build_example(
    tokenizer: Any, row: Any, args: LatentSFTConfig, prompt_format: PromptFormat, marker: list[int], number: int
) -> Example:
    """Return the tokens of a row with "prompt", "chain" and "answer". marker: ids of the end marker.

    The visible answer is the row's "answer_text", or `answer_template` with its "answer".
    """
    chain = tokenizer(row["chain"], add_special_tokens=False)["input_ids"]
    width = args.compression if args.latent else 1
    latents = [chain[i : i + width] for i in range(0, len(chain), width)]
    visible = row.get("answer_text") or args.answer_template.format(answer=row["answer"])
    answer = tokenizer(visible, add_special_tokens=False)["input_ids"]
    text = [[token] for token in [*marker, *answer, tokenizer.eos_token_id]]
    return Example(prompt_format.ids(tokenizer, [row["prompt"]])[0], latents + text, number)


def build_examples(
    tokenizer: Any, rows: Sequence[Any], args: LatentSFTConfig, prompt_format: PromptFormat | None = None
) -> list[Example]:
    """Return an example of every row that fits the length limits.

    prompt_format: the default is the one that the options and the model of `model_name_or_path` give.

    Raises:
        DataError: a row has no chain, or no row fits.
    """
    prompt_format = prompt_format or resolve_format(args, args.model_name_or_path)
    marker = end_marker_ids(tokenizer, prompt_format.end_marker)
    examples = []
    for number, row in enumerate(rows, 1):
        if not row.get("chain"):
            raise DataError(
                f"row {number} has no chain of thought; Latent-SFT needs one, name its column with --chain_column"
            )
        example = build_example(tokenizer, row, args, prompt_format, marker, number)
        fits_prompt = args.max_prompt_length is None or len(example.prompt) <= args.max_prompt_length
        if fits_prompt and len(example.response) <= args.max_completion_length:
            examples.append(example)
    if not examples:
        raise DataError("no row fits max_prompt_length and max_completion_length; raise them")
    return examples


def check_examples(tokenizer: Any, examples: Sequence[Example], table_rows: int) -> None:
    """Raise ModelError for the first id of an example that has no row in an embedding table of `table_rows` rows."""
    if fits_table(tokenizer, table_rows):
        return
    for example in examples:
        response = (token for element in example.response for token in element)
        check_ids(tokenizer, example.prompt, table_rows, f"the prompt of row {example.number}")
        check_ids(tokenizer, response, table_rows, f"chain and answer of row {example.number}")


def collate(examples: Sequence[Example], device: torch.device) -> SFTBatch:
    """Pad examples to one batch on `device`."""
    prompt_width = max(len(e.prompt) for e in examples)
    response_width = max(len(e.response) for e in examples)
    components = max(len(element) for e in examples for element in e.response)
    empty = [0] * components
    ids, weights = [], []
    for example in examples:
        elements = [[i] for i in example.prompt] + example.response
        left = [empty] * (prompt_width - len(example.prompt))
        right = [empty] * (response_width - len(example.response))
        padding = [[0] * (components - len(e)) for e in elements]
        ids.append([*left, *(e + p for e, p in zip(elements, padding, strict=True)), *right])
        shares = [[1.0 / len(e)] * len(e) + [0.0] * len(p) for e, p in zip(elements, padding, strict=True)]
        weights.append([*left, *shares, *right])
    weight = torch.tensor(weights, dtype=torch.float32)
    mask = weight.sum(-1) > 0
    response = mask & (torch.arange(prompt_width + response_width) >= prompt_width)
    numbers = torch.tensor([example.number for example in examples])
    return SFTBatch(*(x.to(device) for x in (torch.tensor(ids), weight, mask.long(), response, numbers)))
