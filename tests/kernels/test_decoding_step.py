"""A decoding step of latent and text rows: tokens of the sorted rule, ends of runs, log-probs, distributions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tolerances as tol
from support.kernels import kernel, with_kernel
from support.latent_steps import make_logits
from support.oracle_text import text_token
from torch import Tensor

from latent_kernels import LatentStepOptions, decoding_step, latent_logprob_from_logits, latent_step, philox_uniform
from latent_kernels.reference.latent_step import UNUSED_ID

PUBLIC_AND_TRITON = with_kernel(decoding_step)
CUTS = [(0.0, 0, 1.0), (1.0, 0, 1.0), (0.6, 30, 0.95), (0.3, 0, 0.9), (2.0, 5, 1.0), (1.0, 200, 0.5), (0.7, 1, 0.3)]
FAMILIES = ("normal", "near-uniform", "all-equal", "quantised", "mostly-masked", "three-finite", "one-finite", "peaked")

pytestmark = pytest.mark.usefixtures("small_segments")


def of_logits(operator: Any, logits: Tensor, options: LatentStepOptions, **text: Any) -> Any:
    """Run the operator on a head whose logits are given, and a table whose rows are their ids."""
    rows, vocab = logits.shape
    hidden, head = torch.eye(rows), logits.clamp(-1e30, 1e30).T.contiguous()
    return operator(hidden, head, torch.arange(vocab).float().unsqueeze(-1).repeat(1, 3), options, **text)


def of_text(operator: Any, logits: Tensor, draw: Tensor, cut: tuple[float, int, float]) -> Any:
    """Run the operator on rows that are all in their text."""
    options = LatentStepOptions(top_k=2, latent_mask=torch.zeros(len(logits), dtype=torch.bool))
    temperature, top_k, top_p = cut
    text = dict(temperature=temperature, text_top_k=top_k, text_top_p=top_p)
    return of_logits(operator, logits, options, **text, uniform=draw)


def expected_tokens(logits: Tensor, draw: Tensor, cut: tuple[float, int, float]) -> list[int]:
    """Return the tokens of the rule."""
    return [text_token(row, *cut, float(u)) for row, u in zip(logits, draw, strict=True)]


@PUBLIC_AND_TRITON
@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("kind", ["normal", "near-uniform", "quantised", "mostly-masked"])
def test_tokens_are_those_of_the_sorted_rule(operator, kind, cut):
    logits = make_logits(kind, 2, 190).clamp_min(-1e30)
    draw = torch.rand(2, dtype=torch.float64)
    step = of_text(operator, logits, draw, cut)
    assert step.token.tolist() == expected_tokens(logits, draw, cut)
    assert not step.is_latent.any()
    assert torch.equal(step.ids, torch.stack([step.token, torch.full_like(step.token, UNUSED_ID)], -1))
    assert torch.equal(step.scores, torch.zeros(2, 2))
    assert torch.equal(step.embedding, step.token.float().unsqueeze(-1).repeat(1, 3))
    tempered = logits / (cut[0] or 1.0)
    expected = tempered.double().log_softmax(-1).gather(-1, step.token.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(step.logprob, expected.float(), rtol=tol.FLOAT32, atol=1e-5)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(FAMILIES),
    cut=st.tuples(st.floats(0.05, 4.0), st.integers(0, 400), st.floats(0.01, 1.0)),
    vocab=st.integers(6, 5000),
    seed=st.integers(0, 2**32),
)
def test_eager_tokens_are_those_of_the_sorted_rule_whatever_the_options(kind, cut, vocab, seed):
    torch.manual_seed(seed)
    logits, draw = make_logits(kind, 5, vocab).clamp_min(-1e30), torch.rand(5, dtype=torch.float64)
    assert of_text(decoding_step, logits, draw, cut).token.tolist() == expected_tokens(logits, draw, cut)


@PUBLIC_AND_TRITON
def test_draws_at_the_ends_of_the_unit_interval_pick_the_first_and_the_last_token(operator):
    logits = make_logits("normal", 2, 150)
    draw = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for cut in CUTS:
        step = of_text(operator, logits, draw, cut)
        assert step.token.tolist() == expected_tokens(logits, draw, cut)


@PUBLIC_AND_TRITON
def test_a_mixed_batch_gives_every_row_what_it_gets_alone(operator):
    logits = make_logits("peaked", 6, 400)
    mask = torch.tensor([True, False, True, False, False, True])
    logits[2, 7] = logits[2].max() + 1.0  # the end marker has the highest logit, in a row of each kind
    logits[3, 7] = logits[3].max() + 1.0
    text = dict(temperature=0.6, text_top_k=20, text_top_p=0.9)
    shared = dict(top_k=4, seed=5, end_token_id=7)
    steps, streams = torch.arange(6) * 3, torch.arange(6) * 1000
    together = LatentStepOptions(step=steps, row_ids=streams, latent_mask=mask, **shared)
    step = of_logits(operator, logits, together, **text)
    assert step.is_latent.tolist() == [True, False, False, False, False, True]
    assert step.token[2] == 7
    for row in range(6):
        one = slice(row, row + 1)
        alone = LatentStepOptions(step=steps[one], row_ids=streams[one], latent_mask=mask[one], **shared)
        for together_, alone_ in zip(step, of_logits(operator, logits[one], alone, **text), strict=True):
            torch.testing.assert_close(together_[one], alone_, rtol=tol.FLOAT32, atol=1e-5)
    draw = philox_uniform(streams, seed=5, step=steps)
    expected = expected_tokens(logits, draw, (0.6, 20, 0.9))
    assert [step.token[row].item() for row in (1, 3, 4)] == [expected[row] for row in (1, 3, 4)]
    logprob = latent_logprob_from_logits(logits, step.ids, step.scores, temperature=0.6)
    torch.testing.assert_close(step.logprob, logprob, rtol=tol.FLOAT32, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_mixed_batch_is_the_same_under_autocast(dtype):
    inputs = torch.randn(4, 8), torch.randn(60, 8), torch.randn(60, 3).to(dtype)
    options = dict(top_k=3, seed=1, latent_mask=torch.tensor([True, False, False, True]), text_top_k=9)
    expected = decoding_step(*inputs, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step = decoding_step(*inputs, **options)
    assert all(torch.equal(one, other) for one, other in zip(step, expected, strict=True))


@PUBLIC_AND_TRITON
@pytest.mark.parametrize("method", ["latent_grpo", "soft_grpo", "multiplex"])
@pytest.mark.parametrize("end_rule", ["raw", "noisy"])
def test_latent_rows_take_the_step_of_latent_step(operator, method, end_rule):
    hidden, head, table = torch.randn(5, 16), torch.randn(300, 16), torch.randn(300, 6)
    head[9] = 2.0 * hidden[1]  # the end marker is likely in one row
    options = dict(top_k=3, top_p=1.0, seed=2, end_token_id=9, method=method, end_rule=end_rule, max_latent_steps=8)
    options |= dict(step=torch.tensor([0, 1, 2, 3, 8]), bias=0.1 * torch.randn(300), logit_scale=0.7, softcap=20.0)
    impl = "eager" if operator is decoding_step else "triton"
    plain = (latent_step if impl == "eager" else kernel(latent_step))(hidden, head, table, **options)
    step = operator(hidden, head, table, **options, temperature=0.8, text_top_k=10)
    assert torch.equal(step.is_latent, plain.is_latent)
    assert torch.equal(step.token, plain.top_token)
    assert not step.is_latent[4]
    latent, hard = step.is_latent, ~step.is_latent
    assert torch.equal(step.ids[latent], plain.ids[latent])
    assert torch.equal(step.scores[latent], plain.scores[latent])
    torch.testing.assert_close(step.embedding[latent], plain.embedding[latent])
    assert (step.ids[hard, 1:] == UNUSED_ID).all()
    assert torch.equal(step.embedding[hard], table[step.token[hard]])
    logits = 20.0 * torch.tanh(0.7 * (hidden @ head.T + options["bias"]) / 20.0)
    expected = latent_logprob_from_logits(logits, step.ids, step.scores, temperature=0.8, method=method)
    torch.testing.assert_close(step.logprob, expected, rtol=tol.FLOAT32, atol=1e-4)


def test_tokens_have_the_distribution_of_the_options():
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0, -3.0]])
    draws = 20_000
    for cut in ((0.8, 4, 0.9), (0.8, 0, 1.0)):
        draw = philox_uniform(torch.arange(draws), seed=11, step=0)
        tokens = of_text(decoding_step, logits.expand(draws, -1), draw, cut).token
        probs = (logits[0] / cut[0]).softmax(-1)
        kept = probs * (torch.arange(5) < (cut[1] or 5))
        kept = kept * (kept.cumsum(-1) - kept < cut[2] * kept.sum())
        expected = draws * kept / kept.sum()
        counts = torch.bincount(tokens, minlength=5).float()
        used = expected > 0
        assert (counts[~used] == 0).all()
        chi_squared = float(((counts - expected).square() / expected)[used].sum())
        assert chi_squared < 18.5  # the 0.1% point for 4 degrees of freedom


@PUBLIC_AND_TRITON
def test_an_empty_batch_has_an_empty_step(operator):
    step = operator(torch.zeros(0, 8), torch.randn(40, 8), torch.randn(40, 3), top_k=2, seed=0)
    assert [tuple(part.shape) for part in step] == [(0, 2), (0, 2), (0, 3), (0,), (0,), (0,)]


def test_one_component_has_no_room_for_the_mark_of_text():
    with pytest.raises(ValueError, match=r"^top_k must be at least 2, .* got 1$"):
        decoding_step(torch.zeros(1, 8), torch.randn(40, 8), torch.randn(40, 3), top_k=1)
    with pytest.raises(TypeError, match=r"^text_top_k must be an int, got float$"):
        decoding_step(torch.zeros(1, 8), torch.randn(40, 8), torch.randn(40, 3), text_top_k=2.0)
    with pytest.raises(TypeError, match=r"^uniform must be torch.float64, got torch.float32$"):
        decoding_step(torch.zeros(1, 8), torch.randn(40, 8), torch.randn(40, 3), uniform=torch.rand(1))
