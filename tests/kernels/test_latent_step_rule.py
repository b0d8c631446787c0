"""The latent step computes the rule of the paper: golden vectors, then the oracle on many shapes of logits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from support import oracle
from support import tolerances as tol
from support.golden import latent_step_options
from support.kernels import DEVICE, NEEDS_TRITON, SLOW_IF_INTERPRETED, kernel, with_kernel
from support.latent_steps import WIDTH, assert_same_step, make_logits
from torch import Tensor

from latent_kernels import latent_step_from_logits
from latent_kernels._dispatch import MAX_TOP_K
from latent_kernels.reference.latent_step import latent_step_from_logits_ref

triton_step_from_logits = kernel(latent_step_from_logits)
PUBLIC_AND_REFERENCE = with_kernel(latent_step_from_logits, latent_step_from_logits_ref)
PUBLIC_AND_TRITON = with_kernel(latent_step_from_logits)

pytestmark = pytest.mark.usefixtures("small_segments")


# Golden vectors

ROWS_OF_A_CASE = ("logits", "exponential", "latent", "ids", "scores", "weights", "next_ids", "embedding")


@PUBLIC_AND_REFERENCE
@pytest.mark.golden("official_a_latent_step")
def test_steps_equal_those_of_the_released_code(operator, golden_case):
    if (
        operator is triton_step_from_logits and DEVICE == "cpu"
    ):  # the interpreter takes the first rows: one of each kind
        golden_case = {name: x[:3] if name in ROWS_OF_A_CASE else x for name, x in golden_case.items()}
    options = latent_step_options(golden_case)
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
    expected = golden_case["scores"]
    if options["noise"] == "none":  # raw logits there, log-probs here: they differ by the log-sum-exp
        expected = expected - golden_case["logits"].logsumexp(-1, keepdim=True)
    atol = torch.full((len(expected), 1), tol.GOLDEN_VALUE)
    if golden_case["case"] == "c0":
        atol[4:] = tol.GOLDEN_DRIFTED_SCORES
    error = (step.scores - expected).abs()[step.is_latent]
    assert (error <= atol[step.is_latent]).all(), error.amax(-1)


# Against the oracle


@dataclass(frozen=True)
class Case:
    """One row of the table: shape and kind of the logits, and the options that differ from the defaults."""

    name: str
    vocab: int = 1000
    rows: int = 5
    kind: str = "normal"
    options: dict[str, Any] = field(default_factory=dict)
    quick: bool = False  # for Triton's interpreter, which takes half a second per row


def linspace_rows(low: float, high: float) -> Callable[[int], Tensor]:
    """Return an option with one value per row, built when the number of rows is known."""
    return lambda rows: torch.linspace(low, high, rows)


CASES = [
    Case("vocab-17", vocab=17, quick=True),
    Case("vocab-31", vocab=31),
    Case("vocab-33", vocab=33, quick=True),
    Case("vocab-1000", vocab=1000),
    Case("vocab-4099", vocab=4099),
    Case("vocab-32000-peaked", vocab=32000, rows=6, kind="peaked"),
    Case("vocab-32000-peaked-everything-in-the-nucleus", vocab=32000, rows=4, kind="peaked", options={"top_p": 1.0}),
    Case("vocab-32000-near-uniform", vocab=32000, rows=3, kind="near-uniform"),
    Case("vocab-32000-bf16-ties", vocab=32000, rows=4, kind="bf16-rounded"),
    Case("one-row", rows=1, quick=True),
    Case("no-rows", rows=0, quick=True),
    Case("quantised-ties", kind="quantised", quick=True),
    Case("quantised-ties-without-noise", kind="quantised", options={"noise_scale": 0.0}),
    Case("quantised-ties-noise-none", kind="quantised", options={"noise": "none"}),
    Case("bf16-ties", vocab=4099, kind="bf16-rounded"),
    Case("all-equal", vocab=4099, kind="all-equal"),
    Case("all-equal-without-noise", vocab=4099, kind="all-equal", options={"noise_scale": 0.0}),
    Case("all-equal-noise-none", vocab=4099, kind="all-equal", options={"noise": "none"}),
    Case("near-uniform", vocab=4099, kind="near-uniform"),
    Case("near-uniform-two-sided", vocab=4099, kind="near-uniform", options={"noise": "two_sided"}),
    Case("masked-logits", kind="mostly-masked", quick=True),
    Case("masked-logits-two-sided-top-p-1", kind="mostly-masked", options={"noise": "two_sided", "top_p": 1.0}),
    Case("three-finite-logits", kind="three-finite"),
    Case("three-finite-logits-top-p-1", vocab=4099, kind="three-finite", options={"top_p": 1.0}),
    Case("three-finite-logits-noise-none", vocab=4099, kind="three-finite", options={"noise": "none"}, quick=True),
    Case("one-finite-logit", vocab=4099, kind="one-finite", options={"top_k": 32}, quick=True),
    Case("top-k-1", options={"top_k": 1}, quick=True),
    Case("top-k-1-peaked", kind="peaked", options={"top_k": 1, "noise_scale": 3.0}),
    Case("top-k-32", vocab=4099, options={"top_k": 32}, quick=True),
    Case("top-k-is-vocab", vocab=33, options={"top_k": 33}, quick=True),
    Case("top-k-is-vocab-of-1000", vocab=1000, rows=2, options={"top_k": 1000}),
    Case("top-k-is-vocab-noise-none", vocab=31, options={"top_k": 31, "noise": "none"}, quick=True),
    Case("top-p-0", options={"top_p": 0.0}, quick=True),
    Case("top-p-0.5", vocab=4099, options={"top_p": 0.5}),
    Case("top-p-1", vocab=4099, options={"top_p": 1.0}),
    Case("top-p-0.5-near-uniform", vocab=4099, kind="near-uniform", options={"top_p": 0.5, "noise_scale": 3.0}),
    Case("top-p-per-row", vocab=4099, options={"top_p": linspace_rows(0.0, 1.0)}, quick=True),
    Case("top-p-0-d-tensor", options={"top_p": torch.tensor(0.7)}),
    Case("tau-per-row", options={"tau": linspace_rows(0.1, 4.0)}, quick=True),
    Case("tau-small", options={"tau": 0.05}),
    Case("noise-scale-per-row", vocab=4099, options={"noise_scale": linspace_rows(0.0, 3.0)}, quick=True),
    Case("noise-scale-per-row-two-sided", options={"noise_scale": linspace_rows(0.0, 3.0), "noise": "two_sided"}),
    Case("noise-scale-0", options={"noise_scale": 0.0}),
    Case("noise-scale-3", vocab=4099, options={"noise_scale": 3.0}),
    Case("noise-scale-3-peaked", vocab=4099, kind="peaked", options={"noise_scale": 3.0, "top_p": 1.0}),
    Case("two-sided", vocab=4099, options={"noise": "two_sided"}, quick=True),
    Case("two-sided-top-p-1-scale-3", options={"noise": "two_sided", "top_p": 1.0, "noise_scale": 3.0}),
    Case("noise-none", vocab=4099, options={"noise": "none", "tau": 0.3}, quick=True),
    Case("negative-row-ids", options={"row_ids": lambda rows: -1 - torch.arange(rows)}, quick=True),
    Case("row-ids-above-32-bits", options={"row_ids": lambda rows: (1 << 40) + 3 * torch.arange(rows)}),
    Case("negative-seed", options={"seed": -12345}),
    Case("seed-and-step-tensors", options={"seed": torch.tensor(2**40 + 1), "step": torch.tensor(9)}, quick=True),
]


def build(case: Case, noise_source: str) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return logits, embedding table and options of a case."""
    logits = make_logits(case.kind, case.rows, case.vocab)
    options = {"seed": 11, "step": 3, **case.options}
    options = {name: value(case.rows) if callable(value) else value for name, value in options.items()}
    if noise_source == "injected":
        del options["seed"], options["step"]
        options["exponential"] = torch.empty(case.rows, case.vocab).exponential_()
    return logits, torch.randn(case.vocab, WIDTH), options


