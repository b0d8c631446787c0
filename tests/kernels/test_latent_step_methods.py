"""SofT-GRPO and Multiplex Thinking as methods of the latent step: the oracle, the draws, and their distribution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import oracle
from support import tolerances as tol
from support.kernels import NEEDS_TRITON, SLOW_IF_INTERPRETED, kernel
from support.latent_steps import WIDTH, assert_same_step, make_logits

from latent_kernels import latent_step, latent_step_from_logits, mix_embeddings
from latent_kernels.reference.latent_step import latent_step_from_logits_ref

triton_step_from_logits = kernel(latent_step_from_logits)
OPERATORS = {
    "public": latent_step_from_logits,
    "reference": latent_step_from_logits_ref,
    "triton": pytest.param(triton_step_from_logits, marks=[NEEDS_TRITON, *SLOW_IF_INTERPRETED]),
}
ALL = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
METHODS = pytest.mark.parametrize("method", ["soft_grpo", "multiplex"])

pytestmark = pytest.mark.usefixtures("small_segments")


def options_of(method: str, **options: Any) -> dict[str, Any]:
    """Return options of a method, with a nucleus where the method has one."""
    return dict(method=method, top_k=5, top_p=1.0 if method == "multiplex" else 0.9, seed=3, step=4) | options


@ALL
@METHODS
@pytest.mark.parametrize(
    ("kind", "vocab", "options"),
    [
        ("normal", 300, dict(noise="two_sided", tau=0.1)),
        ("quantised", 40, dict(noise="one_sided", noise_delta=0.25, noise_scale=torch.tensor([0.5, 2.0]))),
        ("all-equal", 200, dict(noise="two_sided", tau=torch.tensor([0.5, 2.0]))),
        ("mostly-masked", 300, dict(noise="none", tau=0.1)),
        ("three-finite", 150, dict(noise="two_sided", row_ids=torch.tensor([-7, 1 << 40]))),
        ("peaked", 5, dict(noise="two_sided", tau=torch.inf)),
        ("normal", 33, dict(noise="two_sided", top_k=1)),
        ("bf16-rounded", 33, dict(noise="two_sided", top_k=32, latent_mask=torch.tensor([False, True]))),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_steps_of_a_method_equal_the_oracles(operator, method, kind, vocab, options):
    logits, table = make_logits(kind, 2, vocab), torch.randn(vocab, WIDTH)
    options = options_of(method, **options)
    step, expected = operator(logits, table, **options), oracle.latent_step(logits, table, **options)
    assert_same_step(step, expected)
    if options["noise"] != "none":
        replayed = mix_embeddings(step.ids, step.scores, table, tau=options.get("tau", 1.0))
        latent = step.is_latent
        torch.testing.assert_close(replayed[latent], step.embedding[latent], rtol=0, atol=tol.EMBEDDING[table.dtype])


@ALL
@METHODS
def test_injected_draws_equal_the_oracles(operator, method):
    logits, table, draws = make_logits("normal", 3, 140), torch.randn(140, WIDTH), torch.empty(3, 140).exponential_()
    options = options_of(method, noise="two_sided", seed=None, exponential=draws)
    expected = oracle.latent_step(logits, table, **options)
    assert_same_step(operator(logits, table, **options), expected)
    draws[0, :5], draws[1, :5] = 0.0, torch.inf  # uniform draws of one and zero, and clamped noise
    expected = oracle.latent_step(logits, table, **options)
    if method == "multiplex":
        assert expected.ids[:2].tolist() == [[139] * 5, [0] * 5]
    assert_same_step(operator(logits, table, **options), expected)


@ALL
@METHODS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_every_dtype_gives_the_steps_of_its_values(operator, method, dtype):
    if operator is triton_step_from_logits and dtype == torch.float64:
        pytest.skip("the kernel computes in float32")
    logits, table = make_logits("bf16-rounded", 2, 300), torch.randn(300, WIDTH)
    options = options_of(method, noise="two_sided", row_ids=torch.tensor([5, -1]))
    step = operator(logits.to(dtype).T.contiguous().T, table.T.contiguous().T, **options)
    assert_same_step(step, oracle.latent_step(logits, table, **options))


@METHODS
def test_a_row_does_not_depend_on_its_batch_and_the_hidden_state_gives_the_same_step(method):
    hidden, head = torch.randn(6, 16), torch.randn(500, 16)
    rows, options = torch.arange(6) * 7, options_of(method, noise="two_sided")
    whole = latent_step(hidden, head, head, row_ids=rows, **options)
    order = torch.tensor([4, 0, 2])
    some = latent_step_from_logits(hidden[order] @ head.T, head, row_ids=rows[order], **options)
    assert torch.equal(some.ids, whole.ids[order])
    torch.testing.assert_close(some.scores, whole.scores[order], rtol=0, atol=tol.STEP_SCORES)
    assert all(len(x) == 0 for x in latent_step_from_logits(hidden[:0] @ head.T, head, **options))


@ALL
@METHODS
def test_a_late_step_ends_no_run_that_its_mixture_does_not_end(operator, method):
    logits, table = torch.zeros(2, 20), torch.randn(20, WIDTH)
    logits[:, 3] = 0.1  # the end marker has the highest raw logit, but seldom comes first in a mixture
    draws = torch.empty(2, 20).exponential_(generator=torch.Generator().manual_seed(0))
    options = options_of(method, end_token_id=3, end_rule="noisy", seed=None, exponential=draws)
    early, late = (operator(logits, table, **{**options, "step": step}).is_latent for step in (4, 2**31))
    assert early.any()
    assert torch.equal(early, late)


def test_draws_of_multiplex_are_independent_and_follow_the_distribution():
    rows, vocab = 20_000, 300
    logits = (1.5 * torch.randn(vocab)).expand(rows, -1)
    step = latent_step_from_logits(logits, torch.zeros(vocab, 1), **options_of("multiplex", top_k=3, seed=1))
    best = logits[0].topk(9).indices
    probs = logits[0].double().softmax(-1)
    codes = torch.full((vocab,), 9)
    codes[best] = torch.arange(9)
    mass = torch.cat([probs[best], 1.0 - probs[best].sum().view(1)])
    drawn = codes[step.ids]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        observed = torch.bincount(10 * drawn[:, first] + drawn[:, second], minlength=100)
        expected = torch.outer(mass, mass).flatten() * rows
        statistic = ((observed - expected).square() / expected).sum().item()
        assert statistic < tol.chi_squared_bound(99)
    assert (step.ids[:, 0] == step.ids[:, 1]).any(), "draws are with replacement"


@pytest.mark.parametrize("spread", [3.0, 1e-3], ids=["normal", "near-uniform"])
def test_a_draw_in_a_large_vocabulary_lies_where_the_exact_masses_put_it(spread):
    logits, table = spread * torch.randn(4, 40_000), torch.zeros(40_000, 1)
    options = options_of("multiplex", top_k=32)
    ids = latent_step_from_logits(logits, table, **options).ids
    mass = logits.double().softmax(-1).cumsum(-1)
    for row in range(4):
        draws = torch.from_numpy(oracle.uniform_draws(32, row, 3, 4))
        above, below = mass[row, ids[row]], mass[row, (ids[row] - 1).clamp_min(0)]
        assert (draws <= above + 1e-7).all()
        assert ((draws >= below - 1e-7) | (ids[row] == 0)).all()


@NEEDS_TRITON
@pytest.mark.parametrize("method", [pytest.param(m, marks=SLOW_IF_INTERPRETED) for m in ("soft_grpo", "multiplex")])
@pytest.mark.parametrize("kind", ["peaked", "bf16-rounded"])
def test_the_kernel_gives_the_eager_step_of_a_large_vocabulary(method, kind):
    logits, table = make_logits(kind, 3, 9_000), torch.randn(9_000, WIDTH)
    options = options_of(method, noise="two_sided", tau=0.1)
    assert_same_step(
        triton_step_from_logits(logits, table, **options), latent_step_from_logits(logits, table, **options)
    )
