"""The latent step: golden vectors, the eager path (no sort, bounded noise) against the plain rule, properties."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import tolerances as tol
from support.kernels import DEVICE, NEEDS_TRITON, kernel, with_kernel
from torch import Tensor

from latent_kernels import LatentStep, LatentStepOptions, latent_step, latent_step_from_logits, latent_step_with_logits
from latent_kernels import _linear as linear
from latent_kernels._dispatch import MAX_TOP_K
from latent_kernels._noise import exponential_draws
from latent_kernels.reference import latent_step_from_logits_ref

WIDTH = 12  # of the embedding table
triton_step, triton_step_from_logits = kernel(latent_step), kernel(latent_step_from_logits)
PUBLIC_AND_REFERENCE = with_kernel(latent_step_from_logits, latent_step_from_logits_ref)
PUBLIC_AND_TRITON = with_kernel(latent_step_from_logits)


@pytest.fixture(autouse=True)
def _small_segments(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short buffer for the interpreter, which sorts one element after the other; it also makes rows overflow it."""
    if DEVICE == "cpu" and "default_buffer" not in request.keywords and importlib.util.find_spec("triton"):
        import latent_kernels._triton.latent_step as module

        monkeypatch.setattr(module, "BUFFER", 64)
        monkeypatch.setattr(module, "BUFFER_PER_K", 4)


def assert_same_step(got: LatentStep, expected: LatentStep, *, scores: float = tol.STEP_SCORES) -> None:
    """Ids and flags equal; values to their tolerance, -inf scores at the same places."""
    assert torch.equal(got.top_token, expected.top_token)
    assert torch.equal(got.is_latent, expected.is_latent)
    assert torch.equal(got.ids, expected.ids)
    torch.testing.assert_close(got.scores, expected.scores, rtol=0, atol=scores)
    torch.testing.assert_close(got.weights, expected.weights, rtol=0, atol=tol.STEP_WEIGHTS)
    assert got.embedding.dtype == expected.embedding.dtype
    scale = max(1.0, expected.embedding.abs().max().item()) if expected.embedding.numel() else 1.0
    atol = tol.EMBEDDING[expected.embedding.dtype] * scale
    torch.testing.assert_close(got.embedding, expected.embedding, rtol=0, atol=atol)


# Golden vectors


