"""Hidden states to policy loss in one pass: against its two parts, float64, masks, memory and autograd's corners."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import tolerances as tol
from support.kernels import narrowed, precision, with_kernel
from support.largest_tensor import LargestTensor
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from latent_kernels import PolicyStats, fused_policy_loss, latent_logprob, policy_loss
from latent_kernels import _chunks as chunks
from latent_kernels import _linear as linear
from latent_kernels._eager import latent_logprob as eager_rows
from latent_kernels.reference import (
    aggregation_weights,
    latent_logprob_from_logits_ref,
    policy_loss_ref,
    text_entropy_ref,
)

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
LOGPROB_OPTIONS = ("temperature", "margin_gradient")


def make_batch(
    make_trajectory: Callable[..., Any],
    shape: tuple[int, int] = (4, 6),
    vocab: int = 257,
    top_k: int = 4,
    width: int = 16,
    dtype: torch.dtype = torch.float64,
    margins: str = "mixed",
) -> dict[str, Tensor]:
    """Mixed text and latent steps, ragged masks (row 0 is fully masked), advantages of both signs and zero."""
    size, steps = shape
    hidden = torch.randn(size * steps, width).to(dtype)
    head = (2.0 * torch.randn(vocab, width) / width**0.5).to(dtype)
    data = make_trajectory(
        size * steps,
        vocab,
        top_k,
        margins=margins,
        logits=hidden.double() @ head.double().T,
        seed=int(torch.randint(99, ())),
    )
    logprob = latent_logprob_from_logits_ref(data.logits, data.ids, data.scores).view(shape)
    lengths = (2 * torch.arange(size).view(-1, 1)) % (steps + 1)
    small = torch.float64 if dtype == torch.float64 else torch.float32
    return dict(
        hidden=hidden.view(size, steps, width),
        lm_head=head,
        ids=data.ids.view(size, steps, top_k),
        scores=data.scores.view(size, steps, top_k).to(small),
        old_logprob=(logprob + 0.6 * torch.randn(shape)).to(small),
        advantages=data.advantages.view(shape).to(small),
        mask=torch.arange(steps) < lengths,
        ref_logprob=(logprob + 0.6 * torch.randn(shape)).to(small),
    )


def composition(batch: dict[str, Tensor], *, plain: bool = False, **options: Any) -> tuple[Tensor, PolicyStats]:
    """The two operators after one another; `plain` takes the rules of the reference and holds [N, V]."""
    shape = batch["mask"].shape
    hidden, ids, scores = (batch[name].flatten(0, 1) for name in ("hidden", "ids", "scores"))
    scoring = {name: options.pop(name) for name in LOGPROB_OPTIONS if name in options}
    scoring["advantages"] = batch["advantages"].flatten()
    if plain:
        logprob = latent_logprob_from_logits_ref(hidden @ batch["lm_head"].T, ids, scores, **scoring)
    else:
        logprob = latent_logprob(hidden, batch["lm_head"], ids, scores, **scoring)
    loss = policy_loss_ref if plain else policy_loss
    rest = (batch[name] for name in ("old_logprob", "advantages", "mask"))
    return loss(logprob.view(shape), *rest, ref_logprob=batch["ref_logprob"], **options)


def run(
    function: Callable[..., tuple[Tensor, PolicyStats]], batch: dict[str, Tensor], **options: Any
) -> tuple[Tensor, Tensor, Tensor, PolicyStats]:
    """Loss, its gradients in hidden and lm_head, and the statistics."""
    leaves = {name: batch[name].detach().clone().requires_grad_() for name in ("hidden", "lm_head")}
    loss, stats = function({**batch, **leaves}, **options)
    return loss.detach(), *torch.autograd.grad(loss, list(leaves.values())), stats


FUSED = with_kernel(fused_policy_loss)


def fused(
    batch: dict[str, Tensor], operator: Callable[..., Any] = fused_policy_loss, **options: Any
) -> tuple[Tensor, PolicyStats]:
    """The operator on a batch."""
    return operator(**batch, **options)


def plain(batch: dict[str, Tensor], **options: Any) -> tuple[Tensor, PolicyStats]:
    """The composition of the reference's rules."""
    return composition(batch, plain=True, **options)


