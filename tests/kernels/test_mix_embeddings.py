"""Replay of a trajectory's input embeddings: mixtures of latent rows, table rows of text rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import tolerances as tol
from support.golden import latent_step_options
from support.kernels import NEEDS_TRITON, kernel, with_kernel
from support.oracle import mixture as oracle_mixture
from support.oracle import mixture_gradients
from torch import Tensor

from latent_kernels import latent_step_from_logits, mix_embeddings
from latent_kernels.reference.latent_step import mix_embeddings_ref

triton_mix = kernel(mix_embeddings)
PUBLIC_AND_REFERENCE = with_kernel(mix_embeddings, mix_embeddings_ref)
PUBLIC_AND_TRITON = with_kernel(mix_embeddings)


def make_rows(rows: int = 7, vocab: int = 33, top_k: int = 5, width: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids and scores [N, K] of mixed latent and text rows, and a table [V, D]."""
    ids, scores = torch.randint(vocab, (rows, top_k)), 2.0 * torch.randn(rows, top_k)
    ids[1::3, 1:] = -100
    return ids, scores, torch.randn(vocab, width)


@PUBLIC_AND_REFERENCE
@pytest.mark.golden("official_a_latent_step")
def test_mixtures_equal_those_of_the_released_code(operator, golden_case):
    options = latent_step_options(golden_case)
    ended = golden_case["logits"].argmax(-1) == options["end_token_id"]
    live = golden_case["latent"] & ~ended  # scores of the other rows mean nothing
    tau = 1.0 if options["noise"] == "none" else options["tau"]  # tau is not applied without noise
    mixture = operator(golden_case["ids"][live], golden_case["scores"][live], golden_case["table"], tau=tau)
    assert live.sum() >= 4
    torch.testing.assert_close(mixture, golden_case["embedding"][live], rtol=0, atol=tol.GOLDEN_VALUE)


