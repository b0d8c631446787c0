"""Properties of the latent step that no single case shows: the product with the head, permutations, shifts, ties."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import oracle
from support import tolerances as tol
from support.kernels import NEEDS_TRITON
from support.latent_steps import WIDTH, assert_same_step, make_logits
from torch import Tensor

from latent_kernels import LatentStep, LatentStepOptions, latent_step, latent_step_from_logits, latent_step_with_logits
from latent_kernels import _linear as linear
from latent_kernels._noise import exponential_draws
from latent_kernels.reference.latent_step import latent_step_from_logits_ref

pytestmark = pytest.mark.usefixtures("small_segments")


# From hidden states


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("blocks", ["one-block", "many-blocks"])
def test_from_hidden_is_the_product_then_the_step(dtype, tied, blocks, monkeypatch):
    if blocks == "many-blocks":
        monkeypatch.setattr(linear, "BLOCK_ROWS", 7)
    # Small multiples of a quarter: products and sums are exact in every dtype and order, and ties abound.
    hidden = (torch.randint(-8, 9, (6, 16)) / 4).to(dtype)
    head = (torch.randint(-8, 9, (257, 16)) / 4).to(dtype)
    table = head if tied else torch.randn(257, WIDTH).to(dtype)
    logits = hidden.double() @ head.double().T
    logits = logits if dtype == torch.float64 else logits.float()
    step = latent_step(hidden, head, table, seed=4, step=2)
    expected = oracle.latent_step(logits, table, seed=4, step=2)
    assert_same_step(step, expected)
    assert step.embedding.shape == (6, table.shape[1])


def test_from_hidden_passes_every_option_on():
    hidden, head = torch.randint(-8, 9, (4, 16)) / 4, torch.randint(-8, 9, (99, 16)) / 4
    shared = dict(top_k=7, top_p=0.6, tau=0.4, noise="two_sided", noise_scale=1.7, row_ids=torch.tensor([5, 1, 9, 2]))
    shared |= dict(latent_mask=torch.tensor([True, True, False, True]))
    shared |= dict(end_token_id=int((hidden @ head.T)[1].argmax()))
    for source in ({"seed": 3, "step": 8}, {"exponential": torch.empty(4, 99).exponential_()}):
        expected = latent_step_from_logits(hidden @ head.T, head, **shared, **source)
        assert not expected.is_latent[1]
        actual = latent_step(hidden, head, head, **shared, **source)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_low_precision_head_is_accumulated_in_float32():
    hidden, head = torch.randn(4, 512).bfloat16(), torch.randn(300, 512).bfloat16()
    step = latent_step(hidden, head, head, noise="none", top_k=300)
    exact = (hidden.double() @ head.double().T).log_softmax(-1)
    torch.testing.assert_close(step.scores.double(), exact.gather(-1, step.ids), rtol=0, atol=1e-4)


def test_no_gradient_is_recorded_and_autocast_changes_nothing():
    hidden = torch.randn(3, 16, requires_grad=True)
    head = torch.randn(99, 16, requires_grad=True)
    plain = latent_step(hidden, head, head, seed=0)
    assert not any(field.requires_grad for field in plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = latent_step(hidden, head, head, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(cast, plain, strict=True))


@pytest.mark.parametrize("impl", ["eager", pytest.param("triton", marks=NEEDS_TRITON)])
def test_a_step_with_its_logits_is_the_same_step(impl):
    hidden, head, table = torch.randn(2, 16), torch.randn(300, 16), torch.randn(300, 8)
    step, logits = latent_step_with_logits(hidden, head, table, LatentStepOptions(seed=3), impl=impl)
    torch.testing.assert_close(logits, hidden @ head.T, rtol=1e-4, atol=1e-4)
    without_logits = latent_step(hidden, head, table, seed=3, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(step, without_logits, strict=True))
    by_name, _ = latent_step_with_logits(hidden, head, table, seed=3, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(step, by_name, strict=True))


def test_options_of_a_step_are_given_once():
    hidden, head = torch.randn(2, 16), torch.randn(30, 16)
    with pytest.raises(TypeError, match="give options or seed, not both"):
        latent_step_with_logits(hidden, head, head, LatentStepOptions(), seed=3)
    with pytest.raises(TypeError, match="topk"):
        latent_step_with_logits(hidden, head, head, topk=3)


# From logits


def test_inputs_are_left_as_they_were():
    inputs = make_logits("normal", 4, 333), torch.randn(333, WIDTH)
    row_ids, draws = torch.arange(4), torch.empty(4, 333).exponential_()
    before = [t.clone() for t in (*inputs, row_ids, draws)]
    latent_step_from_logits(*inputs, exponential=draws, row_ids=row_ids)
    assert all(torch.equal(a, b) for a, b in zip((*inputs, row_ids, draws), before, strict=True))


@st.composite
def steps(draw: st.DrawFn) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return logits with ties and masked tokens, an embedding table, and options."""
    rows, vocab = draw(st.integers(1, 5)), draw(st.integers(2, 140))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(rows, vocab, generator=generator) * draw(st.sampled_from([0.0, 0.01, 1.0, 6.0]))
    if draw(st.booleans()):
        logits = logits.round()
    masked = torch.rand(rows, vocab, generator=generator) < draw(st.sampled_from([0.0, 0.5, 0.95]))
    masked[:, int(torch.randint(vocab, (), generator=generator))] = False
    options = dict(
        top_k=draw(st.integers(1, min(vocab, 20))),
        top_p=draw(st.sampled_from([0.0, 0.3, 0.95, 1.0])),
        tau=draw(st.sampled_from([0.2, 1.0])),
        noise=draw(st.sampled_from(["one_sided", "two_sided", "none"])),
        noise_scale=draw(st.sampled_from([0.0, 0.5, 1.0, 3.0])),
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
        step=draw(st.integers(0, 1000)),
        row_ids=torch.randint(-(2**60), 2**60, (rows,), generator=generator),
    )
    return logits.masked_fill(masked, -torch.inf), torch.randn(vocab, WIDTH, generator=generator), options


