"""Sequences, masks, positions and labels of the first stage, against those of the released functions.

`released_sft.json` has what the functions of the released Latent-SFT code return. A mask is a number per row, whose bit
c is set where column c is seen. The code marks latent steps by -100, and the compress token is id 90.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from latent_grpo.sft.pieces import ChainExample, chain_batch

CASES = json.loads((Path(__file__).parent / "released_sft.json").read_text())["stage1"]
COMPRESS, LATENT = 90, -100


def example_of(case) -> ChainExample:
    chain, width = case["chain"], case["compression"]
    return ChainExample(case["prompt"], [chain[i : i + width] for i in range(0, len(chain), width)], case["text"])


def unpacked(mask: str) -> torch.Tensor:
    rows = [int(word, 16) for word in mask.split()]
    return torch.tensor([[row >> column & 1 for column in range(len(rows))] for row in rows]).bool()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("number", range(len(CASES)))
def test_sequences_masks_and_positions_are_those_of_the_released_functions(number, padded):
    case = CASES[number]
    examples = [example_of(case), example_of(max(CASES, key=lambda other: len(other["decoder"])))]
    batch = chain_batch(examples if padded else examples[:1], torch.device("cpu"))
    length = len(case["encoder"]) - case["end"]  # the released encoder also reads the end marker, which nothing follows
    ids = batch.encoder_ids.masked_fill(batch.cut, COMPRESS)
    assert ids[0, :length].tolist() == case["encoder"][:length]
    assert not batch.cut[0, length:].any()
    assert torch.equal(batch.encoder_mask[0, 0, :length, :length], unpacked(case["encoder_mask"])[:length, :length])

    length = len(case["decoder"])
    ids = batch.decoder_ids.masked_fill(batch.latent, LATENT)
    assert ids[0, :length].tolist() == case["decoder"]
    assert ids.masked_fill(~batch.target, LATENT)[0, :length].tolist() == case["labels"]
    assert not batch.target[0, length:].any()
    assert not batch.latent[0, length:].any()
    assert batch.decoder_positions[0, :length].tolist() == case["positions"]
    assert torch.equal(batch.decoder_mask[0, 0, :length, :length], unpacked(case["decoder_mask"]))
    assert not batch.decoder_mask[0, 0, :length, length:].any()
    assert examples[0].length == length
    assert examples[0].targets == int(batch.target[0].sum())


def test_a_latent_step_carries_the_piece_after_the_ones_that_its_encoder_has_read():
    example = ChainExample(prompt=[5], pieces=[[1, 2], [3, 4], [6]], text=[7])
    batch = chain_batch([example], torch.device("cpu"))
    assert batch.decoder_ids.masked_fill(batch.latent, LATENT).tolist() == [[5, LATENT, 3, 4, LATENT, 6, LATENT, 7]]
    assert batch.piece.tolist() == [[False, False, True, True, False, True, False, False]]
    second_cut = batch.cut[0].nonzero()[1]  # of L_2, in whose place the decoder reads piece 3, the id 6
    seen = batch.encoder_ids[0, batch.encoder_mask[0, 0, second_cut].squeeze()]
    assert seen[:-1].tolist() == [5, 1, 2, 3, 4]
