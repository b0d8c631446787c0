"""The prompts that tests of rollouts share."""

from __future__ import annotations

import pytest
import torch
from support.rollouts import VOCAB


@pytest.fixture(scope="module")
def prompts():
    """Return ids and mask [3, 9] of prompts, two of which are padded on the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(50, VOCAB, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :4], mask[2, :1] = 0, 0
    return ids, mask
