"""`bench.selection` counts what the kernel does: its replay selects the kernel's ids."""

from __future__ import annotations

import pytest
import torch
from support.kernels import DEVICE, NEEDS_TRITON

from bench.selection import cycles, replay, summary, synthetic
from latent_kernels import LatentStepOptions, latent_step_from_logits


@NEEDS_TRITON
@pytest.mark.parametrize("kind", ["nearly uniform", "normal", "Zipf"])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
@pytest.mark.usefixtures("small_segments")
def test_the_replay_selects_what_the_kernel_selects(kind, top_p):
    from latent_kernels._triton.latent_step import constants

    logits = synthetic(kind, 3, 2500)
    chosen = constants(2500, LatentStepOptions(top_k=10))
    table = torch.zeros(2500, 4, device=DEVICE)
    step = latent_step_from_logits(logits.to(DEVICE), table, top_k=10, top_p=top_p, seed=0, impl="triton")
    rows = [replay(row, number, chosen, top_p) for number, row in enumerate(logits)]
    assert [sorted(row["ids"]) for row in rows] == [sorted(ids) for ids in step.ids.tolist()]
    assert all(cycles(row) > 0 and row["tiles"] >= row["segments"] >= 1 for row in rows)


@NEEDS_TRITON
def test_the_summary_has_the_median_the_mean_and_the_worst_row():
    result = summary("Zipf", synthetic("Zipf", 4, 3000), top_k=5, top_p=0.95)
    assert result["cycles"]["worst"] >= result["cycles"]["median"] > 0
    assert result["segments"]["worst"] >= result["segments"]["mean"] >= 1
