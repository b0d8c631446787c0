"""What only the kernel of the latent step has: routes of the LM head, segments as shipped, CUDA graphs."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from support import oracle
from support import tolerances as tol
from support.kernels import DEVICE, SLOW_IF_INTERPRETED, kernel, moved
from support.latent_steps import assert_same_step
from torch import Tensor

from latent_kernels import latent_step, latent_step_from_logits

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from latent_kernels._triton import lm_head
from latent_kernels._triton import lm_head_routes as routes

triton_step, triton_step_from_logits = kernel(latent_step), kernel(latent_step_from_logits)
NEEDS_GPU = pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
SMALL_SEGMENTS = pytest.mark.usefixtures("small_segments")
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def make_head(rows: int, width: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return hidden [rows, D] and lm_head [vocab, D] in quarters, whose products are exact in every dtype and order."""
    return tuple((torch.randint(-8, 9, (n, width)) / 4).to(dtype) for n in (rows, vocab))


def assert_sidecar(sidecar: lm_head.Sidecar, logits: Tensor, *, rtol: float) -> None:
    """Logits are the expected [B, V]; maxima and sums of exponentials of the groups are those of the logits."""
    rows, vocab = logits.shape
    groups = -(-vocab // lm_head.GROUP)
    actual = sidecar.logits[:, :vocab].float()
    torch.testing.assert_close(actual, logits.float(), rtol=rtol, atol=rtol)
    assert sidecar.maxima.shape == sidecar.sums.shape == (rows, groups)
    padded = torch.nn.functional.pad(actual, (0, groups * lm_head.GROUP - vocab), value=-torch.inf)
    padded = padded.view(rows, groups, lm_head.GROUP)
    assert torch.equal(sidecar.maxima, padded.amax(-1))
    base = sidecar.maxima.unsqueeze(-1).nan_to_num(neginf=0.0)
    torch.testing.assert_close(sidecar.sums, (padded - base).exp().sum(-1), rtol=tol.FLOAT32, atol=0)


@pytest.mark.parametrize("config", routes.PRODUCTS, ids=lambda c: f"{c.block_b}x{c.block_d}")
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (5, 128), (33, 300), (130, 129)], ids=str)
@HALF
def test_product_has_exact_logits_and_sidecar(config, rows, vocab, dtype):
    hidden, head = make_head(rows, 192, vocab, dtype)
    actual = kernel_of(lm_head.lm_head_sidecar)(hidden, head, config)
    assert_sidecar(actual, hidden.double() @ head.double().T, rtol=0.0)


@HALF
def test_product_is_accumulated_in_float32(dtype):
    hidden, head = torch.randn(7, 512).to(dtype), torch.randn(200, 512).to(dtype)
    actual = kernel_of(lm_head.lm_head_sidecar)(hidden, head, routes.PRODUCTS[0])
    assert_sidecar(actual, hidden.double() @ head.double().T, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "vocab"), [(0, 40), (1, 1), (3, 2048), (2, 4099)], ids=str)
def test_sidecar_of_logits_that_exist_already(rows, vocab, dtype):
    logits = (3.0 * torch.randn(rows, vocab)).to(dtype)
    logits[:, vocab // 3 :: 2] = -torch.inf
    logits[1:2] = -torch.inf
    assert_sidecar(kernel_of(lm_head.logits_sidecar)(logits), logits, rtol=0.0)


def kernel_of(function: Any) -> Any:
    """Return a launcher that runs where kernels run, on poisoned allocations, with its results on the CPU."""
    return kernel(lambda *arguments, impl: function(*arguments))


@SMALL_SEGMENTS
def test_rows_of_the_head_are_addressed_beyond_2_to_the_31():
    rows, width, stride = 129, 64, 2**24 + 16  # the last row starts at element 2^31 + 2,048
    storage = torch.empty(rows * stride, dtype=torch.bfloat16)  # of which only the rows' pages are ever touched
    far = storage.as_strided((rows, width), (stride, 1))
    hidden, head = make_head(3, width, rows, torch.bfloat16)
    far.copy_(head)
    if DEVICE == "cuda":
        storage, far = storage.cuda(), storage.cuda().as_strided((rows, width), (stride, 1))
    actual = lm_head.lm_head_sidecar(hidden.to(DEVICE), far, routes.PRODUCTS[0])
    assert_sidecar(moved(actual, "cpu"), hidden.double() @ head.double().T, rtol=0.0)
    step = triton_step(hidden, far, far, seed=1)
    expected = oracle.latent_step((hidden.double() @ head.double().T).float(), head, seed=1)
    assert torch.equal(step.ids, expected.ids)
    torch.testing.assert_close(step.embedding, expected.embedding, rtol=0, atol=2 * tol.EMBEDDING[torch.bfloat16])


@SMALL_SEGMENTS
@pytest.mark.parametrize(
    ("route", "tied"),
    [*((route, False) for route in (*routes.PRODUCTS, None)), (routes.PRODUCTS[0], True)],
    ids=lambda x: {None: "library", True: "tied", False: "untied"}.get(x) or str(x.block_b),
)
def test_every_route_gives_the_same_step(route, tied, monkeypatch):
    monkeypatch.setattr(routes, "choose", lambda hidden, head, run: route)
    hidden, head = make_head(3, 128, 333, torch.bfloat16)
    table = head if tied else torch.randn(333, 20).bfloat16()
    options = dict(seed=4, step=2, latent_mask=torch.tensor([True, False, True]), top_k=5)
    step = triton_step(hidden, head, table, **options)
    expected = oracle.latent_step((hidden.double() @ head.double().T).float(), table, **options)
    assert_same_step(step, expected)


@SMALL_SEGMENTS
@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 64), (torch.bfloat16, 50), (torch.float16, 1)], ids=str)
def test_shapes_that_our_product_refuses_go_through_the_library(dtype, width):
    hidden, head = make_head(2, width, 200, dtype)
    assert not routes.fits(hidden, head)
    step = triton_step(hidden, head, head, seed=4, top_k=3)
    expected = oracle.latent_step((hidden.double() @ head.double().T).float(), head, seed=4, top_k=3)
    assert torch.equal(step.ids, expected.ids)