def golden_options(case: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Keyword arguments of a golden case, and whether it draws noise."""
    _, _, top_k, top_p, scale, tau, one_sided, noise_on, end = case["params"].tolist()
    kind = "one_sided" if one_sided else "two_sided"
    options = dict(
        top_k=int(top_k), top_p=top_p, tau=tau, noise_scale=scale, noise=kind if noise_on else "none",
        exponential=case["exponential"], latent_mask=case["latent"], end_token_id=int(end),
    )  # fmt: skip
    return options, bool(noise_on)


@PUBLIC_AND_REFERENCE
@pytest.mark.golden("official_a_latent_step")
def test_golden_vectors(operator, golden_case):
    options, noise_on = golden_options(golden_case)
    step = operator(golden_case["logits"], golden_case["table"], **options)
    assert torch.equal(step.ids, golden_case["ids"])
    torch.testing.assert_close(step.weights, golden_case["weights"], rtol=0, atol=tol.GOLDEN_VALUE)
    torch.testing.assert_close(step.embedding, golden_case["embedding"], rtol=0, atol=tol.GOLDEN_VALUE)
    ended = golden_case["logits"].argmax(-1) == options["end_token_id"]
    assert ended.any()
    assert not golden_case["latent"].all()
    assert torch.equal(step.is_latent, golden_case["latent"] & ~ended)
    # The sampler emits the first component, and the end marker where the run ends.
    live = golden_case["latent"]
    assert torch.equal(step.ids[live, 0], golden_case["next_ids"][live])
    assert torch.equal(step.top_token[ended], golden_case["next_ids"][ended])
    got, expected = step.scores, golden_case["scores"]
    if not noise_on:  # raw logits there, log-probs here: the log-sum-exp apart
        expected = expected - golden_case["logits"].logsumexp(-1, keepdim=True)
    atol = torch.full((len(got), 1), tol.GOLDEN_VALUE)
    if golden_case["case"] == "c0":
        atol[4:] = tol.GOLDEN_DRIFTED_SCORES
    error = (got - expected).abs()[step.is_latent]
    assert (error <= atol[step.is_latent]).all(), error.amax(-1)


# The eager path against the plain rule


def make_logits(kind: str, rows: int, vocab: int) -> Tensor:
    """Logits [rows, vocab] of a named shape."""
    logits = torch.randn(rows, vocab)
    if kind == "normal":
        return 3.0 * logits
    if kind == "near-uniform":
        return 1e-3 * logits
    if kind == "all-equal":
        return torch.full((rows, vocab), 0.7)
    if kind == "quantised":
        return (2.0 * logits).round() / 2.0
    if kind == "bf16-rounded":
        return (4.0 * logits).bfloat16().float()
    if kind == "mostly-masked":
        return (
            (3.0 * logits)
            .masked_fill(torch.rand(rows, vocab) < 0.8, -torch.inf)
            .index_fill(1, torch.tensor([vocab - 1]), 0.5)
        )
    if kind == "three-finite":
        kept = torch.tensor([vocab - 1, 3, vocab // 2])
        return torch.full((rows, vocab), -torch.inf).index_copy(1, kept, logits[:, :3])
    if kind == "one-finite":
        return torch.full((rows, vocab), -torch.inf).index_fill(1, torch.tensor([5]), 0.0)
    if kind == "peaked":  # as a trained model's rows: a Zipf-like head over a low floor
        rank = torch.stack([torch.randperm(vocab) for _ in range(rows)]) + 1
        sharpness = torch.linspace(1.0, 3.0, rows).unsqueeze(-1)
        return 12.0 - sharpness * rank.log() + 0.3 * logits
    raise ValueError(kind)


@dataclass(frozen=True)
class Case:
    """One row of the table: the logits' shape and kind, and the options that differ from the defaults."""

    name: str
    vocab: int = 1000
    rows: int = 5
    kind: str = "normal"
    options: dict[str, Any] = field(default_factory=dict)


def linspace_rows(low: float, high: float) -> Callable[[int], Tensor]:
    """An option with one value a row, built once the number of rows is known."""
    return lambda rows: torch.linspace(low, high, rows)


CASES = [
    Case("vocab-17", vocab=17),
    Case("vocab-31", vocab=31),
    Case("vocab-33", vocab=33),
    Case("vocab-1000", vocab=1000),
    Case("vocab-4099", vocab=4099),
    Case("vocab-32000-peaked", vocab=32000, rows=6, kind="peaked"),
    Case("vocab-32000-peaked-everything-in-the-nucleus", vocab=32000, rows=4, kind="peaked", options={"top_p": 1.0}),
    Case("vocab-32000-near-uniform", vocab=32000, rows=3, kind="near-uniform"),
    Case("vocab-32000-bf16-ties", vocab=32000, rows=4, kind="bf16-rounded"),
    Case("one-row", rows=1),
    Case("no-rows", rows=0),
    Case("quantised-ties", kind="quantised"),
    Case("quantised-ties-without-noise", kind="quantised", options={"noise_scale": 0.0}),
    Case("quantised-ties-noise-none", kind="quantised", options={"noise": "none"}),
    Case("bf16-ties", vocab=4099, kind="bf16-rounded"),
    Case("all-equal", vocab=4099, kind="all-equal"),
    Case("all-equal-without-noise", vocab=4099, kind="all-equal", options={"noise_scale": 0.0}),
    Case("all-equal-noise-none", vocab=4099, kind="all-equal", options={"noise": "none"}),
    Case("near-uniform", vocab=4099, kind="near-uniform"),
    Case("near-uniform-two-sided", vocab=4099, kind="near-uniform", options={"noise": "two_sided"}),
    Case("masked-logits", kind="mostly-masked"),
    Case("masked-logits-two-sided-top-p-1", kind="mostly-masked", options={"noise": "two_sided", "top_p": 1.0}),
    Case("three-finite-logits", kind="three-finite"),
    Case("three-finite-logits-top-p-1", vocab=4099, kind="three-finite", options={"top_p": 1.0}),
    Case("three-finite-logits-noise-none", vocab=4099, kind="three-finite", options={"noise": "none"}),
    Case("one-finite-logit", vocab=4099, kind="one-finite", options={"top_k": 32}),
    Case("top-k-1", options={"top_k": 1}),
    Case("top-k-1-peaked", kind="peaked", options={"top_k": 1, "noise_scale": 3.0}),
    Case("top-k-32", vocab=4099, options={"top_k": 32}),
    Case("top-k-is-vocab", vocab=33, options={"top_k": 33}),
    Case("top-k-is-vocab-of-1000", vocab=1000, rows=2, options={"top_k": 1000}),
    Case("top-k-is-vocab-noise-none", vocab=31, options={"top_k": 31, "noise": "none"}),
    Case("top-p-0", options={"top_p": 0.0}),
    Case("top-p-0.5", vocab=4099, options={"top_p": 0.5}),
    Case("top-p-1", vocab=4099, options={"top_p": 1.0}),
    Case("top-p-0.5-near-uniform", vocab=4099, kind="near-uniform", options={"top_p": 0.5, "noise_scale": 3.0}),
    Case("top-p-a-row", vocab=4099, options={"top_p": linspace_rows(0.0, 1.0)}),
    Case("top-p-0-d-tensor", options={"top_p": torch.tensor(0.7)}),
    Case("tau-a-row", options={"tau": linspace_rows(0.1, 4.0)}),
    Case("tau-small", options={"tau": 0.05}),
    Case("noise-scale-a-row", vocab=4099, options={"noise_scale": linspace_rows(0.0, 3.0)}),
    Case("noise-scale-a-row-two-sided", options={"noise_scale": linspace_rows(0.0, 3.0), "noise": "two_sided"}),
    Case("noise-scale-0", options={"noise_scale": 0.0}),
    Case("noise-scale-3", vocab=4099, options={"noise_scale": 3.0}),
    Case("noise-scale-3-peaked", vocab=4099, kind="peaked", options={"noise_scale": 3.0, "top_p": 1.0}),
    Case("two-sided", vocab=4099, options={"noise": "two_sided"}),
    Case("two-sided-top-p-1-scale-3", options={"noise": "two_sided", "top_p": 1.0, "noise_scale": 3.0}),
    Case("noise-none", vocab=4099, options={"noise": "none", "tau": 0.3}),
    Case("negative-row-ids", options={"row_ids": lambda rows: -1 - torch.arange(rows)}),
    Case("row-ids-above-32-bits", options={"row_ids": lambda rows: (1 << 40) + 3 * torch.arange(rows)}),
    Case("negative-seed", options={"seed": -12345}),
    Case("seed-and-step-tensors", options={"seed": torch.tensor(2**40 + 1), "step": torch.tensor(9)}),
]


def build(case: Case, noise_source: str) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Logits, embedding table and options of a case."""
    logits = make_logits(case.kind, case.rows, case.vocab)
    options = {"seed": 11, "step": 3, **case.options}
    options = {name: value(case.rows) if callable(value) else value for name, value in options.items()}
    if noise_source == "injected":
        del options["seed"], options["step"]
        options["exponential"] = torch.empty(case.rows, case.vocab).exponential_()
    return logits, torch.randn(case.vocab, WIDTH), options


@PUBLIC_AND_TRITON
@pytest.mark.parametrize("noise_source", ["philox", "injected"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_plain_rule(operator, case, noise_source):
    if operator is triton_step_from_logits and DEVICE == "cpu":  # a segment takes the interpreter half a second
        if noise_source == "injected" and (case.vocab == 32000 or case.kind in ("near-uniform", "all-equal")):
            pytest.skip("many segments; once, with the stream, is enough for the interpreter")
        case = replace(case, rows=min(case.rows, 2), vocab=700 if case.kind == "all-equal" else case.vocab)
    logits, table, options = build(case, noise_source)
    if operator is triton_step_from_logits and options.get("top_k", 0) > MAX_TOP_K:
        with pytest.raises(
            RuntimeError, match=f"top_k of at most {MAX_TOP_K}, got {options['top_k']}; use impl='auto'"
        ):
            operator(logits, table, **options)
        return
    step = operator(logits, table, **options)
    assert_same_step(step, latent_step_from_logits_ref(logits, table, **options))
    top_k = options.get("top_k", 10)
    assert step.ids.shape == step.scores.shape == step.weights.shape == (case.rows, top_k)
    assert (step.ids.dtype, step.scores.dtype, step.weights.dtype) == (torch.int64, torch.float32, torch.float32)


@PUBLIC_AND_TRITON
@pytest.mark.parametrize("noise", ["one_sided", "two_sided", "none"])
def test_ended_and_text_rows_take_the_noise_free_mixture(operator, noise):
    logits, table = make_logits("normal", 8, 257), torch.randn(257, WIDTH)
    end = 100
    logits[2:5, end] = logits.amax() + 1.0
    latent = torch.tensor([True, False, True, False, True, True, False, True])
    a_row = torch.linspace(0.2, 0.95, 8)
    options = dict(
        noise=noise, seed=5, tau=a_row, top_p=a_row.flip(0), noise_scale=3.0 * a_row, row_ids=7 * torch.arange(8),
        latent_mask=latent, end_token_id=end,
    )  # fmt: skip
    step = operator(logits, table, **options)
    assert_same_step(step, latent_step_from_logits_ref(logits, table, **options))
    assert step.is_latent.tolist() == [True, False, False, False, False, True, False, True]
    clean = operator(logits, table, noise="none")
    hard = ~step.is_latent
    for got, expected in zip(step[:4], clean[:4], strict=True):
        assert torch.equal(got[hard], expected[hard])
    if noise != "none":
        assert not torch.equal(step.scores[~hard], clean.scores[~hard])
    assert latent.tolist() == [True, False, True, False, True, True, False, True], "the mask was written to"


@PUBLIC_AND_TRITON
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes_equal_the_plain_rule(operator, dtype, table_dtype):
    if operator is triton_step_from_logits and dtype == torch.float64:
        pytest.skip("the kernel computes in float32")
    logits, table = make_logits("normal", 2, 1000).to(dtype), torch.randn(1000, WIDTH).to(table_dtype)
    step = operator(logits, table, seed=1)
    assert_same_step(step, latent_step_from_logits_ref(logits, table, seed=1))
    assert step.embedding.dtype == table_dtype
    exact = (step.weights.double().unsqueeze(-1) * table[step.ids].double()).sum(1)
    torch.testing.assert_close(step.embedding.double(), exact, rtol=0, atol=tol.EMBEDDING[table_dtype] * 4)


@PUBLIC_AND_TRITON
def test_strided_inputs_equal_contiguous_ones(operator):
    logits, table, draws = make_logits("normal", 2, 333), torch.randn(333, WIDTH), torch.empty(2, 333).exponential_()
    expected = operator(logits, table, exponential=draws)
    transposed = logits.T.contiguous().T
    spread = torch.full((4, 999), torch.nan)
    spread[::2, ::3] = logits
    wide = torch.full((333, 2 * WIDTH), torch.nan)
    wide[:, ::2] = table
    for strided in (transposed, spread[::2, ::3]):
        assert not strided.is_contiguous()
        got = operator(strided, wide[:, ::2], exponential=draws.T.contiguous().T)
        assert_same_step(got, expected)
    expanded = operator(logits[:1].expand(2, -1), table, exponential=draws)
    assert_same_step(expanded, latent_step_from_logits_ref(logits[:1].expand(2, -1), table, exponential=draws))


def test_inputs_are_left_as_they_were():
    inputs = make_logits("normal", 4, 333), torch.randn(333, WIDTH)
    row_ids, draws = torch.arange(4), torch.empty(4, 333).exponential_()
    before = [t.clone() for t in (*inputs, row_ids, draws)]
    latent_step_from_logits(*inputs, exponential=draws, row_ids=row_ids)
    assert all(torch.equal(a, b) for a, b in zip((*inputs, row_ids, draws), before, strict=True))


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
    expected = latent_step_from_logits_ref(logits, table, seed=4, step=2)
    assert_same_step(step, expected)
    assert step.embedding.shape == (6, table.shape[1])


def test_from_hidden_passes_every_option_on():
    hidden, head = torch.randint(-8, 9, (4, 16)) / 4, torch.randint(-8, 9, (99, 16)) / 4
    shared = dict(
        top_k=7, top_p=0.6, tau=0.4, noise="two_sided", noise_scale=1.7, row_ids=torch.tensor([5, 1, 9, 2]),
        latent_mask=torch.tensor([True, True, False, True]), end_token_id=int((hidden @ head.T)[1].argmax()),
    )  # fmt: skip
    for source in ({"seed": 3, "step": 8}, {"exponential": torch.empty(4, 99).exponential_()}):
        expected = latent_step_from_logits(hidden @ head.T, head, **shared, **source)
        assert not expected.is_latent[1]
        got = latent_step(hidden, head, head, **shared, **source)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


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


# The noise stream


def test_seed_and_step_may_be_tensors():
    logits, table = make_logits("normal", 4, 333), torch.randn(333, WIDTH)
    ints = latent_step_from_logits(logits, table, seed=123456789012, step=7)
    tensors = latent_step_from_logits(logits, table, seed=torch.tensor(123456789012), step=torch.tensor(7))
    assert all(torch.equal(a, b) for a, b in zip(ints, tensors, strict=True))
    for other in (dict(seed=123456789013, step=7), dict(seed=123456789012, step=8)):
        assert not torch.equal(latent_step_from_logits(logits, table, **other).scores, ints.scores)


@PUBLIC_AND_TRITON
def test_a_step_a_row_gives_each_row_the_noise_of_its_step(operator):
    logits, table = make_logits("normal", 4, 333), torch.randn(333, WIDTH)
    steps = torch.tensor([3, 0, 3, 900])
    mask = torch.tensor([True, True, False, True])
    found = operator(logits, table, seed=5, step=steps, latent_mask=mask)
    for row, step in enumerate(steps.tolist()):
        alone = operator(logits, table, seed=5, step=step, latent_mask=mask)
        assert torch.equal(found.ids[row], alone.ids[row])
        assert torch.equal(found.scores[row], alone.scores[row])
    with pytest.raises(ValueError, match="step"):
        operator(logits, table, seed=5, step=steps[:3])


def test_without_a_seed_torch_manual_seed_governs():
    logits, table = make_logits("normal", 4, 333), torch.randn(333, WIDTH)
    torch.manual_seed(1)
    first, second = (latent_step_from_logits(logits, table).scores for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(latent_step_from_logits(logits, table).scores, first)
    assert not torch.equal(first, second)


def test_seed_equals_injecting_its_draws():
    logits, table = make_logits("normal", 4, 333), torch.randn(333, WIDTH)
    rows = torch.tensor([9, -4, 1 << 35, 0])
    draws = exponential_draws(torch.arange(333), rows, 5, 6)
    seeded = latent_step_from_logits(logits, table, seed=5, step=6, row_ids=rows)
    injected = latent_step_from_logits(logits, table, exponential=draws)
    assert all(torch.equal(a, b) for a, b in zip(seeded, injected, strict=True))


def test_noise_does_not_depend_on_the_dtype_of_the_logits():
    logits, table = make_logits("bf16-rounded", 4, 333), torch.randn(333, WIDTH)
    single = latent_step_from_logits(logits, table, seed=5)
    half = latent_step_from_logits(logits.bfloat16(), table, seed=5)
    double = latent_step_from_logits(logits.double(), table, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(half, single, strict=True))
    assert_same_step(double, single)


# Properties


@st.composite
def steps(draw: st.DrawFn) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Logits with ties and masked tokens, an embedding table, options."""
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
def test_any_step_equals_the_plain_rule(inputs):
    logits, table, options = inputs
    assert_same_step(
        latent_step_from_logits(logits, table, **options), latent_step_from_logits_ref(logits, table, **options)
    )


@given(steps(), st.integers(0, 1000))
def test_rows_permute_with_their_row_ids(inputs, seed):
    logits, table, options = inputs
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    expected = latent_step_from_logits(logits, table, **options)
    options["row_ids"] = options["row_ids"][order]
    got = latent_step_from_logits(logits[order], table, **options)
    assert_same_step(got, LatentStep(*(part[order] for part in expected)))


@given(steps())
def test_a_row_does_not_depend_on_its_batch(inputs):
    logits, table, options = inputs
    together = latent_step_from_logits(logits, table, **options)
    row_ids = options.pop("row_ids")
    for row in range(len(logits)):
        part = slice(row, row + 1)
        alone = latent_step_from_logits(logits[part], table, row_ids=row_ids[part], **options)
        assert_same_step(alone, LatentStep(*(value[part] for value in together)))


@given(steps(), st.sampled_from([-48.0, 32.0]))
def test_a_constant_added_to_the_logits_changes_nothing(inputs, shift):
    logits, table, options = inputs
    logits = (logits * 64).round() / 64  # so that the shifted logits are exact and ties stay ties
    expected = latent_step_from_logits(logits.double(), table, **options)
    got = latent_step_from_logits(logits.double() + shift, table, **options)
    assert_same_step(got, expected, scores=tol.SHIFTED_LOGITS)


@given(steps())
def test_weights_are_a_distribution_and_scores_descend(inputs):
    logits, table, options = inputs
    step = latent_step_from_logits(logits, table, **options)
    assert (step.weights >= 0).all()
    assert (step.weights.sum(-1) - 1.0).abs().max() <= tol.WEIGHT_SUM
    assert (step.scores[:, 1:] <= step.scores[:, :-1]).all()
    assert (step.ids.sort(-1).values.diff(dim=-1) > 0).all(), "an id was kept twice"
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


def test_nan_or_inf_in_unused_draws_of_hard_rows_changes_nothing():
    logits, table, draws = make_logits("normal", 4, 333), torch.randn(333, WIDTH), torch.empty(4, 333).exponential_()
    mask = torch.tensor([True, False, True, False])
    expected = latent_step_from_logits(logits, table, exponential=draws, latent_mask=mask)
    draws[~mask] = torch.nan
    got = latent_step_from_logits(logits, table, exponential=draws, latent_mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_nothing_of_the_vocabularys_size_is_drawn_for_peaked_rows(monkeypatch):
    import latent_kernels._eager.latent_step as eager

    drawn = []

    def counted(ids: Tensor, *args: Any) -> Tensor:
        drawn.append(ids.shape[1])
        return exponential_draws(ids, *args)

    monkeypatch.setattr(eager, "exponential_draws", counted)
    latent_step_from_logits(make_logits("peaked", 4, 32000), torch.randn(32000, WIDTH), seed=0)
    assert drawn
    assert max(drawn) < 32000 / 10


@PUBLIC_AND_TRITON
@pytest.mark.parametrize("noise", ["one_sided", "two_sided"])
def test_distribution_of_ids_and_weights(operator, noise):
    interpreted = operator is triton_step_from_logits and DEVICE == "cpu"
    rows, vocab = 200 if interpreted else 40_000, 12
    logits, table = torch.linspace(2.0, -2.0, vocab).expand(rows, -1), torch.eye(vocab)
    options = dict(top_k=3, top_p=0.9, noise=noise, noise_scale=1.3)
    got = operator(logits, table, seed=77, **options)
    draws = torch.empty(40_000, vocab).exponential_(generator=torch.Generator().manual_seed(1))
    expected = latent_step_from_logits_ref(logits[:1].expand(40_000, -1), table, exponential=draws, **options)
    for place in (0, 2):
        assert_same_distribution(got.ids[:, place], expected.ids[:, place])
        edges = expected.weights[:, place].quantile(torch.linspace(0.0, 1.0, 9))[1:-1]
        bins = (torch.bucketize(weights[:, place].contiguous(), edges) for weights in (got.weights, expected.weights))
        assert_same_distribution(*bins)


def assert_same_distribution(first: Tensor, second: Tensor) -> None:
    """Two-sample chi-squared test on whole numbers; values that are rarer than one in fifty count as one."""
    values = max(int(first.max()), int(second.max())) + 1
    counts = torch.stack([x.bincount(minlength=values) for x in (first, second)]).double()
    rare = counts[1] < len(second) / 50
    counts = torch.cat([counts[:, ~rare], counts[:, rare].sum(1, keepdim=True)], dim=1)
    counts = counts[:, counts.sum(0) > 0]
    assert counts.shape[1] > 3
    share = (len(second) / len(first)) ** 0.5
    statistic = ((counts[0] * share - counts[1] / share).square() / counts.sum(0)).sum().item()
    assert statistic < tol.chi_squared_bound(counts.shape[1] - 1)


# Validation

LOGITS, TABLE = torch.zeros(4, 20), torch.zeros(20, WIDTH)
OTHER_DEVICE = torch.device("meta")
INVALID = {
    "logits-1d": (dict(logits=torch.zeros(20)), ValueError, r"logits must have shape \[\*, \*\], got \[20\]"),
    "logits-int": (dict(logits=torch.zeros(4, 20, dtype=torch.int64)), TypeError, "logits .* got torch.int64"),
    "logits-list": (dict(logits=[[0.0]]), TypeError, "logits must be a tensor, got list"),
    "table-rows": (dict(embedding=torch.zeros(21, 3)), ValueError, r"embedding .* \[20, \*\], got \[21, 3\]"),
    "table-device": (dict(embedding=TABLE.to(OTHER_DEVICE)), ValueError, "embedding is on meta"),
    "top-k-0": (dict(top_k=0), ValueError, "top_k must be between 1 and the vocabulary size 20, got 0"),
    "top-k-large": (dict(top_k=21), ValueError, "top_k .* got 21"),
    "top-k-float": (dict(top_k=2.0), TypeError, "top_k must be an int, got float"),
    "top-k-bool": (dict(top_k=True), TypeError, "top_k must be an int, got bool"),
    "top-p-high": (dict(top_p=1.5), ValueError, r"top_p must be in \[0, 1\], got 1.5"),
    "top-p-low": (dict(top_p=-0.1), ValueError, "top_p .* got -0.1"),
    "top-p-nan": (dict(top_p=float("nan")), ValueError, "top_p .* got nan"),
    "top-p-str": (dict(top_p="0.9"), TypeError, "top_p must be a number, got str"),
    "top-p-rows": (dict(top_p=torch.ones(3)), ValueError, r"top_p must have shape \[4\], got \[3\]"),
    "tau-0": (dict(tau=0.0), ValueError, r"tau must be in \(0, inf\], got 0.0"),
    "tau-int-rows": (dict(tau=torch.ones(4, dtype=torch.int64)), TypeError, "tau .* got torch.int64"),
    "noise-kind": (dict(noise="gumbel"), ValueError, "noise must be one of 'one_sided', .* got 'gumbel'"),
    "noise-scale": (dict(noise_scale=-1.0), ValueError, "noise_scale .* got -1.0"),
    "noise-scale-rows": (dict(noise_scale=torch.ones(4, 1)), ValueError, r"noise_scale .* got \[4, 1\]"),
    "seed-float": (dict(seed=1.0), TypeError, "seed must be an int or a 0-d int64 tensor, got float"),
    "seed-1d": (dict(seed=torch.zeros(1, dtype=torch.int64)), ValueError, r"seed must have shape \[\], got \[1\]"),
    "seed-int32": (dict(seed=torch.tensor(1, dtype=torch.int32)), TypeError, "seed .* got torch.int32"),
    "step-bool": (dict(step=True), TypeError, "step .* got bool"),
    "row-ids-shape": (dict(row_ids=torch.arange(5)), ValueError, r"row_ids must have shape \[4\], got \[5\]"),
    "row-ids-dtype": (dict(row_ids=torch.zeros(4)), TypeError, "row_ids must be torch.int64, got torch.float32"),
    "draws-shape": (dict(exponential=torch.ones(4, 19)), ValueError, r"exponential .* \[4, 20\], got \[4, 19\]"),
    "draws-and-seed": (dict(exponential=torch.ones(4, 20), seed=1), ValueError, "either seed or exponential"),
    "mask-shape": (dict(latent_mask=torch.ones(3, dtype=torch.bool)), ValueError, r"latent_mask .* got \[3\]"),
    "mask-dtype": (dict(latent_mask=torch.ones(4)), TypeError, "latent_mask must be torch.bool, got torch.float32"),
    "end-negative": (dict(end_token_id=-1), ValueError, "end_token_id must be between 0 and 19, got -1"),
    "end-large": (dict(end_token_id=20), ValueError, "end_token_id .* got 20"),
    "end-str": (dict(end_token_id="</think>"), TypeError, "end_token_id must be an int, got str"),
    "impl-bogus": (dict(impl="bogus"), ValueError, "impl must be one of 'auto', 'triton', 'eager', got 'bogus'"),
    "impl-triton": (dict(impl="triton"), RuntimeError, "use impl='auto'"),
}


@pytest.mark.parametrize(("change", "error", "message"), INVALID.values(), ids=INVALID)
def test_wrong_arguments_are_named(change, error, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = {"logits": LOGITS, "embedding": TABLE, "seed": None, **change}
    with pytest.raises(error, match=message):
        latent_step_from_logits(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(hidden=torch.zeros(4)), ValueError, r"hidden must have shape \[\*, \*\], got \[4\]"),
        (dict(lm_head=torch.zeros(20, 9)), ValueError, r"lm_head must have shape \[\*, 8\], got \[20, 9\]"),
        (dict(lm_head=torch.zeros(20, 8, dtype=torch.int8)), TypeError, "lm_head .* got torch.int8"),
        (dict(lm_head=torch.zeros(20, 8, device="meta")), ValueError, "lm_head is on meta"),
        (dict(embedding=torch.zeros(21, 8)), ValueError, r"embedding .* got \[21, 8\]"),
        (dict(impl="triton"), RuntimeError, "use impl='auto'"),
        (dict(impl="bogus"), ValueError, "got 'bogus'"),
    ],
    ids=["hidden-shape", "head-shape", "head-dtype", "head-device", "table-shape", "impl-triton", "impl-bogus"],
)
def test_wrong_arguments_of_the_step_from_hidden_are_named(change, error, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = {"hidden": torch.zeros(4, 8), "lm_head": torch.zeros(20, 8), "embedding": torch.zeros(20, 8), **change}
    with pytest.raises(error, match=message):
        latent_step(**arguments)


@pytest.mark.parametrize("impl", ["eager", pytest.param("triton", marks=NEEDS_TRITON)])
def test_the_logits_of_a_step_come_with_it(impl):
    hidden, head, table = torch.randn(5, 16), torch.randn(300, 16), torch.randn(300, 8)
    step, logits = latent_step_with_logits(hidden, head, table, LatentStepOptions(seed=3), impl=impl)
    torch.testing.assert_close(logits, hidden @ head.T, rtol=1e-4, atol=1e-4)
    alone = latent_step(hidden, head, table, seed=3, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(step, alone, strict=True))
