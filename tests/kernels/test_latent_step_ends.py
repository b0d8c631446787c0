"""When a latent run ends: the raw and the noisy rule, the least and the most steps; and the least noise."""

from __future__ import annotations

import pytest
import torch
from support import oracle
from support.kernels import NEEDS_TRITON, SLOW_IF_INTERPRETED, kernel, with_kernel
from support.latent_steps import WIDTH, assert_same_step, make_logits

from latent_kernels import latent_step_from_logits, project_with_noise
from latent_kernels.reference.latent_step import latent_step_from_logits_ref, project_with_noise_ref

triton_step_from_logits = kernel(latent_step_from_logits)
OPERATORS = {
    "public": latent_step_from_logits,
    "reference": latent_step_from_logits_ref,
    "triton": pytest.param(triton_step_from_logits, marks=[NEEDS_TRITON, *SLOW_IF_INTERPRETED]),
}
ALL = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
METHODS = pytest.mark.parametrize("method", ["latent_grpo", "soft_grpo", "multiplex"])
END = 7

pytestmark = pytest.mark.usefixtures("small_segments")


def unsure_rows(rows: int, vocab: int) -> torch.Tensor:
    """Return logits [rows, vocab] whose first rows have the end marker on top, and whose last rows have it near it."""
    logits = 2.0 * torch.randn(rows, vocab)
    top = logits.amax(-1)
    logits[:, END] = torch.where(torch.arange(rows) < rows // 2, top + 1.0, top - 0.1)
    return logits


@ALL
@METHODS
@pytest.mark.parametrize(("vocab", "rows"), [(40, 6), (4000, 6)], ids=["small", "large"])
def test_the_noisy_rule_ends_a_row_by_the_first_id_of_its_mixture(operator, method, vocab, rows):
    logits, table = unsure_rows(rows, vocab), torch.randn(vocab, WIDTH)
    mask = torch.arange(rows) % 3 != 0
    options = dict(method=method, top_k=4, top_p=1.0, noise="two_sided", seed=9, latent_mask=mask)
    free = oracle.latent_step(logits, table, **options)  # without an end marker no row ends
    raw = mask & (logits.argmax(-1) == END)
    chosen = mask & (free.ids[:, 0] == END)
    by_raw = operator(logits, table, **options, end_token_id=END)
    assert torch.equal(by_raw.is_latent, mask & ~raw)
    noisy = operator(logits, table, **options, end_token_id=END, end_rule="noisy")
    ended = raw | chosen if method == "latent_grpo" else chosen
    assert torch.equal(noisy.is_latent, mask & ~ended)
    assert (noisy.top_token[ended] == END).all()
    assert torch.equal(noisy.top_token[~ended], logits.argmax(-1)[~ended])
    kept = ~raw if method == "latent_grpo" else torch.ones_like(raw)  # rows with their noisy mixtures
    assert torch.equal(noisy.ids[kept], free.ids[kept])
    silent = operator(logits, table, **options | dict(noise="none"), end_token_id=END, end_rule="noisy")
    assert torch.equal(silent.is_latent, mask & ~raw)


@ALL
@METHODS
@pytest.mark.parametrize("end_rule", ["raw", "noisy"])
def test_a_run_has_the_least_and_at_most_the_most_steps(operator, method, end_rule):
    rows, steps = 5, torch.tensor([0, 1, 2, 3, 4])
    logits, table = make_logits("normal", 1, 50).expand(rows, -1).clone(), torch.randn(50, WIDTH)
    logits[:, END] = logits.amax() + 20.0  # ends every run that it may end
    mask = torch.tensor([True, True, True, True, False])
    options = dict(method=method, top_k=3, top_p=1.0, noise="two_sided", seed=2, latent_mask=mask)
    limits = dict(end_token_id=END, end_rule=end_rule, min_latent_steps=2)
    step = operator(logits, table, **options, step=steps, **limits)
    free = operator(logits, table, **options, step=steps)
    assert step.is_latent.tolist() == [True, True, False, False, False]
    for actual, expected in zip(step[:5], free[:5], strict=True):
        assert torch.equal(actual[:2], expected[:2]), "a row below the least steps is a latent row with noise"
    limits = dict(end_token_id=11, end_rule=end_rule, max_latent_steps=3)  # 11 is never on top
    step = operator(logits, table, **options, step=steps, **limits)
    assert step.is_latent.tolist() == [True, True, True, False, False]
    assert step.top_token.tolist() == [END, END, END, 11, END]
    clean = operator(logits, table, noise="none", top_k=3)
    assert torch.equal(step.ids[3], clean.ids[3])
    assert torch.equal(step.scores[3], clean.scores[3])
    whole = operator(logits, table, **options, step=torch.tensor(3), **limits)
    assert not whole.is_latent.any()
    assert operator(logits, table, **options, step=2, **limits).is_latent.tolist() == mask.tolist()


@NEEDS_TRITON
@METHODS
def test_the_kernel_ends_rows_as_the_eager_step_does(method):
    logits, table = unsure_rows(4, 30), torch.randn(30, WIDTH)
    options = dict(method=method, top_k=2, top_p=1.0, noise="one_sided", noise_delta=0.2, seed=4)
    options |= dict(end_token_id=END, end_rule="noisy", min_latent_steps=1, max_latent_steps=6)
    options |= dict(step=torch.tensor([0, 2, 3, 6]), latent_mask=torch.tensor([True, True, True, True]))
    expected = latent_step_from_logits(logits, table, **options)
    assert 0 < expected.is_latent.sum() < 4
    assert_same_step(triton_step_from_logits(logits, table, **options), expected)


@ALL
@pytest.mark.parametrize("kind", ["normal", "near-uniform"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_delta_is_the_least_one_sided_noise(operator, kind, scale):
    logits, table = make_logits(kind, 2, 700), torch.randn(700, WIDTH)
    draws = torch.empty(2, 700).exponential_()
    draws[:, ::2] = 50.0  # clamped from below
    options = dict(noise_delta=0.3, noise_scale=scale, exponential=draws)
    step, expected = operator(logits, table, **options), oracle.latent_step(logits, table, **options)
    assert_same_step(step, expected)
    margins = step.scores - logits.log_softmax(-1).gather(-1, step.ids)
    assert margins.min() >= 0.3 * scale - 1e-5
    assert margins.max() <= 4.8 * scale + 1e-5


@with_kernel(project_with_noise, project_with_noise_ref)
def test_delta_is_the_least_noise_of_a_projection(operator):
    hidden, weight = torch.randn(3, 4), torch.randn(20, 4)
    scale = torch.tensor([1.0, 2.0, 0.0])
    base = operator(hidden, weight, seed=1, noise_scale=scale)
    shifted = operator(hidden, weight, seed=1, noise_scale=scale, noise_delta=0.5)
    torch.testing.assert_close(shifted, base + 0.5 * scale.unsqueeze(-1), rtol=0, atol=1e-5)
