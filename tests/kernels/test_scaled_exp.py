"""Log-probs and loss straight from the product with the head, without logits: exact, as the path with logits is.

Triton's interpreter multiplies in float32. So float32 heads, which the operators never send this way, show that the
arithmetic is exact, and bfloat16 heads that its rounding is no coarser than that of the path with logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import oracle_head
from support import tolerances as tol
from support.fused_losses import assert_equals_the_oracle, make_batch, run
from support.kernels import DEVICE, NEEDS_TRITON, kernel, narrowed
from torch import Tensor

from latent_kernels import _chunks as chunks
from latent_kernels import fused_policy_loss, latent_logprob
from latent_kernels._loss_types import LogprobSpec
from latent_kernels._types import HeadOptions

pytestmark = NEEDS_TRITON
FUSED, VOCAB = kernel(fused_policy_loss), 257


def tile() -> Any:
    """Return a tile that no vocabulary of these tests is a multiple of."""
    from latent_kernels._triton import scaled_exp

    return scaled_exp.ExpConfig(16, 64, 16, 4, 2) if DEVICE == "cpu" else scaled_exp.TABLE[9][1]


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Send every product this way, in several chunks of rows, and require that some came."""
    from latent_kernels._triton import scaled_exp

    seen: list[bool] = []
    score = scaled_exp.scaled_exp_rows

    def counted(*arguments: Any) -> Any:
        seen.append(True)
        return score(*arguments)

    monkeypatch.setattr(scaled_exp, "choose", lambda *_: tile())
    monkeypatch.setattr(scaled_exp, "scaled_exp_rows", counted)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 9 * VOCAB * 4)
    monkeypatch.setattr(chunks, "EXPS_BYTES", 9 * VOCAB * 4)
    monkeypatch.setattr(chunks, "EXPS_BYTES_TRAINED", 9 * VOCAB * 4)
    yield seen
    assert seen


OPTIONS = [
    dict(aggregation="token-mean", margin_gradient="aligned", kl_coef=0.1),
    dict(aggregation="seq-mean-token-sum", margin_gradient="released", dual_clip=1.2),
    dict(ratio="sequence", objective="cispo", margin_gradient="none"),
    dict(method="soft_grpo", dual_clip=None),
    dict(method="multiplex", objective="vespo"),
]
NAMED = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))


@pytest.mark.usefixtures("tiles")
@NAMED
def test_loss_and_gradients_equal_the_oracle(options, make_trajectory):
    batch = narrowed(make_batch(make_trajectory), torch.float32)
    assert_equals_the_oracle(FUSED, batch, temperature=0.7, clip_low=0.1, clip_high=0.3, **options)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(
    ("has_bias", "head"),
    [(True, {}), (False, dict(logit_scale=1.7, softcap=3.0)), (True, dict(logit_scale=0.6, softcap=1.5))],
    ids=["bias", "cap", "all"],
)
def test_log_probs_with_options_of_a_head_equal_the_oracle(has_bias, head, make_trajectory):
    hidden, lm_head = torch.randn(11, 16), 2.0 * torch.randn(VOCAB, 16) / 4.0
    bias = torch.randn(VOCAB) if has_bias else None
    logits = oracle_head.head_logits(hidden, lm_head, bias, **head).value
    data = narrowed(make_trajectory(11, VOCAB, 4, logits=logits), torch.float32)
    leaf, options = hidden.clone().requires_grad_(), dict(temperature=0.7, advantages=data.advantages)
    value = kernel(latent_logprob)(leaf, lm_head, data.ids, data.scores, bias=bias, **head, **options)
    upstream = torch.randn(11)
    (gradient,) = torch.autograd.grad(value, leaf, upstream)
    inputs = tuple(x for x in (hidden, lm_head, bias) if x is not None)
    expected = oracle_head.logprob(inputs, data.ids, data.scores, upstream, head, **options)
    for actual, exact in zip((value.detach(), gradient), expected, strict=False):
        torch.testing.assert_close(actual.double(), exact, rtol=0, atol=tol.FLOAT32)
    with torch.no_grad():  # nothing is stored
        alone = kernel(latent_logprob)(hidden, lm_head, data.ids, data.scores, bias=bias, **head, **options)
    assert torch.equal(alone, value)


@pytest.mark.usefixtures("tiles")
def test_components_without_a_gradient_equal_the_sum(make_trajectory):
    hidden, lm_head = torch.randn(5, 8), torch.randn(VOCAB, 8)
    data = narrowed(make_trajectory(5, VOCAB, 3, logits=hidden.double() @ lm_head.double().T), torch.float32)
    inputs = hidden, lm_head, data.ids, data.scores
    each = kernel(latent_logprob)(*inputs, method="multiplex", components=True)
    torch.testing.assert_close(each.sum(-1), kernel(latent_logprob)(*inputs, method="multiplex"))