def weighed(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with a little advantage where there was none, so that all active steps are in the statistics."""
    advantages = batch["advantages"]
    return {**batch, "advantages": torch.where(advantages == 0, 0.01, advantages)}


def assert_same_stats(got: PolicyStats, expected: PolicyStats) -> None:
    for name in PolicyStats._fields[:-2]:  # margins and entropies are only seen by the fused operator
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=0, atol=tol.FLOAT32, msg=name)


OPTIONS = [
    dict(aggregation=aggregation, margin_gradient=mode, dual_clip=dual, kl_coef=kl)
    for aggregation, (mode, dual, kl) in itertools.product(
        AGGREGATIONS, [("aligned", 3.0, 0.0), ("released", 1.2, 0.1), ("none", None, 0.5)]
    )
] + [
    dict(ratio=ratio, objective=objective, kl_estimator=kl, kl_coef=0.1)
    for ratio, objective, kl in itertools.product(("token", "sequence"), ("clip", "cispo"), ("k1", "k2", "k3"))
]


@FUSED
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_equals_its_two_parts_and_the_plain_rule(operator, options, make_trajectory):
    batch = narrowed(make_batch(make_trajectory), precision(operator))
    options = dict(options, temperature=0.7, clip_low=0.1, clip_high=0.3)
    got = run(fused, batch, operator=operator, **options)
    exact = narrowed(batch, torch.float64)
    for other in (composition, plain):
        expected = run(other, exact, **options)
        for a, b in zip(got[:3], expected[:3], strict=True):
            torch.testing.assert_close(a.double(), b, rtol=0, atol=tol.EXACT[precision(operator)])
        assert_same_stats(got[3], expected[3])
    assert got[3].clip_fraction > 0
    assert (got[3].kl != 0).item()


@pytest.mark.parametrize(
    "case",
    [
        dict(shape=(1, 1)),
        dict(shape=(1, 9), vocab=17, top_k=1),
        dict(shape=(3, 5), vocab=31, top_k=31),
        dict(shape=(2, 7), vocab=4099, top_k=10),
    ],
    ids=["one-step", "one-row-vocab-17-k-1", "k-is-vocab-31", "vocab-4099"],
)
@FUSED
def test_odd_sizes_equal_the_plain_rule(operator, case, make_trajectory):
    batch = narrowed(make_batch(make_trajectory, **case), precision(operator))
    batch["mask"][:] = True
    batch["advantages"][:] = 1.0
    unclipped = dict(clip_low=1.0, clip_high=1e3)
    got = run(fused, batch, operator=operator, **unclipped)
    expected = run(plain, narrowed(batch, torch.float64), **unclipped)
    for a, b in zip(got[:3], expected[:3], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tol.EXACT[precision(operator)], atol=tol.FLOAT32)
    assert got[1].abs().max() > 0


@FUSED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_error_is_bounded_by_the_compositions(operator, dtype, aggregation, make_trajectory):
    batch = make_batch(make_trajectory, vocab=1000, top_k=10, width=64, dtype=dtype)
    wide = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    options = dict(aggregation=aggregation, temperature=0.8)
    exact, naive = run(plain, wide, **options), run(plain, batch, **options)
    got = run(fused, batch, operator=operator, **options)
    assert [part.dtype for part in got[:3]] == [torch.float32, dtype, dtype]
    for ours, theirs, truth in zip(got[:3], naive[:3], exact[:3], strict=True):
        scale = max(1.0, truth.abs().max().item())
        error, allowed = ((part.double() - truth).abs().max().item() for part in (ours, theirs))
        assert error <= tol.ERROR_FACTOR * allowed + tol.ERROR_FLOOR[dtype] * scale


@pytest.mark.parametrize(("margins", "mode"), [("positive", "aligned"), ("mixed", "none")], ids=lambda p: p)
def test_gradcheck(margins, mode, make_trajectory):
    batch = make_batch(make_trajectory, (2, 3), vocab=11, top_k=3, width=4, margins=margins)
    batch["mask"][:] = True
    leaves = batch.pop("hidden").requires_grad_(), batch.pop("lm_head").requires_grad_()
    options = dict(margin_gradient=mode, kl_coef=0.1, temperature=0.8)
    assert torch.autograd.gradcheck(lambda h, w: fused_policy_loss(h, w, **batch, **options)[0], leaves)


@FUSED
def test_statistics_count_the_crossed_margins(operator, make_trajectory):
    batch = weighed(narrowed(make_batch(make_trajectory), precision(operator)))
    _, stats = fused(batch, operator)
    logits = batch["hidden"] @ batch["lm_head"].T
    latent = batch["mask"] & (batch["ids"][..., 1] != -100)
    margins = batch["scores"] - logits.log_softmax(-1).gather(-1, batch["ids"].clamp_min(0))
    expected = (margins[latent] < 0).double().mean().item()
    assert 0.1 < expected < 0.9
    assert stats.margin_crossed.item() == pytest.approx(expected, abs=tol.FLOAT32)
    assert isinstance(stats, PolicyStats)
    assert all(value.shape == () and value.dtype == torch.float32 for value in stats)
    assert not any(value.requires_grad for value in stats)


@FUSED
def test_margins_are_nan_where_no_step_is_latent(operator, make_trajectory):
    batch = narrowed(make_batch(make_trajectory), precision(operator))
    batch["ids"][..., 1:] = -100
    assert torch.isnan(fused(batch, operator)[1].margin_crossed)


def padded(value: Tensor, rows: int, steps: int) -> Tensor:
    """The tensor [r, t, ...] in the first corner of zeros [rows, steps, ...]."""
    out = value.new_zeros(rows, steps, *value.shape[2:])
    out[: value.shape[0], : value.shape[1]] = value
    return out


@FUSED
def test_float16_gradients_keep_their_bits_in_a_large_batch(operator, make_trajectory):
    batch = make_batch(make_trajectory, (2, 4), dtype=torch.float16)
    batch["mask"][:] = True
    # A step's weight is 1 / (512 * 1024): times it, float16 would hold gradients of one to three bits.
    batch = {name: value if name == "lm_head" else padded(value, 512, 1024) for name, value in batch.items()}
    options = dict(aggregation="seq-mean-token-sum-norm", clip_low=1.0, clip_high=1e3)
    wide = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    results = []
    for function, data in ((operator, batch), (fused_policy_loss, wide)):
        leaves = [data[name].requires_grad_() for name in ("hidden", "lm_head")]
        loss, _ = function(**data, **options)
        results.append(torch.autograd.grad(loss * 2.0**19, leaves))  # the loss scale of float16
    for got, expected in zip(*results, strict=True):
        tolerance = tol.ERROR_FLOOR[torch.float16] * expected.abs().max().item()
        torch.testing.assert_close(got.double(), expected, rtol=tol.ERROR_FLOOR[torch.float16], atol=tolerance)


# Masks, and steps without an advantage


@FUSED
def test_a_sequence_ratio_counts_steps_without_an_advantage_but_no_such_response(
    operator, make_trajectory, monkeypatch
):
    batch = narrowed(make_batch(make_trajectory), precision(operator))
    batch["ref_logprob"] = None
    batch["advantages"][1] = 0.0
    batch["advantages"][2:, ::2] = 0.0
    module, seen = sys.modules["latent_kernels.ops.fused_policy_loss"], []
    project = module.project
    monkeypatch.setattr(module, "project", lambda h, w, out: seen.append(len(h)) or project(h, w, out))
    got = run(fused, batch, operator=operator, ratio="sequence")
    counted = batch["mask"] & (batch["advantages"] != 0).any(-1, keepdim=True)
    assert sum(seen) == 2 * counted.sum() < 2 * batch["mask"].sum()  # once for the ratios, once for the gradient
    expected = run(plain, narrowed(batch, torch.float64), ratio="sequence")
    for a, b in zip(got[:3], expected[:3], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tol.EXACT[precision(operator)])
    assert got[1].abs().max() > 0


@FUSED
def test_steps_without_an_advantage_never_reach_the_head(operator, make_trajectory, monkeypatch):
    batch = narrowed(make_batch(make_trajectory), precision(operator))
    batch["advantages"][1:, ::2] = 0.0
    module, seen = sys.modules["latent_kernels.ops.fused_policy_loss"], []
    project = module.project
    monkeypatch.setattr(module, "project", lambda h, w, out: seen.append(len(h)) or project(h, w, out))
    exact = tol.EXACT[precision(operator)]
    for ref, kl_coef in ((None, 0.0), (batch["ref_logprob"], 0.1)):
        seen.clear()
        given = {**batch, "ref_logprob": ref}
        got = run(fused, given, operator=operator, kl_coef=kl_coef)
        # With a reference model they have a KL term.
        counted = batch["mask"] & (batch["advantages"] != 0) if ref is None else batch["mask"]
        assert 0 < sum(seen) == counted.sum()
        expected = run(plain, narrowed(given, torch.float64), kl_coef=kl_coef)
        for a, b in zip(got[:3], expected[:3], strict=True):
            torch.testing.assert_close(a.double(), b, rtol=0, atol=exact)
        # The statistics are means over the steps that were scored.
        alone = plain({**given, "mask": counted}, kl_coef=kl_coef)[1]
        for name in ("clip_fraction", "dual_clip_fraction", "approx_kl", "abs_log_ratio"):
            assert getattr(got[3], name).item() == pytest.approx(getattr(alone, name).item(), abs=tol.FLOAT32), name


@FUSED
def test_a_batch_without_an_advantage_gives_zero(operator, make_trajectory):
    batch = narrowed(make_batch(make_trajectory), precision(operator))
    batch["advantages"].zero_()
    batch["ref_logprob"] = None
    loss, *gradients, stats = run(fused, batch, operator=operator)
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
def test_masked_steps_may_hold_anything(operator, options, junk, make_trajectory):
    batch = narrowed(make_batch(make_trajectory), precision(operator))
    mask = batch["mask"]
    dirty = dict(batch)
    for name in ("hidden", "scores", "old_logprob", "advantages", "ref_logprob"):
        wide = mask.unsqueeze(-1) if batch[name].ndim == 3 else mask
        dirty[name] = torch.where(wide, batch[name], junk)
    dirty["ids"] = torch.where(mask.unsqueeze(-1), batch["ids"], -100)
    options = dict(options, kl_coef=0.1, operator=operator)
    got, expected = run(fused, dirty, **options), run(fused, batch, **options)
    for a, b in zip((*got[:3], *got[3]), (*expected[:3], *expected[3]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got[1][~mask], torch.zeros_like(got[1][~mask]))
    assert (got[1][mask].abs().sum(-1) > 0).any()


@FUSED
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (3, 0)], ids=str)
def test_a_fully_masked_batch_gives_zero(operator, aggregation, shape, make_trajectory):
    batch = narrowed(make_batch(make_trajectory, (3, 4)), precision(operator))
    batch = {n: v if n == "lm_head" else v[: shape[0], : shape[1]] for n, v in batch.items()}
    batch["mask"] = torch.zeros(shape, dtype=torch.bool)
    loss, hidden_grad, head_grad, stats = run(fused, batch, operator=operator, aggregation=aggregation, kl_coef=0.1)
    assert loss.item() == 0.0
    assert torch.equal(hidden_grad, torch.zeros_like(batch["hidden"]))
    assert torch.equal(head_grad, torch.zeros_like(batch["lm_head"]))
    assert [value.item() for value in stats[:5]] == [0.0] * 5


def test_masked_rows_never_reach_the_head(make_trajectory, monkeypatch):
    batch = make_batch(make_trajectory)
    module, seen = sys.modules["latent_kernels.ops.fused_policy_loss"], []
    project = module.project
    monkeypatch.setattr(module, "project", lambda h, w, out: seen.append(len(h)) or project(h, w, out))
    fused(batch)
    assert sum(seen) == batch["mask"].sum() < batch["mask"].numel()


@given(seed=st.integers(0, 2**31), aggregation=st.sampled_from(AGGREGATIONS))
def test_responses_may_come_in_any_order(make_trajectory, seed, aggregation):
    torch.manual_seed(seed)
    batch, order = make_batch(make_trajectory, vocab=33), torch.randperm(4)
    shuffled = {name: value if name == "lm_head" else value[order] for name, value in batch.items()}
    options = dict(aggregation=aggregation, kl_coef=0.1)
    expected, got = run(fused, batch, **options), run(fused, shuffled, **options)
    for a, b in zip(got[:3], (expected[0], expected[1][order], expected[2]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tol.FLOAT64)


@FUSED
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("mode", ["aligned", "released", "none"])
def test_huge_margins_stay_finite(operator, sign, mode, make_trajectory):
    batch = make_batch(make_trajectory, dtype=torch.float32)
    batch["mask"][:] = True
    batch["scores"][:, ::2] += sign * 1e4
    batch["scores"][:, 1::2, 0] = -torch.inf
    loss, hidden_grad, head_grad, stats = run(fused, batch, operator=operator, margin_gradient=mode, kl_coef=0.1)
    assert torch.isfinite(loss)
    assert torch.isfinite(hidden_grad).all()
    assert torch.isfinite(head_grad).all()
    assert all(torch.isfinite(value) for value in stats[:-1])  # there is no entropy without its bonus


@FUSED
def test_strided_inputs_equal_contiguous_ones(operator, make_trajectory):
    batch = narrowed(make_batch(make_trajectory), precision(operator))
    strided = {
        name: value.transpose(0, 1).contiguous().transpose(0, 1) if name != "lm_head" else value.T.contiguous().T
        for name, value in batch.items()
    }
    assert not any(value.is_contiguous() for value in strided.values())
    got, expected = (run(fused, data, operator=operator)[:3] for data in (strided, batch))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tol.EXACT[precision(operator)])


@FUSED
def test_inputs_are_left_as_they_were(operator, make_trajectory):
    batch = narrowed(make_batch(make_trajectory), precision(operator))
    before = {name: value.clone() for name, value in batch.items()}
    run(fused, batch, operator=operator, kl_coef=0.1)
    assert all(torch.equal(batch[name], before[name]) for name in batch)


# Entropy bonus


def with_entropy(batch: dict[str, Tensor], *, entropy_coef: float, **options: Any) -> tuple[Tensor, PolicyStats]:
    """The plain rule, less the entropy of text steps; it holds [N, V]."""
    loss, stats = plain(batch, **options)
    logits = batch["hidden"].flatten(0, 1) @ batch["lm_head"].T
    entropy = text_entropy_ref(logits, batch["ids"].flatten(0, 1), options["temperature"]).view_as(batch["mask"])
    weights = aggregation_weights(batch["mask"].double(), options.get("aggregation", "token-mean"))
    text = batch["mask"] & (batch["ids"][..., 1] == -100)
    return loss - entropy_coef * (weights * entropy).sum(), stats._replace(entropy=entropy[text].mean().detach())


@FUSED
@pytest.mark.parametrize(
    "options",
    [*(dict(aggregation=aggregation) for aggregation in AGGREGATIONS), dict(ratio="sequence"), dict(objective="cispo")],
    ids=lambda o: "-".join(o.values()),
)
@pytest.mark.parametrize("case", ["reference", "no-reference", "no-advantages", "bonus-alone"])
def test_entropy_bonus_equals_the_plain_rule(operator, options, case, make_trajectory, monkeypatch):
    monkeypatch.setattr(eager_rows, "BLOCK_COLUMNS", 100)
    batch = narrowed(make_batch(make_trajectory), precision(operator))
    if case != "reference":
        batch["ref_logprob"] = None
    if case in ("no-advantages", "bonus-alone"):
        batch["advantages"][1:] = 0.0  # then nothing but the bonus gives text steps a gradient
    if case == "bonus-alone":
        batch["ids"][..., 1:] = -100
    options = dict(options, temperature=0.7, entropy_coef=0.3, kl_coef=0.1 if case == "reference" else 0.0)
    got = run(fused, batch, operator=operator, **options)
    expected = run(with_entropy, narrowed(batch, torch.float64), **options)
    for a, b in zip(got[:3], expected[:3], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tol.EXACT[precision(operator)])
    assert got[3].entropy.item() == pytest.approx(expected[3].entropy.item(), abs=tol.FLOAT32)
    without = run(fused, batch, operator=operator, **{**options, "entropy_coef": 0.0})
    assert torch.isnan(without[3].entropy)
    assert (got[1] - without[1]).abs().max() > 1e-3
    if case == "bonus-alone":
        assert without[1].abs().max() == 0.0


def test_the_gradient_of_the_entropy_is_its_closed_form():
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    ids = torch.full((5, 2), -100)
    ids[:, 0], ids[3] = 1, torch.tensor([2, 4])  # one latent row
    entropy = text_entropy_ref(logits, ids, 0.7)
    log_p = (logits.detach() / 0.7).log_softmax(-1)
    expected = -log_p.exp() * (log_p + entropy.detach().unsqueeze(-1)) / 0.7
    expected[3] = 0.0
    (gradient,) = torch.autograd.grad(entropy.sum(), logits)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=tol.FLOAT64)
    assert entropy[3] == 0.0
    assert torch.autograd.gradcheck(lambda x: text_entropy_ref(x, ids, 0.7), logits)


def test_gradcheck_of_the_entropy_bonus(make_trajectory):
    batch = make_batch(make_trajectory, (2, 3), vocab=11, top_k=3, width=4, margins="positive")
    batch["mask"][:] = True
    leaves = batch.pop("hidden").requires_grad_(), batch.pop("lm_head").requires_grad_()
    options = dict(temperature=0.8, entropy_coef=0.5)
    assert torch.autograd.gradcheck(lambda h, w: fused_policy_loss(h, w, **batch, **options)[0], leaves)


def test_entropy_bonus_holds_no_second_chunk_of_logits(make_trajectory, monkeypatch):
    vocab, rows_a_chunk = 512, 12
    monkeypatch.setattr(chunks, "CHUNK_BYTES", rows_a_chunk * vocab * 4)
    monkeypatch.setattr(eager_rows, "BLOCK_COLUMNS", 64)
    batch = make_batch(make_trajectory, (8, 12), vocab=vocab, width=8, dtype=torch.float32)
    batch["mask"][:] = True
    with LargestTensor() as seen:
        run(fused, batch, entropy_coef=0.1)
    assert rows_a_chunk * vocab <= seen.elements < 96 * vocab / 4


# Chunks and memory


@FUSED
@pytest.mark.parametrize("rows_a_chunk", [1, 5])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_chunks_do_not_change_the_result(operator, rows_a_chunk, entropy_coef, make_trajectory, monkeypatch):
    dtype = precision(operator)
    batch = narrowed(make_batch(make_trajectory), dtype)
    options = dict(operator=operator, kl_coef=0.1, entropy_coef=entropy_coef)
    expected = run(fused, batch, **options)
    for limit in ("CHUNK_BYTES", "CUDA_CHUNK_BYTES"):
        monkeypatch.setattr(chunks, limit, rows_a_chunk * 257 * dtype.itemsize)
    monkeypatch.setattr(linear, "BLOCK_ROWS", 50)
    assert len(chunks.row_chunks(int(batch["mask"].sum()), 257, dtype, torch.device("cpu"))) > 1
    got = run(fused, batch, **options)
    for a, b in zip(got[:3], expected[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tol.EXACT[dtype])
    for a, b in zip(got[3], expected[3], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tol.FLOAT32, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tensor_is_as_large_as_all_logits(dtype, make_trajectory, monkeypatch):
    size, vocab, rows_a_chunk = 96, 512, 12
    monkeypatch.setattr(chunks, "CHUNK_BYTES", rows_a_chunk * vocab * 4)
    batch = make_batch(make_trajectory, (8, 12), vocab=vocab, width=8, dtype=dtype)
    batch["mask"][:] = True
    with LargestTensor() as seen:
        run(fused, batch)
    assert rows_a_chunk * vocab <= seen.elements < size * vocab / 4
    with LargestTensor() as naive:
        run(plain, batch)
    assert naive.elements >= size * vocab


# Autograd's corners


@FUSED
@pytest.mark.parametrize("wanted", ["both", "hidden", "lm_head", "neither", "no-grad"])
def test_gradient_subsets(operator, wanted, make_trajectory, monkeypatch):
    batch = narrowed(make_batch(make_trajectory), precision(operator))
    expected = run(fused, batch, operator=operator)
    leaves = {"both": ("hidden", "lm_head"), "no-grad": ("hidden", "lm_head"), "neither": ()}.get(wanted, (wanted,))
    for name in leaves:
        batch[name].requires_grad_()
    if wanted in ("neither", "no-grad"):  # nothing may be spent on gradients
        module = sys.modules["latent_kernels.ops.fused_policy_loss"]
        for product in ("back_project", "add_outer_"):
            monkeypatch.setattr(module, product, lambda *_: pytest.fail("took a gradient that nobody wants"))
    with torch.set_grad_enabled(wanted != "no-grad"):
        loss, _ = fused(batch, operator)
    assert torch.equal(loss, expected[0])
    assert loss.requires_grad == (wanted in ("both", "hidden", "lm_head"))
    if not loss.requires_grad:
        return
    loss.backward()
    for name, gradient in zip(("hidden", "lm_head"), expected[1:3], strict=True):
        if name in leaves:
            torch.testing.assert_close(batch[name].grad, gradient, rtol=0, atol=tol.EXACT[precision(operator)])
        else:
            assert batch[name].grad is None


@FUSED
def test_upstream_scales_and_calls_accumulate(operator, make_trajectory):
    batch = narrowed(make_batch(make_trajectory), precision(operator))
    once = run(fused, batch, operator=operator)[1:3]
    leaves = batch["hidden"].requires_grad_(), batch["lm_head"].requires_grad_()
    for factor in (2.0, -0.5):
        (factor * fused(batch, operator)[0]).backward()
    for leaf, gradient in zip(leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, 1.5 * gradient, rtol=0, atol=tol.EXACT[precision(operator)])


@FUSED
def test_backward_may_run_twice_over_a_retained_graph(operator, make_trajectory):
    batch = narrowed(make_batch(make_trajectory), precision(operator))
    hidden = batch["hidden"].requires_grad_()
    loss, _ = fused(batch, operator)
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(3.0 * loss, hidden)
    torch.testing.assert_close(second, 3.0 * first, rtol=0, atol=tol.EXACT[precision(operator)])


@FUSED
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_activation_checkpointing(operator, reentrant, make_trajectory):
    batch = narrowed(make_batch(make_trajectory), precision(operator))

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        return fused({**batch, "hidden": torch.tanh(hidden), "lm_head": head}, operator)[0]

    results = []
    for call in (loss, lambda *leaves: checkpoint(loss, *leaves, use_reentrant=reentrant)):
        leaves = [batch[name].clone().requires_grad_() for name in ("hidden", "lm_head")]
        value = call(*leaves)
        value.backward()
        results.append((value, leaves[0].grad, leaves[1].grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@FUSED
def test_autocast_changes_nothing(operator, make_trajectory):
    batch = make_batch(make_trajectory, dtype=torch.float32)
    expected = run(fused, batch, operator=operator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(fused, batch, operator=operator)
    assert all(torch.equal(a, b) for a, b in zip(got[:3], expected[:3], strict=True))


@FUSED
def test_double_backward_raises(operator, make_trajectory):
    batch = narrowed(make_batch(make_trajectory), precision(operator))
    hidden = batch["hidden"].requires_grad_()
    loss, _ = fused(batch, operator)
    (gradient,) = torch.autograd.grad(loss.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@FUSED
def test_old_log_probs_carry_no_gradient(operator, make_trajectory):
    batch = narrowed(make_batch(make_trajectory), precision(operator))
    hidden = batch["hidden"].requires_grad_()
    for name in ("old_logprob", "advantages", "scores", "ref_logprob"):
        batch[name].requires_grad_()
    loss, _ = fused(batch, operator, kl_coef=0.1)
    loss.backward()
    assert hidden.grad is not None
    assert all(batch[name].grad is None for name in ("old_logprob", "advantages", "scores", "ref_logprob"))


# Validation

FLAT = torch.zeros(2, 3)
IDS = torch.zeros(2, 3, 4, dtype=torch.int64)
INVALID = {
    "hidden-shape": (
        dict(hidden=torch.zeros(6, 8)),
        ValueError,
        r"hidden must have shape \[\*, \*, \*\], got \[6, 8\]",
    ),
    "hidden-dtype": (dict(hidden=torch.zeros(2, 3, 8).long()), TypeError, "hidden .* got torch.int64"),
    "head-shape": (dict(lm_head=torch.zeros(9, 7)), ValueError, r"lm_head must have shape \[\*, 8\], got \[9, 7\]"),
    "head-device": (dict(lm_head=torch.zeros(9, 8, device="meta")), ValueError, "lm_head is on meta"),
    "ids-shape": (dict(ids=IDS[:, :2]), ValueError, r"ids must have shape \[2, 3, \*\], got \[2, 2, 4\]"),
    "ids-dtype": (dict(ids=IDS.float()), TypeError, "ids must be torch.int64, got torch.float32"),
    "ids-empty": (dict(ids=IDS[..., :0], scores=torch.zeros(2, 3, 0)), ValueError, "ids .* component"),
    "scores-shape": (dict(scores=torch.zeros(2, 3, 3)), ValueError, r"scores .* \[2, 3, 4\], got \[2, 3, 3\]"),
    "old-shape": (dict(old_logprob=torch.zeros(6)), ValueError, r"old_logprob must have shape \[2, 3\], got \[6\]"),
    "advantages-shape": (dict(advantages=torch.zeros(2)), ValueError, r"advantages .* \[2, 3\], got \[2\]"),
    "mask-shape": (dict(mask=torch.zeros(3, 2)), ValueError, r"mask must have shape \[2, 3\], got \[3, 2\]"),
    "mask-device": (dict(mask=FLAT.to("meta")), ValueError, "mask is on meta"),
    "temperature": (dict(temperature=-1.0), ValueError, "temperature .* got -1.0"),
    "margin-gradient": (dict(margin_gradient="x"), ValueError, "margin_gradient must be one of .* got 'x'"),
    "clip-low": (dict(clip_low=2.0), ValueError, "clip_low .* got 2.0"),
    "clip-high": (dict(clip_high="a"), TypeError, "clip_high must be a number, got str"),
    "dual-clip": (dict(dual_clip=0.5), ValueError, "dual_clip .* got 0.5"),
    "aggregation": (dict(aggregation="sum"), ValueError, "aggregation must be one of .* got 'sum'"),
    "entropy-coef": (dict(entropy_coef=-0.1), ValueError, "entropy_coef .* got -0.1"),
    "kl-without-ref": (dict(kl_coef=0.5), ValueError, "kl_coef is 0.5, but ref_logprob is None"),
    "ref-shape": (dict(ref_logprob=torch.zeros(2, 2)), ValueError, r"ref_logprob .* got \[2, 2\]"),
    "impl-bogus": (dict(impl="bogus"), ValueError, "impl must be one of .* got 'bogus'"),
    "impl-triton": (dict(impl="triton"), RuntimeError, "use impl='auto'"),
}


@pytest.mark.parametrize(("change", "error", "message"), INVALID.values(), ids=INVALID)
def test_wrong_arguments_are_named(change, error, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = {
        "hidden": torch.zeros(2, 3, 8), "lm_head": torch.zeros(9, 8), "ids": IDS, "scores": torch.zeros(2, 3, 4),
        "old_logprob": FLAT, "advantages": FLAT, "mask": FLAT.bool(), **change,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        fused_policy_loss(**arguments)