@given(steps())
def test_any_step_equals_the_oracle(inputs):
    logits, table, options = inputs
    expected = oracle.latent_step(logits, table, **options)
    for operator in (latent_step_from_logits, latent_step_from_logits_ref):
        assert_same_step(operator(logits, table, **options), expected)


@given(steps(), st.integers(0, 1000))
def test_the_noise_of_a_row_follows_its_row_id(inputs, seed):
    logits, table, options = inputs
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    expected = latent_step_from_logits(logits, table, **options)
    options["row_ids"] = options["row_ids"][order]
    actual = latent_step_from_logits(logits[order], table, **options)
    assert_same_step(actual, LatentStep(*(part[order] for part in expected)))


@given(steps())
def test_other_rows_of_the_batch_do_not_change_a_row(inputs):
    logits, table, options = inputs
    together = latent_step_from_logits(logits, table, **options)
    row_ids = options.pop("row_ids")
    for row in range(len(logits)):
        part = slice(row, row + 1)
        only_row = latent_step_from_logits(logits[part], table, row_ids=row_ids[part], **options)
        assert_same_step(only_row, LatentStep(*(value[part] for value in together)))


@given(steps(), st.sampled_from([-48.0, 32.0]))
def test_a_constant_added_to_the_logits_changes_nothing(inputs, shift):
    logits, table, options = inputs
    logits = (logits * 64).round() / 64  # so that the shifted logits are exact and ties stay ties
    expected = latent_step_from_logits(logits.double(), table, **options)
    actual = latent_step_from_logits(logits.double() + shift, table, **options)
    assert_same_step(actual, expected, scores=tol.SHIFTED_LOGITS)


@given(steps())
def test_weights_are_a_distribution_and_scores_descend(inputs):
    logits, table, options = inputs
    step = latent_step_from_logits(logits, table, **options)
    assert (step.weights >= 0).all()
    assert (step.weights.sum(-1) - 1.0).abs().max() <= tol.WEIGHT_SUM
    assert (step.scores[:, 1:] <= step.scores[:, :-1]).all()
    assert (step.ids.sort(-1).values.diff(dim=-1) > 0).all(), "a row has an id twice"
    assert ((step.ids >= 0) & (step.ids < logits.shape[1])).all()
    assert torch.isfinite(step.embedding).all()


@given(vocab=st.integers(40, 300), top_k=st.integers(1, 32), noise=st.sampled_from(["one_sided", "none"]))
def test_ties_go_to_the_lower_id(vocab, top_k, noise):
    # Two levels of logits: the kept ids are the lowest of the higher level, then the lowest of the lower one.
    logits, table = torch.zeros(2, vocab), torch.randn(vocab, WIDTH)
    raised = torch.arange(vocab - 5, vocab)
    logits[:, raised] = 1.0
    step = latent_step_from_logits(logits, table, top_k=top_k, noise=noise, noise_scale=0.0, seed=0, top_p=1.0)
    expected = torch.cat([raised, torch.arange(vocab - 5)])[:top_k]
    assert torch.equal(step.ids, expected.expand(2, -1))
    assert torch.equal(step.top_token, raised[:1].expand(2))


def test_draws_of_hard_rows_are_not_read():
    logits, table, draws = make_logits("normal", 4, 333), torch.randn(333, WIDTH), torch.empty(4, 333).exponential_()
    mask = torch.tensor([True, False, True, False])
    expected = latent_step_from_logits(logits, table, exponential=draws, latent_mask=mask)
    draws[~mask] = torch.nan
    actual = latent_step_from_logits(logits, table, exponential=draws, latent_mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_a_row_without_noise_is_the_same_beside_rows_with_noise():
    """Its logits differ by one unit in the last place, which their log-probs lose."""
    logits = torch.zeros(2, 50)
    logits[:, 30:] = 1.0
    logits[:, 7] = 1.0 - 2.0**-24
    table, latent = torch.randn(50, 4), torch.tensor([True, False])
    assert logits.log_softmax(-1)[1, 7] == logits.log_softmax(-1)[1, 30]
    mixed = latent_step_from_logits(logits, table, top_k=5, seed=0, latent_mask=latent)
    assert torch.equal(mixed.ids[1], torch.arange(30, 35))


def test_peaked_rows_draw_noise_for_few_tokens_only(monkeypatch):
    import latent_kernels._eager.latent_step as eager

    drawn = []

    def counted(ids: Tensor, *args: Any) -> Tensor:
        drawn.append(ids.shape[1])
        return exponential_draws(ids, *args)

    monkeypatch.setattr(eager, "exponential_draws", counted)
    latent_step_from_logits(make_logits("peaked", 4, 32000), torch.randn(32000, WIDTH), seed=0)
    assert drawn
    assert max(drawn) < 32000 / 10