@PUBLIC_AND_REFERENCE
@pytest.mark.parametrize(
    ("rows", "top_k"), [(7, 5), (1, 5), (0, 5), (12, 32), (6, 1)], ids=["7x5", "one-row", "no-rows", "12x32", "k-1"]
)
@pytest.mark.parametrize("tau", [0.3, 1.0, "per-row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_mixtures_equal_the_oracle(operator, rows, top_k, tau, dtype):
    ids, scores, table = make_rows(rows, top_k=top_k)
    table = table.to(dtype)
    tau = torch.linspace(0.2, 3.0, rows) if tau == "per-row" else tau
    mixture = operator(ids, scores, table, tau=tau)
    expected = oracle_mixture(ids, scores, table, tau)
    assert mixture.dtype == dtype
    torch.testing.assert_close(mixture.double(), expected, rtol=0, atol=4 * tol.EMBEDDING[dtype])


def test_replay_equals_the_embedding_of_the_step():
    logits, table = 3.0 * torch.randn(6, 500), torch.randn(500, 8)
    step = latent_step_from_logits(logits, table, seed=0, tau=0.7)
    assert torch.equal(mix_embeddings(step.ids, step.scores, table, tau=0.7), step.embedding)


@PUBLIC_AND_TRITON
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("junk", [torch.nan, torch.inf, -torch.inf, 0.0], ids=["nan", "inf", "-inf", "zero"])
def test_text_rows_are_exact_rows_of_the_table_whatever_their_scores(operator, dtype, junk):
    ids, scores, table = make_rows()
    text = ids[:, 1] == -100
    scores[text] = junk
    table = table.to(dtype)
    mixture = operator(ids, scores, table)
    assert torch.equal(mixture[text], table[ids[text, 0]])
    assert torch.isfinite(mixture).all()


@PUBLIC_AND_TRITON
def test_minus_100_marks_a_text_row_in_any_place_but_the_first(operator):
    ids, scores, table = make_rows(3)
    ids[:] = 4
    ids[0, -1] = ids[1, 2] = -100
    mixture = operator(ids, scores, table)
    assert torch.equal(mixture[:2], table[4].expand(2, -1))


def assert_shift_changes_nothing(operator, seed: int, shift: float) -> None:
    """The softmax of scores does not see a constant."""
    torch.manual_seed(seed)
    ids, scores, table = make_rows()
    actual = operator(ids, scores + shift, table)
    torch.testing.assert_close(actual, operator(ids, scores, table), rtol=0, atol=tol.SHIFTED_LOGITS)


@given(st.integers(0, 2**31), st.floats(-30.0, 30.0))
def test_a_constant_added_to_the_scores_changes_nothing(seed, shift):
    assert_shift_changes_nothing(mix_embeddings, seed, shift)


@NEEDS_TRITON
@pytest.mark.parametrize("shift", [-30.0, 7.3])
def test_a_constant_added_to_the_scores_changes_nothing_for_the_kernel(shift):
    assert_shift_changes_nothing(triton_mix, 0, shift)


@PUBLIC_AND_TRITON
def test_the_order_of_components_and_those_of_score_minus_inf_do_not_matter(operator):
    ids, scores, table = make_rows(4)
    ids = ids.clamp_min(0)
    order = torch.tensor([3, 0, 4, 2, 1])
    expected = operator(ids, scores, table)
    torch.testing.assert_close(operator(ids[:, order], scores[:, order], table), expected)
    scores[:, 2] = -torch.inf
    kept = [0, 1, 3, 4]
    torch.testing.assert_close(operator(ids, scores, table), operator(ids[:, kept], scores[:, kept], table))


@PUBLIC_AND_TRITON
def test_strides_of_the_inputs_do_not_matter(operator):
    ids, scores, table = make_rows()
    strided = (ids.T.contiguous().T, scores.T.contiguous().T, table.T.contiguous().T)
    assert not any(t.is_contiguous() for t in strided)
    torch.testing.assert_close(operator(*strided), operator(ids, scores, table))


@PUBLIC_AND_REFERENCE
def test_temperatures_need_not_be_contiguous(operator):
    ids, scores = torch.randint(9, (6, 3)), torch.randn(6, 3)
    table, tau = torch.randn(9, 5), torch.rand(12) + 0.5
    for temperatures in (tau[::2], torch.full((), 0.7).expand(6)):
        expected = operator(ids, scores, table, tau=temperatures.contiguous())
        torch.testing.assert_close(operator(ids, scores, table, tau=temperatures), expected, rtol=0, atol=0)


def test_the_gradient_is_that_of_the_value():
    ids, scores, table = make_rows(5)
    scores, table = scores.double().requires_grad_(), table.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s, e: mix_embeddings(ids, s, e, tau=0.7), (scores, table))


@PUBLIC_AND_TRITON
def test_text_rows_give_no_gradient_to_their_scores_and_one_to_their_token(operator):
    ids, scores, table = make_rows()
    text = ids[:, 1] == -100
    scores[text] = torch.nan
    scores.requires_grad_()
    table.requires_grad_()
    operator(ids, scores, table)[text].sum().backward()
    assert torch.equal(scores.grad[text], torch.zeros_like(scores[text]))
    counts = ids[text, 0].bincount(minlength=len(table)).float()
    assert torch.equal(table.grad, counts.unsqueeze(-1).expand_as(table))


@PUBLIC_AND_TRITON
@pytest.mark.parametrize("required", ["scores", "embedding", "neither", "no-grad"])
def test_only_the_required_gradients_are_computed(operator, required):
    ids, scores, table = make_rows()
    scores.requires_grad_(required in ("scores", "no-grad"))
    table.requires_grad_(required in ("embedding", "no-grad"))
    with torch.set_grad_enabled(required != "no-grad"):
        mixture = operator(ids, scores, table)
    assert mixture.requires_grad == (required in ("scores", "embedding"))
    if mixture.requires_grad:
        mixture.square().sum().backward()
        leaf = scores if required == "scores" else table
        assert leaf.grad.abs().sum() > 0


def assert_gradients_equal_the_oracle(operator, tau, dtype: torch.dtype) -> None:
    """The operator's gradients over several tiles, with one token in every place of a row."""
    ids, scores, table = make_rows(9, top_k=6, width=300)  # more than one tile, and not a multiple of it
    ids[3] = ids[3, 0]  # the gradients of a repeated token add up
    table, upstream = table.to(dtype), torch.randn(9, 300).to(dtype)
    tau = torch.linspace(0.2, 3.0, 9) if tau == "per-row" else tau
    expected = mixture_gradients(ids, scores, table, tau, upstream)
    leaves = (scores.requires_grad_(), table.requires_grad_())
    operator(ids, *leaves, tau=tau).backward(upstream)
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        rtol, atol = tol.EMBEDDING[leaf.dtype], 20 * tol.EMBEDDING[torch.float32]
        torch.testing.assert_close(leaf.grad.double(), gradient, rtol=rtol, atol=atol)


@PUBLIC_AND_REFERENCE
@pytest.mark.parametrize("tau", [0.7, "per-row"])
def test_gradients_equal_the_oracle(operator, tau):
    assert_gradients_equal_the_oracle(operator, tau, torch.float32)


@PUBLIC_AND_TRITON
@pytest.mark.parametrize("tau", [0.7, "per-row"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_of_low_precision_are_rounded_only_once(operator, dtype, tau):
    assert_gradients_equal_the_oracle(operator, tau, dtype)


@NEEDS_TRITON
def test_a_second_derivative_of_the_kernel_raises():
    ids, scores, table = make_rows()
    scores.requires_grad_()
    mixed = triton_mix(ids, scores, table)
    for total in (mixed.sum(), mixed.square().sum()):  # the upstream gradient is a constant, or has a graph
        (gradient,) = torch.autograd.grad(total, scores, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


IDS = torch.zeros(4, 3, dtype=torch.int64)
INVALID = {
    "ids-dtype": (dict(ids=IDS.int()), TypeError, "ids must be torch.int64, got torch.int32"),
    "ids-shape": (dict(ids=IDS[0]), ValueError, r"ids must have shape \[\*, \*\], got \[3\]"),
    "ids-empty": (dict(ids=IDS[:, :0], scores=torch.zeros(4, 0)), ValueError, r"ids .* component .* \[4, 0\]"),
    "scores-shape": (dict(scores=torch.zeros(4, 2)), ValueError, r"scores must have shape \[4, 3\], got \[4, 2\]"),
    "scores-dtype": (dict(scores=IDS), TypeError, "scores .* got torch.int64"),
    "table-shape": (dict(embedding=torch.zeros(9)), ValueError, r"embedding .* got \[9\]"),
    "table-dtype": (dict(embedding=torch.zeros(9, 2, dtype=torch.int64)), TypeError, "embedding .* got torch.int64"),
    "device": (dict(embedding=torch.zeros(9, 2, device="meta")), ValueError, "embedding is on meta"),
    "tau": (dict(tau=0.0), ValueError, r"tau must be in \(0, inf\], got 0.0"),
    "tau-rows": (dict(tau=torch.ones(3)), ValueError, r"tau must have shape \[4\], got \[3\]"),
    "impl-bogus": (dict(impl="bogus"), ValueError, "impl must be one of .* got 'bogus'"),
    "impl-triton": (dict(impl="triton"), RuntimeError, "use impl='auto'"),
}


@pytest.mark.parametrize(("change", "error", "message"), INVALID.values(), ids=INVALID)
def test_an_error_names_the_wrong_argument(change, error, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = {"ids": IDS, "scores": torch.zeros(4, 3), "embedding": torch.zeros(9, 2), **change}
    with pytest.raises(error, match=message):
        mix_embeddings(**arguments)