def runs() -> Iterator[Any]:
    """Yield every operator with every case and source of noise.

    Where the kernel is interpreted, it gets two rows at most, and the cases that are not quick are slow tests.
    """
    operators = {"public": latent_step_from_logits, "reference": latent_step_from_logits_ref}
    operators["triton"] = triton_step_from_logits
    for case, source, (name, operator) in itertools.product(CASES, ("philox", "injected"), operators.items()):
        marks = [NEEDS_TRITON] if name == "triton" else []
        if name == "triton" and DEVICE == "cpu":
            if not case.quick or source == "injected":
                marks += SLOW_IF_INTERPRETED
            # Equal logits are cut into very many segments, so there are fewer of them.
            case = replace(case, rows=min(case.rows, 2), vocab=700 if case.kind == "all-equal" else case.vocab)
        yield pytest.param(operator, case, source, id=f"{case.name}-{source}-{name}", marks=marks)


@pytest.mark.parametrize(("operator", "case", "noise_source"), runs())
def test_every_shape_of_logits_gives_the_oracles_step(operator, case, noise_source):
    logits, table, options = build(case, noise_source)
    top_k = options.get("top_k", 10)
    if operator is triton_step_from_logits and top_k > MAX_TOP_K:
        with pytest.raises(RuntimeError, match=f"top_k of at most {MAX_TOP_K}, got {top_k}; use impl='auto'"):
            operator(logits, table, **options)
        return
    step = operator(logits, table, **options)
    assert_same_step(step, oracle.latent_step(logits, table, **options))
    assert step.ids.shape == step.scores.shape == step.weights.shape == (case.rows, top_k)
    assert (step.ids.dtype, step.scores.dtype, step.weights.dtype) == (torch.int64, torch.float32, torch.float32)