# Triton's interpreter sorts a whole segment one element after the other.
@pytest.mark.parametrize("top_k", [pytest.param(top_k, marks=SLOW_IF_INTERPRETED) for top_k in (10, 32)])
@pytest.mark.parametrize("spread", [3.0, 1e-3], ids=["normal", "near-uniform"])
def test_segments_as_shipped_give_the_oracles_step(top_k, spread):
    logits, table = spread * torch.randn(1, 5000), torch.randn(5000, 8)
    step = triton_step_from_logits(logits, table, seed=1, top_k=top_k)
    expected = oracle.latent_step(logits, table, seed=1, top_k=top_k)
    assert torch.equal(step.ids, expected.ids)
    torch.testing.assert_close(step.scores, expected.scores, rtol=0, atol=tol.STEP_SCORES)


@SMALL_SEGMENTS
def test_segments_end_where_tied_tokens_with_low_ids_fill_the_buffer():
    """Better tokens, as those that a mask allows, are beyond the tied ones. The buffer must make room for them."""
    logits, table = torch.full((2, 150), -torch.inf), torch.randn(150, 4)
    logits[1] = -1.0
    logits[0, 149], logits[1, 100:103] = 2.0, 0.5
    step = triton_step_from_logits(logits, table, seed=1, top_p=1.0)
    assert_same_step(step, oracle.latent_step(logits, table, seed=1, top_p=1.0))


@SMALL_SEGMENTS
def test_rows_of_nan_still_give_ids_of_the_vocabulary():
    logits = torch.full((2, 300), torch.nan)
    logits[1, :5] = 0.0
    step = triton_step_from_logits(logits, torch.randn(300, 4), seed=1)
    assert ((step.ids >= 0) & (step.ids < 300)).all()
    assert ((step.top_token >= 0) & (step.top_token < 300)).all()


# Routes


def test_the_table_has_a_launchable_route_for_every_bucket():
    table = routes.table()
    assert tuple(table) == routes.BUCKETS
    for rows, route in table.items():
        assert route in routes.candidates(rows)
    assert [routes.bucket(rows) for rows in (1, 16, 17, 1024, 5000)] == [16, 16, 32, 1024, 1024]


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        (lambda h, w: (h, w), True),
        (lambda h, w: (h[:, 1:65], w[:, 1:65]), False),
        (lambda h, w: (h.float(), w.float()), False),
        (lambda h, w: (h, w.half()), False),
        (lambda h, w: (h[:0], w), False),
        (lambda h, w: (h[:, :100], w[:, :100]), False),
        (lambda h, w: (h, w.T.contiguous().T), False),
    ],
    ids=["aligned", "shifted", "float32", "mixed", "empty", "width", "transposed"],
)
def test_our_product_takes_only_what_it_can_address(change, fits):
    hidden, head = make_head(4, 128, 64, torch.bfloat16)
    hidden, head = change(hidden, head)
    assert routes.fits(hidden, head) == fits
    assert fits or routes.choose(hidden, head, lambda route: None) is None


def test_tuning_tries_each_route_once_and_remembers_the_fastest(monkeypatch):
    times = {route: float(i) for i, route in enumerate(reversed(routes.candidates(64)))}
    runs: list[routes.Route] = []
    monkeypatch.setattr(routes.triton.testing, "do_bench", lambda call, return_mode: times[call()])
    monkeypatch.setattr(routes.torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(routes, "_tuned_routes", {})
    hidden, head = make_head(50, 64, 100, torch.bfloat16)

    def run(route: routes.Route) -> routes.Route:
        runs.append(route)
        return route

    for _ in range(2):
        assert routes._tuned(hidden, head, run) is None
    assert runs == routes.candidates(64), "each candidate is tried once, and remembered"
    monkeypatch.setattr(routes.torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="cannot tune 20 rows while a CUDA graph is captured"):
        routes._tuned(hidden[:20], head, run)


# On a GPU


@NEEDS_GPU
@pytest.mark.parametrize("rows", [1, 8, 33, 300, 1024])
def test_a_step_synchronises_nowhere_and_replays_in_a_cuda_graph(rows):
    hidden, head = torch.randn(rows, 256).bfloat16().cuda(), torch.randn(5000, 256).bfloat16().cuda()
    step, seed = torch.zeros((), dtype=torch.int64, device="cuda"), torch.tensor(5, device="cuda")
    mask = torch.rand(rows, device="cuda") < 0.7

    def run() -> Any:
        return latent_step(hidden, head, head, seed=seed, step=step, latent_mask=mask, end_token_id=3, impl="triton")

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        step += 1
        graph.replay()
        for actual, expected in zip(captured, run(), strict=True):
            assert torch.equal(actual, expected)
