"""SofT-GRPO and Multiplex Thinking: log-probs and losses of their latent rows, against the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import oracle
from support import tolerances as tol
from support.fused_losses import AGGREGATIONS, assert_equals_the_oracle, make_batch, run
from support.kernels import narrowed, precision, with_kernel
from support.logprobs import value_and_gradients
from torch import Tensor

from latent_kernels import fused_policy_loss, latent_logprob, latent_logprob_from_logits
from latent_kernels.reference.loss import latent_logprob_from_logits_ref

METHODS = ("soft_grpo", "multiplex")
ALL = with_kernel(latent_logprob_from_logits, latent_logprob_from_logits_ref)
FUSED = with_kernel(fused_policy_loss)
SHAPES = [(6, 33, 4), (1, 17, 1), (3, 40, 23)]


def make_rows(make_trajectory: Any, shape: tuple[int, int, int] = SHAPES[0]) -> Any:
    """Return rows with repeated ids, with scores on both sides of SofT-GRPO's clamp, and with junk in text rows."""
    data = make_trajectory(*shape)
    ids, scores = data.ids.clone(), data.scores.clone()
    target = data.logits.gather(-1, ids.clamp_min(0)).log_softmax(-1)
    scores = target + 3.0 * torch.randn(scores.shape, dtype=torch.float64)
    if shape[2] > 2:
        ids[::2, 2] = ids[::2, 0]
    if shape[2] > 20:
        data.logits[0] *= 0.0  # 23 equal shares: log(1 / 23) < -3, so no component counts
    scores[ids[:, -1] == oracle.UNUSED] = torch.nan
    return data._replace(ids=ids, scores=scores)


@ALL
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient_equal_the_oracle(operator, method, shape, make_trajectory):
    data = narrowed(make_rows(make_trajectory, shape), precision(operator))
    options, upstream = dict(temperature=0.7, method=method), torch.randn(shape[0])
    value, gradient = value_and_gradients(
        lambda z: operator(z, data.ids, data.scores, advantages=data.advantages, **options),
        data.logits,
        upstream=upstream,
    )
    expected = oracle.logprob(data.logits, data.ids, data.scores, **options)
    exact = dict(rtol=0, atol=tol.EXACT[precision(operator)])
    torch.testing.assert_close(value.double(), expected.value, **exact)
    torch.testing.assert_close(gradient.double(), upstream.double().unsqueeze(-1) * expected.gradient, **exact)
    if method == "soft_grpo":
        for row, ids in zip(gradient, data.ids, strict=True):
            if not oracle.is_text(ids):
                row[ids] = 0.0
                assert not row.any()  # exactly 0 outside of the components


@ALL
def test_a_row_of_soft_grpo_without_a_component_that_counts_is_zero(operator):
    logits, ids = torch.zeros(1, 30), torch.arange(25).unsqueeze(0)
    value, gradient = value_and_gradients(
        lambda z: operator(z, ids, torch.zeros(1, 25), method="soft_grpo"), logits, upstream=torch.ones(1)
    )
    assert value.item() == 0.0
    assert not gradient.any()


@with_kernel(latent_logprob_from_logits)
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # of Triton's interpreter
def test_a_logit_of_nan_is_not_hidden(operator, make_trajectory):
    data = narrowed(make_rows(make_trajectory), precision(operator))
    latent = next(n for n in range(6) if not oracle.is_text(data.ids[n]))
    data.logits[latent, data.ids[latent, 0]] = torch.nan
    for method in METHODS:
        assert torch.isnan(operator(data.logits, data.ids, data.scores, method=method)[latent])


@ALL
def test_components_add_up_to_the_log_prob_of_the_step(operator, make_trajectory):
    data = narrowed(make_rows(make_trajectory), precision(operator))
    inputs, options = (data.ids, data.scores), dict(temperature=0.7, method="multiplex")
    upstream = torch.randn(data.ids.shape)
    parts, gradient = value_and_gradients(
        lambda z: operator(z, *inputs, components=True, **options), data.logits, upstream=upstream
    )
    whole = operator(data.logits, *inputs, **options)
    torch.testing.assert_close(parts.sum(-1), whole, rtol=0, atol=tol.EXACT[precision(operator)])
    text = torch.tensor([oracle.is_text(row) for row in data.ids])
    assert not parts[text, 1:].any()
    expected = torch.zeros_like(data.logits, dtype=torch.float64)
    for n, k in (parts != 0).nonzero().tolist():  # each component is the token of a text row
        scale = 0.7 if text[n] else 1.0
        ids = torch.tensor([[int(data.ids[n, k]), oracle.UNUSED]])
        single = oracle.logprob(data.logits[n : n + 1], ids, torch.zeros(1, 2), temperature=scale)
        assert parts[n, k].item() == pytest.approx(single.value.item(), abs=tol.FLOAT32)
        expected[n] += float(upstream[n, k]) * single.gradient[0]
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=tol.FLOAT32)


