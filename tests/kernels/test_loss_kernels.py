"""What only the kernels of the loss have: gradients written over the logits by many threads, memory, host waits."""

from __future__ import annotations

import pytest
import torch
from support import oracle
from support import tolerances as tol
from support.kernels import DEVICE, NEEDS_TRITON
from torch import Tensor

from latent_kernels import fused_policy_loss, group_advantages, latent_logprob, policy_loss
from latent_kernels._chunks import chunk_buffer
from latent_kernels._loss_types import LogprobSpec

NEEDS_GPU = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
pytestmark = NEEDS_TRITON


def make_logits(rows: int, vocab: int, storage: int) -> Tensor:
    """Return float32 logits [rows, V], the same at each call, in a padded buffer with NaN in the padding."""
    buffer = chunk_buffer([slice(0, rows)], vocab, torch.float32, torch.device(DEVICE))
    buffer.as_strided((rows, storage), (storage, 1)).fill_(torch.nan)
    generator = torch.Generator().manual_seed(0)
    return buffer.copy_(2.0 * torch.randn(rows, vocab, generator=generator))


def make_spec(rows: int, vocab: int, top_k: int = 5) -> LogprobSpec:
    """Return rows of text, of repeated and of distinct components, on the device of the kernels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(vocab, generator=generator)[:top_k] for _ in range(rows)])
    ids[::3, 1:] = oracle.UNUSED
    ids[1::3, 1] = ids[1::3, 0]
    scores, advantages = torch.randn(rows, top_k, generator=generator) - 4.0, torch.randn(rows, generator=generator)
    return LogprobSpec(ids.to(DEVICE), scores.to(DEVICE), advantages.to(DEVICE), 0.7, "aligned")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [100, 8192, 8193, 16_400, 20_011])
def test_a_narrow_gradient_over_the_logits_is_the_rounded_wide_one(vocab, dtype):
    """The narrow gradient lies in the second half of the logits' bytes, so it must not overwrite logits too early."""
    from latent_kernels._triton.latent_logprob import logprob_rows_

    rows = 3 if DEVICE == "cpu" else 700
    storage = -(-vocab // 16) * 16
    spec = make_spec(rows, vocab)
    wide = logprob_rows_(make_logits(rows, vocab, storage), spec, torch.float32)
    narrow = logprob_rows_(make_logits(rows, vocab, storage), spec, dtype)
    assert torch.equal(narrow.logprob, wide.logprob)
    assert narrow.gradient.dlogits.dtype == dtype
    assert wide.gradient.scale is None
    exact, actual = wide.gradient.dlogits, narrow.gradient.dlogits.float()
    least = torch.finfo(dtype).tiny
    if dtype == torch.float16:
        scale = narrow.gradient.scale.unsqueeze(-1)
        assert torch.equal(scale.log2(), scale.log2().round())
        actual, least = actual * scale, least * scale
    # Triton's interpreter truncates to bfloat16 where a GPU rounds.
    assert ((actual - exact).abs() <= torch.finfo(dtype).eps * torch.maximum(exact.abs(), torch.as_tensor(least))).all()
    sums = exact.double().sum(-1)
    torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=tol.FLOAT32)  # softmax and targets balance


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_gradient_beyond_the_range_of_its_dtype_stays_finite(dtype):
    """A component is e^16 times too likely. Its gradient leaves the range of float16; the upstream gradient is 0."""
    hidden, head = (torch.randn(shape, device=DEVICE).to(dtype) for shape in ((1, 4, 32), (200, 32)))
    head = head / 6
    ids = torch.randint(200, (1, 4, 3), device=DEVICE)
    log_probs = (hidden.float() @ head.float().T).log_softmax(-1).gather(-1, ids)
    scores = log_probs + 1.0
    scores[0, 0, 0] -= 17.0
    old, ones = torch.full((1, 4), -1.4, device=DEVICE), torch.ones(1, 4, device=DEVICE)
    gradients = {}
    for impl in ("eager", "triton"):
        leaf = hidden.clone().requires_grad_()
        loss, _ = fused_policy_loss(leaf, head, ids, scores, old, ones, ones.bool(), impl=impl)
        loss.backward()
        gradients[impl] = leaf.grad.float()
    assert gradients["eager"][0, 0].abs().max() == 0
    assert gradients["eager"].abs().max() > 0
    torch.testing.assert_close(gradients["triton"], gradients["eager"], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [100, 8193, 20_011])