def scored(logits: Tensor, ids: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return log-probs [n] and their gradient in logits [n, V] of float32, whose head is the identity."""
    from latent_kernels._triton import scaled_exp

    scores, lm_head = torch.zeros(ids.shape, device=DEVICE), torch.eye(logits.shape[1], device=DEVICE)
    head = HeadOptions(None if bias is None else bias.to(DEVICE))
    spec = LogprobSpec(ids.to(DEVICE), scores, None, 1.0, "none", "multiplex", head=head)
    buffer = scaled_exp.exps_buffer(len(logits), lm_head, tile())
    result = scaled_exp.scaled_exp_rows(logits.to(DEVICE), lm_head, spec, tile(), buffer)
    dlogits, factor = result.gradient
    return result.logprob.cpu(), (dlogits.double() * factor.unsqueeze(-1).double()).cpu()


def test_components_far_below_the_likeliest_token_do_not_overflow():
    """The exponentials of the first rows would exceed 2^40, 2^127 and float32's largest exponent of a logit."""
    logits = torch.randn(5, 132)
    logits[0, 70] += 35.0
    logits[1, 3] += 120.0
    logits[2, [3, 130]] += torch.tensor([500.0, 2000.0])
    logits[3, 5:] = -torch.inf
    ids = torch.tensor([[1, 2], [1, -100], [130, 2], [1, 0], [140, 2]])
    logprob, gradient = scored(torch.where(logits == -torch.inf, -1e4, logits), ids)
    exact = logits[:4].double().log_softmax(-1)
    kept = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    expected = (exact.gather(-1, ids[:4].clamp_min(0)) * kept).sum(-1)
    torch.testing.assert_close(logprob[:4].double(), expected, rtol=tol.FLOAT32, atol=tol.FLOAT32)
    onehot = torch.zeros(4, 132).scatter_add_(-1, ids[:4].clamp_min(0), kept)
    expected = onehot - kept.sum(-1, keepdim=True) * exact.exp()
    torch.testing.assert_close(gradient[:4], expected.double(), rtol=tol.FLOAT32, atol=tol.FLOAT32)
    assert torch.isnan(logprob[4])  # an id outside the vocabulary
    assert not gradient[4].any()


@pytest.mark.parametrize("level", [-300.0, 0.0, 300.0])
def test_rows_of_masked_or_missing_components_have_finite_gradients(level):
    """Their components do not tell how high the other logits are, whose exponentials must not all vanish."""
    logits, bias = torch.randn(3, 132) + level, torch.zeros(132)
    bias[[3, 5]] = -torch.inf
    logprob, gradient = scored(logits, torch.tensor([[3, -100], [500, -100], [3, 5]]), bias)
    assert logprob[[0, 2]].tolist() == [-torch.inf, -torch.inf]
    assert torch.isnan(logprob[1])
    probs = (logits + bias).double().softmax(-1)
    expected = torch.stack([-probs[0], torch.zeros(132), -2.0 * probs[2]])
    expected[0, 3], expected[2, [3, 5]] = 1.0, 1.0
    torch.testing.assert_close(gradient, expected.double(), rtol=0, atol=tol.FLOAT32)


def test_the_gradient_of_a_certain_token_keeps_its_bits():
    """Of 1 - p = 2e-7 a sum of rounded exponentials would leave nothing."""
    logits = torch.zeros(1, 132)
    logits[0, 7] = 20.25
    logprob, gradient = scored(logits, torch.tensor([[7, -100]]))
    exact = logits.double().log_softmax(-1)
    assert logprob.item() == pytest.approx(exact[0, 7].item(), abs=tol.ERROR_FLOOR[torch.float32])
    others = torch.arange(132) != 7
    torch.testing.assert_close(gradient[0, others], -exact.exp()[0, others], rtol=tol.FLOAT32, atol=0)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_bfloat16_errors_are_those_of_the_path_with_logits(softcap, make_trajectory, monkeypatch):
    from latent_kernels._triton import scaled_exp

    batch = make_batch(make_trajectory, vocab=1000, top_k=10, width=64, dtype=torch.bfloat16)
    options = dict(temperature=0.8, clip_low=1.0, clip_high=1e3, softcap=softcap)
    exact = run(fused_policy_loss, narrowed(batch, torch.float64), **options)
    actual = run(FUSED, batch, **options)
    monkeypatch.setattr(scaled_exp, "choose", lambda *_: None)
    usual = run(FUSED, batch, **options)
    assert actual.loss.item() == pytest.approx(exact.loss.item(), rel=tol.FLOAT32, abs=tol.FLOAT32)
    for name in ("hidden", "lm_head"):
        truth = getattr(exact, name)
        error, allowed = ((getattr(x, name).double() - truth).norm() for x in (actual, usual))
        assert error <= tol.ERROR_FACTOR * allowed + tol.ERROR_FLOOR[torch.bfloat16] * truth.norm()


def test_rows_fill_the_waves_of_the_second_product():
    assert chunks.fullest_waves(1438, 2048, 132) == 1024  # 128 tiles; 1,152 rows would be 144
    assert chunks.fullest_waves(1213, 3584, 132) == 1152  # 252 tiles in two waves
    assert chunks.fullest_waves(77, 3584, 132) == 77


def test_only_aligned_bfloat16_heads_on_a_gpu_go_this_way():
    from latent_kernels._triton import scaled_exp

    hidden, lm_head = torch.zeros(4, 64, dtype=torch.bfloat16), torch.zeros(8192, 64, dtype=torch.bfloat16)
    assert scaled_exp.fits(hidden, lm_head)
    assert scaled_exp.choose(hidden, lm_head) is None
    assert not scaled_exp.fits(hidden.half(), lm_head.half())
    assert not scaled_exp.fits(hidden.float(), lm_head)
    assert not scaled_exp.fits(hidden, lm_head[:8191])
    assert not scaled_exp.fits(hidden[:, :60], lm_head[:, :60])
    assert not scaled_exp.fits(hidden[:, 1:57], lm_head[:, 1:57])
