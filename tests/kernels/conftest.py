"""Fixtures of the tests of the kernels."""

from __future__ import annotations

import importlib.util

import pytest
from support.kernels import DEVICE


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the latent step's kernel a short buffer.

    Triton's interpreter sorts a buffer one element after the other. A short one also makes rows overflow it.
    """
    if DEVICE == "cpu" and importlib.util.find_spec("triton"):
        import latent_kernels._triton.latent_step as module

        monkeypatch.setattr(module, "BUFFER", 64)
        monkeypatch.setattr(module, "COARSE", 32)
