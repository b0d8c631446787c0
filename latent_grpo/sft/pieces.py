"""What encoder and decoder of the first stage of Latent-SFT read: sequences, masks and positions (arXiv 2510.15522).

A chain of thought is cut into n pieces of `compression` tokens. The encoder reads a compress token c behind each piece:

    prompt, piece 1, c, piece 2, c, ..., piece n, c

The hidden state at the i-th c becomes the latent step L_i. The decoder reads the latent steps with the pieces. The
published code drops the first piece:

    prompt, L_1, piece 2, L_2, piece 3, ..., L_(n-1), piece n, L_n, end marker, answer, EOS

So L_i has seen the pieces up to i, and must carry piece i + 1. L_n carries no piece, but the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latent_grpo.config import EncodeConfig
from latent_grpo.errors import DataError
from latent_grpo.model import end_marker_ids
from latent_grpo.prompts import PromptFormat
from latent_grpo.sft.examples import chain_ids, fitting, text_after


@dataclass
class ChainExample:
    """The ids of one row: its prompt, the pieces of its chain of thought, and the text behind the latent steps."""

    prompt: list[int]
    pieces: list[list[int]]
    text: list[int]
    number: int = 0  # of the row in the data set

    @property
    def response(self) -> list[list[int]]:
        """The ids behind the prompt: pieces, and the text as pieces of one."""
        return [*self.pieces, *([token] for token in self.text)]

    @property
    def length(self) -> int:
        """Number of positions of the decoder."""
        return len(self.prompt) + len(self.pieces) + sum(map(len, self.pieces[1:])) + len(self.text)

    @property
    def targets(self) -> int:
        """Number of positions of the decoder with a loss."""
        return sum(map(len, self.pieces[1:])) + len(self.text)


@dataclass
class ChainBatch:
    """B examples, padded on the right to L positions of the encoder and M of the decoder.

    Both have as many latent steps, in the same order.
    """

    encoder_ids: Tensor  # [B, L] int64
    cut: Tensor  # [B, L] bool, compress tokens
    encoder_mask: Tensor  # [B, 1, L, L] bool, key positions that a query position sees
    decoder_ids: Tensor  # [B, M] int64
    latent: Tensor  # [B, M] bool, latent steps
    piece: Tensor  # [B, M] bool, chain tokens
    target: Tensor  # [B, M] bool, chain tokens and text: each is predicted from the position before it
    decoder_positions: Tensor  # [B, M] int64
    decoder_mask: Tensor  # [B, 1, M, M] bool


def chain_example(
    tokenizer: Any, row: Any, number: int, args: EncodeConfig, prompt_format: PromptFormat, marker: list[int]
) -> ChainExample:
    """Return the ids of a row with "prompt", "chain" and "answer". marker: ids of the end marker.

    Raises:
        DataError: the row has no chain, or an empty one.
    """
    chain, width = chain_ids(tokenizer, row, number, prompt_format.end_marker), args.compression
    if not chain:
        raise DataError(f"row {number}: its chain of thought {row['chain']!r} has no token; remove the row")
    pieces = [chain[i : i + width] for i in range(0, len(chain), width)]
    prompt = prompt_format.ids(tokenizer, [row["prompt"]])[0]
    return ChainExample(prompt, pieces, text_after(tokenizer, row, number, args, marker), number)


def chain_examples(
    tokenizer: Any, rows: Sequence[Any], args: EncodeConfig, prompt_format: PromptFormat
) -> list[ChainExample]:
    """Return an example of every row that fits the limits of length; the response counts latent steps and text.

    Raises:
        DataError: a row has no chain, or no row fits.
    """
    given = (args, prompt_format, end_marker_ids(tokenizer, prompt_format.end_marker))
    examples = [chain_example(tokenizer, row, number, *given) for number, row in enumerate(rows, 1)]
    return fitting(args, examples, [len(e.prompt) for e in examples], [len(e.pieces) + len(e.text) for e in examples])


def chain_batch(examples: Sequence[ChainExample], device: torch.device) -> ChainBatch:
    """Pad examples to one batch on `device`."""
    encoder, decoder = [encoder_rows(e) for e in examples], [decoder_rows(e) for e in examples]
    encoder_ids, cut = (padded([row[i] for row in encoder], device) for i in range(2))
    decoder_ids, owner, piece, target, places = (padded([row[i] for row in decoder], device) for i in range(5))
    latent = (owner > 0) & (piece == 0)
    return ChainBatch(
        encoder_ids,
        cut.bool(),
        encoder_mask(cut.bool()).unsqueeze(1),
        decoder_ids,
        latent,
        piece.bool(),
        target.bool(),
        places,
        decoder_mask(owner, piece.bool()).unsqueeze(1),
    )


def encoder_rows(example: ChainExample) -> tuple[list[int], list[int]]:
    """Return the encoder's ids of an example, 0 for compress tokens, and where these are (1 or 0)."""
    ids, cut = list(example.prompt), [0] * len(example.prompt)
    for piece in example.pieces:
        ids += [*piece, 0]
        cut += [0] * len(piece) + [1]
    return ids, cut


def decoder_rows(example: ChainExample) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
    """Return five rows of the decoder's positions of an example.

    They are the ids (0 for latent steps), the number of the latent step that a position is or belongs to (0 for prompt
    and text), whether it is a chain token, whether it has a loss, and its position id. Position ids run along the
    latent steps as if the pieces were not there. A piece continues from its latent step.
    """
    start, steps = len(example.prompt), len(example.pieces)
    ids, owner, places = list(example.prompt), [0] * start, list(range(start))
    piece, target = [0] * start, [0] * start
    for number, tokens in enumerate([*example.pieces[1:], []], 1):
        ids += [0, *tokens]
        owner += [number] * (1 + len(tokens))
        piece += [0] + [1] * len(tokens)
        target += [0] + [1] * len(tokens)
        places += range(start + number - 1, start + number + len(tokens))
    text = len(example.text)
    places += range(start + steps, start + steps + text)
    return ids + example.text, owner + [0] * text, piece + [0] * text, target + [1] * text, places


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return rows as a tensor [B, L] int64, padded with 0 on the right. Padding comes last, so no position sees it."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)


def causal(length: int, device: torch.device) -> Tensor:
    """Return [L, L] bool: which key positions are not after a query position."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def encoder_mask(cut: Tensor) -> Tensor:
    """Return [B, L, L] bool: a position sees what is before it except compress tokens, and itself. cut [B, L] bool."""
    itself = torch.eye(cut.shape[1], dtype=torch.bool, device=cut.device)
    return causal(cut.shape[1], cut.device) & (~cut.unsqueeze(1) | itself)


def decoder_mask(owner: Tensor, piece: Tensor) -> Tensor:
    """Return the induction-supervision mask [B, L, L] bool, of rows that `decoder_rows` describes.

    A chain token sees its own piece up to itself and the latent step before the piece, nothing else. All other
    positions see what is before them except chain tokens.
    """
    same = owner.unsqueeze(2) == owner.unsqueeze(1)
    return causal(owner.shape[1], owner.device) & torch.where(piece.unsqueeze(2), same, ~piece.unsqueeze(1))