@with_kernel(latent_logprob)
@pytest.mark.parametrize(("method", "components"), [("soft_grpo", False), ("multiplex", False), ("multiplex", True)])
@pytest.mark.parametrize("leaves", ["both", "hidden", "head"])
def test_from_hidden_equals_from_logits(operator, method, components, leaves, make_trajectory, monkeypatch):
    from latent_kernels import _chunks

    monkeypatch.setattr(_chunks, "CHUNK_BYTES", 33 * 8 * 4)  # several chunks
    data = make_rows(make_trajectory)
    head = torch.randn(33, 40, dtype=torch.float64)
    hidden = torch.linalg.lstsq(head, data.logits.T).solution.T
    hidden, head, scores = (x.to(precision(operator)) for x in (hidden, head, data.scores))
    options = dict(method=method, components=components, temperature=0.7)
    upstream = torch.randn(data.ids.shape if components else len(hidden))
    inputs = dict(hidden=hidden, head=head)
    wanted = [name for name in inputs if leaves in ("both", name)]

    def both(function: Any) -> tuple[Tensor, ...]:
        return value_and_gradients(
            lambda *given: function(**{**inputs, **dict(zip(wanted, given, strict=True))}),
            *(inputs[name] for name in wanted),
            upstream=upstream,
        )

    actual = both(lambda hidden, head: operator(hidden, head, data.ids, scores, **options))
    expected = both(lambda hidden, head: latent_logprob_from_logits_ref(hidden @ head.T, data.ids, scores, **options))
    tolerance = 100.0 * tol.EXACT[precision(operator)]  # sums of 33 products of size 3, in another order
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("method", "components"), [("soft_grpo", False), ("multiplex", False), ("multiplex", True)])
def test_gradients_are_those_of_the_value(method, components, make_trajectory):
    data = make_trajectory(6, 11, 3, margins="positive")
    scores = data.logits.gather(-1, data.ids.clamp_min(0)).log_softmax(-1) + 0.5
    options = dict(temperature=0.8, method=method, components=components)
    head = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    logits = data.logits.clone().requires_grad_()
    for operator in (latent_logprob_from_logits, latent_logprob_from_logits_ref):
        assert torch.autograd.gradcheck(lambda z, f=operator: f(z, data.ids, scores, **options), logits)
    assert torch.autograd.gradcheck(lambda h, w: latent_logprob(h, w, data.ids, scores, **options), (hidden, head))


def make_method_batch(make_trajectory: Any, ratio: str, operator: Any) -> dict[str, Tensor]:
    """Return a batch whose old and reference log-probs are near the policy's, for every component if `ratio` says so.

    Old log-probs in unused places are NaN.
    """
    batch = make_batch(make_trajectory)
    batch["scores"] = batch["scores"] + 3.0
    batch["advantages"][batch["advantages"] == 0] = 0.5
    if ratio == "component":
        logits = (batch["hidden"] @ batch["lm_head"].T).flatten(0, 1)
        flat = (batch[name].flatten(0, 1) for name in ("ids", "scores"))
        each = latent_logprob_from_logits_ref(logits, *flat, method="multiplex", components=True)
        unused = (batch["ids"] < 0) & (torch.arange(each.shape[-1]) > 0)
        for name in ("old_logprob", "ref_logprob"):
            near = each.view(batch["ids"].shape) + 0.6 * torch.randn(batch["ids"].shape)
            batch[name] = torch.where(unused, torch.nan, near)
    return narrowed(batch, precision(operator))


LOSSES = [
    *(dict(aggregation=aggregation) for aggregation in AGGREGATIONS),
    dict(objective="cispo", kl_estimator="k1"),
    dict(objective="cispo", clip_high=-0.5),  # the ratio 1 is clipped too
    dict(kl_estimator="k2", dual_clip=None),
    dict(entropy_coef=0.3),
]


@FUSED
@pytest.mark.parametrize("options", LOSSES, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_ratios_of_components_equal_the_oracle(operator, options, make_trajectory):
    batch = make_method_batch(make_trajectory, "component", operator)
    defaults = dict(clip_low=0.1, clip_high=0.3, dual_clip=1.2, objective="clip", kl_coef=0.1, temperature=0.7)
    actual, _ = assert_equals_the_oracle(
        operator, batch, **{**defaults, **options}, method="multiplex", ratio="component"
    )
    assert actual.stats.clip_fraction > 0
    assert torch.isnan(actual.stats.margin_crossed)


@FUSED
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_losses_of_whole_steps_equal_the_oracle(operator, method, ratio, make_trajectory):
    batch = make_method_batch(make_trajectory, ratio, operator)
    actual, _ = assert_equals_the_oracle(operator, batch, method=method, ratio=ratio, kl_coef=0.1, temperature=0.7)
    assert torch.isnan(actual.stats.margin_crossed) == (method == "multiplex")


@FUSED
def test_steps_without_an_advantage_are_left_out(operator, make_trajectory):
    batch = make_method_batch(make_trajectory, "component", operator)
    batch["ref_logprob"] = None
    batch["advantages"][1:, ::2] = 0.0
    options = dict(method="multiplex", ratio="component")
    whole = run(operator, batch, **options)
    batch["mask"] &= batch["advantages"] != 0
    part = run(operator, batch, aggregation="seq-mean-token-sum", **options)
    again = run(operator, {**batch, "old_logprob": batch["old_logprob"].nan_to_num(7.0)}, **options)
    assert torch.equal(part.stats.clip_fraction, whole.stats.clip_fraction)
    assert torch.equal(again.stats.approx_kl, whole.stats.approx_kl)  # unused places are not read


def test_gradients_of_component_ratios_are_those_of_the_value(make_trajectory):
    batch = make_method_batch(make_trajectory, "component", fused_policy_loss)
    batch = {name: value if name == "lm_head" else value[1:3, :3] for name, value in batch.items()}
    leaves = batch.pop("hidden").clone().requires_grad_(), batch.pop("lm_head").requires_grad_()
    options = dict(method="multiplex", ratio="component", kl_coef=0.1, entropy_coef=0.2)
    assert torch.autograd.gradcheck(lambda h, w: fused_policy_loss(h, w, **batch, **options)[0], leaves, fast_mode=True)
