"""Replay of a trajectory's input embeddings: mixtures of latent rows, table rows of text rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import tolerances as tol
from support.kernels import NEEDS_TRITON, kernel, with_kernel
from torch import Tensor

from latent_kernels import latent_step_from_logits, mix_embeddings
from latent_kernels.reference import mix_embeddings_ref

triton_mix = kernel(mix_embeddings)
PUBLIC_AND_REFERENCE = with_kernel(mix_embeddings, mix_embeddings_ref)
PUBLIC_AND_TRITON = with_kernel(mix_embeddings)


def make_rows(rows: int = 7, vocab: int = 33, top_k: int = 5, width: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """ids and scores of mixed latent and text rows, and a table."""
    ids, scores = torch.randint(vocab, (rows, top_k)), 2.0 * torch.randn(rows, top_k)
    ids[1::3, 1:] = -100
    return ids, scores, torch.randn(vocab, width)


def mixture_by_hand(ids: Tensor, scores: Tensor, table: Tensor, tau: Tensor) -> Tensor:
    """float64 mixtures, one row and component at a time; -100 marks a text row."""
    out = torch.zeros(len(ids), table.shape[1], dtype=torch.float64)
    for row in range(len(ids)):
        if (ids[row, 1:] == -100).any():
            out[row] = table[ids[row, 0]]
            continue
        weights = (scores[row].double() / tau[row].double()).softmax(-1)
        for k in range(ids.shape[1]):
            out[row] += weights[k] * table[ids[row, k]].double()
    return out


@PUBLIC_AND_REFERENCE
@pytest.mark.golden("official_a_latent_step")
def test_golden_vectors(operator, golden_case):
    _, _, _, _, _, tau, _, noise_on, end = golden_case["params"].tolist()
    ended = golden_case["logits"].argmax(-1) == int(end)
    noisy = golden_case["latent"] & ~ended & bool(noise_on)  # elsewhere the scores mean nothing, or tau is not applied
    if not noise_on:
        noisy, tau = golden_case["latent"] & ~ended, 1.0
    mixture = operator(golden_case["ids"][noisy], golden_case["scores"][noisy], golden_case["table"], tau=tau)
    assert noisy.sum() >= 4
    torch.testing.assert_close(mixture, golden_case["embedding"][noisy], rtol=0, atol=tol.GOLDEN_VALUE)


@PUBLIC_AND_REFERENCE
@pytest.mark.parametrize(
    ("rows", "top_k"), [(7, 5), (1, 5), (0, 5), (40, 32), (6, 1)], ids=["7x5", "one-row", "no-rows", "40x32", "k-1"]
)
@pytest.mark.parametrize("tau", [0.3, 1.0, "a-row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_equals_the_sum_by_hand(operator, rows, top_k, tau, dtype):
    ids, scores, table = make_rows(rows, top_k=top_k)
    table = table.to(dtype)
    tau = torch.linspace(0.2, 3.0, rows) if tau == "a-row" else tau
    mixture = operator(ids, scores, table, tau=tau)
    expected = mixture_by_hand(ids, scores, table, torch.as_tensor(tau).expand(rows))
    assert mixture.dtype == dtype
    torch.testing.assert_close(mixture.double(), expected, rtol=0, atol=4 * tol.EMBEDDING[dtype])


def test_replay_equals_the_embedding_of_the_step():
    logits, table = 3.0 * torch.randn(6, 500), torch.randn(500, 8)
    step = latent_step_from_logits(logits, table, seed=0, tau=0.7)
    assert torch.equal(mix_embeddings(step.ids, step.scores, table, tau=0.7), step.embedding)


@PUBLIC_AND_TRITON
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("junk", [torch.nan, torch.inf, -torch.inf, 0.0], ids=["nan", "inf", "-inf", "zero"])
def test_text_rows_are_the_table_exactly_whatever_their_scores(operator, dtype, junk):
    ids, scores, table = make_rows()
    text = ids[:, 1] == -100
    scores[text] = junk
    table = table.to(dtype)
    mixture = operator(ids, scores, table)
    assert torch.equal(mixture[text], table[ids[text, 0]])
    assert torch.isfinite(mixture).all()


@PUBLIC_AND_TRITON
def test_one_hundred_marks_a_text_row_in_any_place_behind_the_first(operator):
    ids, scores, table = make_rows(3)
    ids[:] = 4
    ids[0, -1] = ids[1, 2] = -100
    mixture = operator(ids, scores, table)
    assert torch.equal(mixture[:2], table[4].expand(2, -1))


@PUBLIC_AND_TRITON
@given(st.integers(0, 2**31), st.floats(-30.0, 30.0))
def test_a_constant_added_to_the_scores_changes_nothing(operator, seed, shift):
    torch.manual_seed(seed)
    ids, scores, table = make_rows()
    got = operator(ids, scores + shift, table)
    torch.testing.assert_close(got, operator(ids, scores, table), rtol=0, atol=tol.SHIFTED_LOGITS)


@PUBLIC_AND_TRITON
def test_components_commute_and_masked_ones_count_for_nothing(operator):
    ids, scores, table = make_rows(4)
    ids = ids.clamp_min(0)
    order = torch.tensor([3, 0, 4, 2, 1])
    expected = operator(ids, scores, table)
    torch.testing.assert_close(operator(ids[:, order], scores[:, order], table), expected)
    scores[:, 2] = -torch.inf
    kept = [0, 1, 3, 4]
    torch.testing.assert_close(operator(ids, scores, table), operator(ids[:, kept], scores[:, kept], table))


@PUBLIC_AND_TRITON
def test_strided_inputs_equal_contiguous_ones(operator):
    ids, scores, table = make_rows()
    strided = (ids.T.contiguous().T, scores.T.contiguous().T, table.T.contiguous().T)
    assert not any(t.is_contiguous() for t in strided)
    torch.testing.assert_close(operator(*strided), operator(ids, scores, table))


@with_kernel(mix_embeddings, mix_embeddings_ref)
def test_temperatures_need_not_be_contiguous(operator):
    ids, scores = torch.randint(9, (6, 3)), torch.randn(6, 3)
    table, tau = torch.randn(9, 5), torch.rand(12) + 0.5
    for temperatures in (tau[::2], torch.full((), 0.7).expand(6)):
        expected = operator(ids, scores, table, tau=temperatures.contiguous())
        torch.testing.assert_close(operator(ids, scores, table, tau=temperatures), expected, rtol=0, atol=0)


def test_gradcheck():
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
@pytest.mark.parametrize("wanted", ["scores", "embedding", "neither", "no-grad"])
def test_gradient_subsets(operator, wanted):
    ids, scores, table = make_rows()
    scores.requires_grad_(wanted in ("scores", "no-grad"))
    table.requires_grad_(wanted in ("embedding", "no-grad"))
    with torch.set_grad_enabled(wanted != "no-grad"):
        mixture = operator(ids, scores, table)
    assert mixture.requires_grad == (wanted in ("scores", "embedding"))
    if mixture.requires_grad:
        mixture.square().sum().backward()
        leaf = scores if wanted == "scores" else table
        assert leaf.grad.abs().sum() > 0


@NEEDS_TRITON
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tau", [0.7, "a-row"])
def test_gradients_of_the_kernel_are_those_of_float64(dtype, tau):
    ids, scores, table = make_rows(9, top_k=6, width=300)  # more than one tile, and not a multiple of it
    ids[3] = ids[3, 0]  # one token in every place: its gradient adds up
    table = table.to(dtype)
    tau = torch.linspace(0.2, 3.0, 9) if tau == "a-row" else tau
    upstream = torch.randn(9, 300).to(dtype)
    exact = (scores.double().requires_grad_(), table.double().requires_grad_())
    mix_embeddings(ids, *exact, tau=tau).backward(upstream.double())
    leaves = (scores.requires_grad_(), table.requires_grad_())
    triton_mix(ids, *leaves, tau=tau).backward(upstream)
    for leaf, wanted in zip(leaves, exact, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        torch.testing.assert_close(
            leaf.grad.double(), wanted.grad, rtol=tol.EMBEDDING[leaf.dtype], atol=20 * tol.EMBEDDING[torch.float32]
        )


@NEEDS_TRITON
def test_the_kernel_has_no_second_derivative_and_says_so():
    ids, scores, table = make_rows()
    scores.requires_grad_()
    (gradient,) = torch.autograd.grad(triton_mix(ids, scores, table).square().sum(), scores, create_graph=True)
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
def test_wrong_arguments_are_named(change, error, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = {"ids": IDS, "scores": torch.zeros(4, 3), "embedding": torch.zeros(9, 2), **change}
    with pytest.raises(error, match=message):
        mix_embeddings(**arguments)
