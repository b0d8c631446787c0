"""Find the largest tensor that any operation makes, to show that nothing of size [N, V] is alive."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latent_kernels import _chunks as chunks

ROWS, VOCAB, CHUNK_ROWS = 96, 512, 12  # of the logits that `one_chunk` watches


class LargestTensor(TorchDispatchMode):
    """Record the number of elements of the largest output of any operation."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = (leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        self.elements = max(self.elements, *sizes, 0)
        return out


@contextmanager
def one_chunk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Check that what runs on ROWS steps over VOCAB tokens makes a chunk of logits, and nothing much larger."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", CHUNK_ROWS * VOCAB * 4)
    with LargestTensor() as seen:
        yield
    assert CHUNK_ROWS * VOCAB <= seen.elements < ROWS * VOCAB / 4
