"""Steps that do not count: masked ones, and steps or responses without an advantage. Orders and strides."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import tolerances as tol
from support.fused_losses import AGGREGATIONS, assert_equals_the_oracle, make_batch, run
from support.kernels import narrowed, precision, with_kernel
from support.oracle_loss import fused_policy_loss as oracle_fused_loss

from latent_kernels import fused_policy_loss

FUSED = with_kernel(fused_policy_loss)


@pytest.fixture
def projected_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record how many rows each product with the head takes, or each pass over it that holds no logits."""
    rows: list[int] = []

    def record(module: str, name: str) -> None:
        function = getattr(sys.modules[module], name)
        monkeypatch.setattr(
            module + "." + name, lambda h, *args, **options: rows.append(len(h)) or function(h, *args, **options)
        )

    record("latent_kernels._scored_chunks", "project")
    record("latent_kernels.ops.fused_policy_loss", "streamed_logprob")
    return rows


@FUSED
def test_a_sequence_ratio_skips_responses_without_an_advantage_only(operator, make_trajectory, projected_rows):
    batch = narrowed(make_batch(make_trajectory), precision(operator))
    batch["ref_logprob"] = None
    batch["advantages"][1] = 0.0
    batch["advantages"][2:, ::2] = 0.0
    actual, _ = assert_equals_the_oracle(operator, batch, ratio="sequence", stats=False)
    counted = batch["mask"] & (batch["advantages"] != 0).any(-1, keepdim=True)
    # The head is used once for the ratios and once for the gradient.
    assert sum(projected_rows) == 2 * counted.sum() < 2 * batch["mask"].sum()
    assert actual.hidden.abs().max() > 0


@FUSED
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_steps_without_an_advantage_never_reach_the_head(operator, kl_coef, make_trajectory, projected_rows):
    batch = narrowed(make_batch(make_trajectory), precision(operator))
    batch["advantages"][1:, ::2] = 0.0
    if not kl_coef:
        batch["ref_logprob"] = None
    actual, _ = assert_equals_the_oracle(operator, batch, kl_coef=kl_coef, stats=False)
    # With a reference model they have a KL term.
    counted = batch["mask"] if kl_coef else batch["mask"] & (batch["advantages"] != 0)
    assert 0 < sum(projected_rows) == counted.sum()
    # The statistics are means over the steps that reached the head.
    expected = oracle_fused_loss({**batch, "mask": counted}, kl_coef=kl_coef).stats
    for name in ("clip_fraction", "dual_clip_fraction", "approx_kl", "abs_log_ratio"):
        assert getattr(actual.stats, name).item() == pytest.approx(expected[name], abs=tol.FLOAT32), name


@FUSED
def test_a_batch_without_an_advantage_has_loss_and_gradient_zero(operator, make_trajectory):
    batch = narrowed(make_batch(make_trajectory), precision(operator))
    batch["advantages"].zero_()
    batch["ref_logprob"] = None
    loss, *gradients, stats = run(operator, batch)
    assert loss.item() == 0.0
    assert not any(gradient.any() for gradient in gradients)
    assert [value.item() for value in stats[:5]] == [0.0] * 5


@FUSED
@pytest.mark.parametrize(
    "options",
    [*(dict(aggregation=aggregation) for aggregation in AGGREGATIONS), dict(ratio="sequence"), dict(entropy_coef=0.1)],
    ids=str,
)
@pytest.mark.parametrize("junk", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_values_of_masked_steps_are_not_read(operator, options, junk, make_trajectory):
    batch = narrowed(make_batch(make_trajectory), precision(operator))
    mask = batch["mask"]
    dirty = dict(batch)
    for name in ("hidden", "scores", "old_logprob", "advantages", "ref_logprob"):
        wide = mask.unsqueeze(-1) if batch[name].ndim == 3 else mask
        dirty[name] = torch.where(wide, batch[name], junk)
    dirty["ids"] = torch.where(mask.unsqueeze(-1), batch["ids"], -100)
    options = dict(options, kl_coef=0.1)
    actual, expected = run(operator, dirty, **options), run(operator, batch, **options)
    for a, b in zip((*actual[:3], *actual[3]), (*expected[:3], *expected[3]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert not actual.hidden[~mask].any()
    assert (actual.hidden[mask].abs().sum(-1) > 0).any()


@FUSED
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (3, 0)], ids=str)
def test_a_fully_masked_batch_has_loss_and_gradient_zero(operator, aggregation, shape, make_trajectory):
    batch = narrowed(make_batch(make_trajectory, (3, 4)), precision(operator))
    batch = {name: x if name == "lm_head" else x[: shape[0], : shape[1]] for name, x in batch.items()}
    batch["mask"] = torch.zeros(shape, dtype=torch.bool)
    loss, hidden_grad, head_grad, stats = run(operator, batch, aggregation=aggregation, kl_coef=0.1)
    assert loss.item() == 0.0
    assert torch.equal(hidden_grad, torch.zeros_like(batch["hidden"]))
    assert torch.equal(head_grad, torch.zeros_like(batch["lm_head"]))
    assert [value.item() for value in stats[:5]] == [0.0] * 5


def test_masked_steps_never_reach_the_head(make_trajectory, projected_rows):
    batch = make_batch(make_trajectory)
    fused_policy_loss(**batch)
    assert sum(projected_rows) == batch["mask"].sum() < batch["mask"].numel()


@given(seed=st.integers(0, 2**31), aggregation=st.sampled_from(AGGREGATIONS))
def test_the_order_of_responses_does_not_matter(make_trajectory, seed, aggregation):
    torch.manual_seed(seed)
    batch, order = make_batch(make_trajectory, vocab=33), torch.randperm(4)
    shuffled = {name: value if name == "lm_head" else value[order] for name, value in batch.items()}
    options = dict(aggregation=aggregation, kl_coef=0.1)
    expected, actual = run(fused_policy_loss, batch, **options), run(fused_policy_loss, shuffled, **options)
    for a, b in zip(actual[:3], (expected[0], expected[1][order], expected[2]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tol.FLOAT64)


@FUSED
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("mode", ["aligned", "released", "none"])
def test_huge_margins_stay_finite(operator, sign, mode, make_trajectory):
    batch = make_batch(make_trajectory, dtype=torch.float32)
    batch["mask"][:] = True
    batch["scores"][:, ::2] += sign * 1e4
    batch["scores"][:, 1::2, 0] = -torch.inf
    loss, hidden_grad, head_grad, stats = run(operator, batch, margin_gradient=mode, kl_coef=0.1)
    assert torch.isfinite(loss)
    assert torch.isfinite(hidden_grad).all()
    assert torch.isfinite(head_grad).all()
    assert all(torch.isfinite(value) for value in stats[:-1])  # there is no entropy without its bonus


@FUSED
def test_strides_of_the_inputs_do_not_matter(operator, make_trajectory):
    batch = narrowed(make_batch(make_trajectory), precision(operator))
    strided = {
        name: value.transpose(0, 1).contiguous().transpose(0, 1) if name != "lm_head" else value.T.contiguous().T
        for name, value in batch.items()
    }
    assert not any(value.is_contiguous() for value in strided.values())
    actual, expected = (run(operator, data)[:3] for data in (strided, batch))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tol.EXACT[precision(operator)])


@FUSED
def test_inputs_are_left_as_they_were(operator, make_trajectory):
    batch = narrowed(make_batch(make_trajectory), precision(operator))
    before = {name: value.clone() for name, value in batch.items()}
    run(operator, batch, kl_coef=0.1)
    assert all(torch.equal(batch[name], before[name]) for name in batch)