@PUBLIC_AND_REFERENCE
@pytest.mark.parametrize("noise", ["one_sided", "two_sided", "none"])
def test_ended_and_text_rows_take_the_noise_free_mixture(operator, noise):
    logits, table = make_logits("normal", 5, 257), torch.randn(257, WIDTH)
    end = 100
    logits[2:4, end] = logits.amax() + 1.0
    latent = torch.tensor([True, False, True, False, True])
    per_row = torch.linspace(0.2, 0.95, 5)
    options = dict(noise=noise, seed=5, tau=per_row, top_p=per_row.flip(0), noise_scale=3.0 * per_row)
    options |= dict(row_ids=7 * torch.arange(5), latent_mask=latent, end_token_id=end)
    step = operator(logits, table, **options)
    assert_same_step(step, oracle.latent_step(logits, table, **options))
    assert step.is_latent.tolist() == [True, False, False, False, True]
    clean = operator(logits, table, noise="none")
    hard = ~step.is_latent
    for actual, expected in zip(step[:4], clean[:4], strict=True):
        assert torch.equal(actual[hard], expected[hard])
    if noise != "none":
        assert not torch.equal(step.scores[~hard], clean.scores[~hard])
    assert latent.tolist() == [True, False, True, False, True], "the operator wrote to the mask"


@PUBLIC_AND_TRITON
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_dtype_gives_the_oracles_step(operator, dtype, table_dtype):
    if operator is triton_step_from_logits and dtype == torch.float64:
        pytest.skip("the kernel computes in float32")
    logits, table = make_logits("normal", 2, 1000).to(dtype), torch.randn(1000, WIDTH).to(table_dtype)
    step = operator(logits, table, seed=1)
    assert_same_step(step, oracle.latent_step(logits, table, seed=1))
    assert step.embedding.dtype == table_dtype
    exact = (step.weights.double().unsqueeze(-1) * table[step.ids].double()).sum(1)
    torch.testing.assert_close(step.embedding.double(), exact, rtol=0, atol=tol.EMBEDDING[table_dtype] * 4)


@PUBLIC_AND_TRITON
def test_strides_of_the_inputs_do_not_matter(operator):
    logits, table, draws = make_logits("normal", 2, 333), torch.randn(333, WIDTH), torch.empty(2, 333).exponential_()
    expected = operator(logits, table, exponential=draws)
    transposed = logits.T.contiguous().T
    spread = torch.full((4, 999), torch.nan)
    spread[::2, ::3] = logits
    wide = torch.full((333, 2 * WIDTH), torch.nan)
    wide[:, ::2] = table
    for strided in (transposed, spread[::2, ::3]):
        assert not strided.is_contiguous()
        assert_same_step(operator(strided, wide[:, ::2], exponential=draws.T.contiguous().T), expected)
    expanded = operator(logits[:1].expand(2, -1), table, exponential=draws)
    assert_same_step(expanded, oracle.latent_step(logits[:1].expand(2, -1), table, exponential=draws))