def test_entropies_and_their_gradient_over_the_logits_equal_the_oracle(vocab, dtype):
    """Rows of text and latent steps at a temperature, over several tiles, with logits of -inf."""
    from latent_kernels._triton.latent_logprob import backward_rows_, forward_rows

    rows, storage = 6, -(-vocab // 16) * 16
    spec = make_spec(rows, vocab)
    logits = make_logits(rows, vocab, storage)
    unreachable = torch.arange(vocab, device=DEVICE) % 7 == 3
    unreachable[spec.ids.clamp_min(0).flatten()] = False
    logits[:, unreachable] = -torch.inf
    upstream, bonus = torch.randn(2, rows, device=DEVICE)
    ids, scores, advantages = (x.cpu() for x in spec[:3])
    text = torch.tensor([oracle.is_text(row) for row in ids], device=DEVICE)
    bonus = torch.where(text, bonus, 0.0)
    logprob = oracle.logprob(logits.cpu(), ids, scores, temperature=0.7, advantages=advantages)
    entropy = oracle.entropy(logits.cpu(), ids, 0.7)
    weights = (x.double().cpu().unsqueeze(-1) for x in (upstream, bonus))
    expected = sum(weight * rows.gradient for weight, rows in zip(weights, (logprob, entropy), strict=True))

    actual = forward_rows(logits, spec, entropy=True)
    close = dict(rtol=tol.FLOAT32, atol=tol.FLOAT32)
    torch.testing.assert_close(actual.logprob.double().cpu(), logprob.value, **close)
    torch.testing.assert_close(actual.entropy.double().cpu(), entropy.value, **close)
    dlogits, scale = backward_rows_(logits, spec, actual, dtype, upstream, bonus)
    assert dlogits.dtype == dtype
    if scale is not None:
        dlogits = dlogits * scale.unsqueeze(-1)
    spacing = torch.finfo(dtype).eps * expected.abs() + tol.FLOAT32
    assert ((dlogits.double().cpu() - expected).abs() <= spacing).all()
    assert not dlogits[:, unreachable].any()


def make_batch(responses: int, steps: int, vocab: int, width: int, device: str) -> dict[str, Tensor]:
    """Return bfloat16 states and head with latent and text steps, a tenth masked and a tenth without an advantage."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    ids = torch.randint(vocab, (responses, steps, 10), generator=generator, device=device)
    ids[:, steps // 2 :, 1:] = oracle.UNUSED
    advantages = normal(responses, steps)
    advantages[::10] = 0.0
    return dict(
        hidden=normal(responses, steps, width).bfloat16(),
        lm_head=(normal(vocab, width) / width**0.5).bfloat16(),
        ids=ids,
        scores=normal(responses, steps, 10) - 9.0,
        old_logprob=normal(responses, steps) - 12.0,
        advantages=advantages,
        mask=torch.rand(responses, steps, generator=generator, device=device) < 0.9,
    )


def gradients(batch: dict[str, Tensor], names: tuple[str, ...], impl: str) -> list[Tensor]:
    """Return the loss and its gradients in the named tensors."""
    leaves = [batch[name].detach().requires_grad_() for name in names]
    loss, _ = fused_policy_loss(**{**batch, **dict(zip(names, leaves, strict=True))}, impl=impl)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@NEEDS_GPU
def test_the_compiled_loss_is_deterministic_and_equals_eager():
    batch = make_batch(8, 256, 50_257, 512, "cuda")
    names = ("hidden", "lm_head")
    first, second, eager = (gradients(batch, names, impl) for impl in ("triton", "triton", "eager"))
    for a, b, expected in zip(first, second, eager, strict=True):
        assert torch.equal(a, b)
        error = torch.linalg.vector_norm((a - expected).double())
        assert error <= tol.ERROR_FLOOR[torch.bfloat16] * torch.linalg.vector_norm(expected.double())


@NEEDS_GPU
def test_memory_does_not_grow_with_rows_times_vocabulary():
    from latent_kernels._triton import scaled_exp

    batch = make_batch(64, 128, 128_256, 2048, "cuda")
    limit = 600e6 if scaled_exp.choose(batch["hidden"].flatten(0, 1), batch["lm_head"]) is None else 400e6
    gradients(batch, ("hidden",), "triton")  # compiles, and allocates the workspace of the product library
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = gradients(batch, ("hidden",), "triton")
    extra = torch.cuda.max_memory_allocated() - before - results[1].nbytes
    assert extra < limit, f"{extra / 1e6:.0f} MB beyond inputs and dHidden"


@NEEDS_GPU
def test_only_the_number_of_active_steps_waits_for_the_device():
    batch = make_batch(4, 64, 4096, 128, "cuda")
    rest = {name: batch[name] for name in ("old_logprob", "advantages", "mask")}
    rewards, groups = torch.rand(16, device="cuda"), torch.arange(16, device="cuda") // 4

    def everything() -> None:
        hidden = batch["hidden"].flatten(0, 1).detach().requires_grad_()
        logprob = latent_logprob(
            hidden, batch["lm_head"], batch["ids"].flatten(0, 1), batch["scores"].flatten(0, 1), impl="triton"
        )
        policy_loss(logprob.view(4, 64), **rest, impl="triton")[0].backward()
        group_advantages(rewards, groups, mean_logprob=rewards, impl="triton")

    everything()  # compiles
    gradients(batch, ("hidden", "lm_head"), "triton")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing") as seen:
            gradients(batch, ("hidden", "lm_head"), "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([warning for warning in seen if "synchronizing" in str(warning.message)]) == 1
