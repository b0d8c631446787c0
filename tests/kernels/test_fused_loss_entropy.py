"""The entropy bonus of text steps in the fused policy loss."""

from __future__ import annotations

import pytest
import torch
from support import oracle
from support import tolerances as tol
from support.fused_losses import AGGREGATIONS, assert_equals_the_oracle, make_batch, run
from support.kernels import narrowed, precision, with_kernel
from support.largest_tensor import ROWS, VOCAB, one_chunk

from latent_kernels import fused_policy_loss
from latent_kernels._eager import latent_logprob as eager_rows
from latent_kernels.reference.loss import text_entropy_ref

FUSED = with_kernel(fused_policy_loss)


LOSSES = [
    *(dict(aggregation=aggregation) for aggregation in AGGREGATIONS),
    dict(ratio="sequence"),
    dict(objective="cispo"),
]
# Every loss with a reference model; the other cases with one loss, since they do not depend on it.
RUNS = [("reference", loss) for loss in LOSSES]
RUNS += [(case, LOSSES[0]) for case in ("no-reference", "no-advantages", "only-bonus")]


@FUSED
@pytest.mark.parametrize(("case", "loss"), RUNS, ids=[f"{case}-{'-'.join(loss.values())}" for case, loss in RUNS])
def test_loss_and_gradients_with_a_bonus_equal_the_oracle(operator, case, loss, make_trajectory, monkeypatch):
    monkeypatch.setattr(eager_rows, "BLOCK_COLUMNS", 100)
    batch = narrowed(make_batch(make_trajectory), precision(operator))
    if case != "reference":
        batch["ref_logprob"] = None
    if case in ("no-advantages", "only-bonus"):
        batch["advantages"][1:] = 0.0  # then only the bonus gives text steps a gradient
    if case == "only-bonus":
        batch["ids"][..., 1:] = -100
    options = dict(loss, temperature=0.7, entropy_coef=0.3, kl_coef=0.1 if case == "reference" else 0.0)
    actual, expected = assert_equals_the_oracle(operator, batch, stats=False, **options)
    assert actual.stats.entropy.item() == pytest.approx(expected.stats["entropy"], abs=tol.FLOAT32)
    without = run(operator, batch, **{**options, "entropy_coef": 0.0})
    assert torch.isnan(without.stats.entropy)
    assert (actual.hidden - without.hidden).abs().max() > 1e-3
    if case == "only-bonus":
        assert without.hidden.abs().max() == 0.0


@FUSED
def test_a_bonus_leaves_no_step_out_of_the_ratio_of_a_response(operator, make_trajectory):
    """Text steps count for their entropy, so the statistics show the ratio of a response without an advantage too."""
    batch = narrowed(make_batch(make_trajectory), precision(operator)) | {"ref_logprob": None}
    batch["advantages"][:] = 0.0
    batch["ids"][:, 0, 1:], batch["ids"][:, 1:] = -100, batch["ids"][:, 1:].abs()  # text, then latent steps
    batch["old_logprob"][:, 0] += 3.0  # the first ratios are far below those of the responses
    options = dict(ratio="sequence", clip_low=0.6, clip_high=0.0, objective="cispo")
    actual, expected = assert_equals_the_oracle(operator, batch, stats=False, entropy_coef=0.1, **options)
    for name in ("clip_fraction", "approx_kl", "abs_log_ratio"):
        assert getattr(actual.stats, name).item() == pytest.approx(expected.stats[name], abs=tol.FLOAT32)


def test_the_references_entropy_and_its_gradient_equal_the_oracle():
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    ids = torch.full((5, 2), -100)
    ids[:, 0], ids[3] = 1, torch.tensor([2, 4])  # one latent row
    entropy = text_entropy_ref(logits, ids, 0.7)
    (gradient,) = torch.autograd.grad(entropy.sum(), logits)
    for actual, expected in zip((entropy.detach(), gradient), oracle.entropy(logits, ids, 0.7), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=tol.FLOAT64)
    assert entropy[3] == 0.0


def test_gradients_with_a_bonus_are_those_of_the_value(make_trajectory):
    batch = make_batch(make_trajectory, (2, 3), vocab=11, top_k=3, width=4, margins="positive")
    batch["mask"][:] = True
    leaves = batch.pop("hidden").requires_grad_(), batch.pop("lm_head").requires_grad_()
    options = dict(temperature=0.8, entropy_coef=0.5)
    assert torch.autograd.gradcheck(lambda h, w: fused_policy_loss(h, w, **batch, **options)[0], leaves)


def test_entropy_bonus_holds_no_second_chunk_of_logits(make_trajectory, monkeypatch):
    monkeypatch.setattr(eager_rows, "BLOCK_COLUMNS", 64)
    batch = make_batch(make_trajectory, (8, ROWS // 8), vocab=VOCAB, width=8, dtype=torch.float32)
    batch["mask"][:] = True
    with one_chunk(monkeypatch):
        run(fused_policy_loss, batch, entropy_coef=0.1)
