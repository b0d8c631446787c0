"""The projection with one-sided noise for hidden-state latents."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import tolerances as tol
from support.kernels import DEVICE, NEEDS_TRITON, kernel, with_kernel
from support.oracle import exponential_draws
from support.oracle import project_with_noise as oracle_projection
from torch import Tensor

from latent_kernels import project_with_noise
from latent_kernels.reference.latent_step import project_with_noise_ref

triton_project = kernel(project_with_noise)
PUBLIC_AND_REFERENCE = with_kernel(project_with_noise, project_with_noise_ref)
PUBLIC_AND_TRITON = with_kernel(project_with_noise)


def make_inputs(rows: int = 5, width: int = 7, out: int = 33, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden [B, D], weight [D', D] and bias [D']."""
    return torch.randn(rows, width).to(dtype), torch.randn(out, width).to(dtype), torch.randn(out).to(dtype)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """The projections agree to float32."""
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tol.FLOAT32)


@PUBLIC_AND_REFERENCE
@pytest.mark.parametrize("noise", ["one_sided", "two_sided", "none"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, "per-row"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("rows", [5, 1, 0], ids=["5-rows", "one-row", "no-rows"])
def test_projection_equals_the_oracle(operator, noise, scale, with_bias, rows):
    hidden, weight, bias = make_inputs(rows)
    bias = bias if with_bias else None
    scale = torch.linspace(0.0, 2.0, rows) if scale == "per-row" else scale
    draws = torch.empty(rows, 33).exponential_()
    actual = operator(hidden, weight, bias, noise=noise, noise_scale=scale, exponential=draws)
    assert actual.dtype == torch.float32
    assert_close(actual, oracle_projection(hidden, weight, bias, draws, noise, scale))


@PUBLIC_AND_TRITON
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_low_precision_is_rounded_only_once(operator, dtype):
    if operator is triton_project and dtype == torch.float64:
        pytest.skip("the kernel computes in float32")
    hidden, weight, bias = make_inputs(width=300, dtype=dtype)
    draws = torch.empty(5, 33).exponential_()
    actual = operator(hidden, weight, bias, exponential=draws)
    exact = oracle_projection(hidden, weight, bias, draws, "one_sided", 1.0)
    # Half a unit in the last place, plus the error of float32 noise under float64 inputs. A GPU rounds to bfloat16, but
    # Triton's interpreter truncates, which costs a whole unit.
    truncates = operator is triton_project and dtype == torch.bfloat16 and DEVICE == "cpu"
    unit = torch.finfo(dtype).eps * (1.0 if truncates else 0.5)
    bound = 1.01 * unit * exact.abs() + (tol.FLOAT32 if dtype == torch.float64 else 1e-4)
    assert actual.dtype == dtype
    assert ((actual.double() - exact).abs() <= bound).all()


@PUBLIC_AND_TRITON
@pytest.mark.parametrize("as_tensor", [False, True], ids=["int-seed", "tensor-seed"])
def test_a_seed_gives_the_draws_of_the_oracles_philox(operator, as_tensor):
    hidden, weight, bias = make_inputs()
    rows = torch.tensor([4, -7, 1 << 50, 0, 12])
    draws = exponential_draws(33, rows.tolist(), 9, 2)
    seed, step = (torch.tensor(9), torch.tensor(2)) if as_tensor else (9, 2)
    seeded = operator(hidden, weight, bias, seed=seed, step=step, row_ids=rows)
    assert_close(seeded, operator(hidden, weight, bias, exponential=draws))
    assert_close(seeded, oracle_projection(hidden, weight, bias, draws, "one_sided", 1.0))
    assert not torch.equal(seeded, operator(hidden, weight, bias, seed=9, step=3, row_ids=rows))
    assert not torch.equal(seeded, operator(hidden, weight, bias, seed=10, step=2, row_ids=rows))


@NEEDS_TRITON
@pytest.mark.parametrize(("rows", "width", "out"), [(1, 1, 1), (33, 100, 65), (7, 33, 2051)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_kernel_covers_several_blocks(rows, width, out, dtype):
    inputs = make_inputs(rows, width, out, dtype)
    scale, draws = torch.linspace(0.5, 2.0, rows), exponential_draws(out, range(rows), -3, 2**31 - 1)
    actual = triton_project(*inputs, seed=-3, step=2**31 - 1, noise_scale=scale, noise="two_sided")
    expected = oracle_projection(*inputs, draws, "two_sided", scale)
    error = (actual.double() - expected).abs().max()
    assert error <= tol.EMBEDDING[dtype] * expected.abs().max()


def test_without_a_seed_torch_manual_seed_decides_the_noise():
    inputs = make_inputs()
    torch.manual_seed(1)
    first, second = (project_with_noise(*inputs) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(project_with_noise(*inputs), first)
    assert not torch.equal(first, second)


@given(rows=st.integers(1, 6), seed=st.integers(0, 2**62))
def test_the_noise_of_a_row_follows_its_row_id(rows, seed):
    hidden, weight, bias = make_inputs(rows)
    row_ids, order = torch.randint(-(2**60), 2**60, (rows,)), torch.randperm(rows)
    expected = project_with_noise(hidden, weight, bias, seed=seed, row_ids=row_ids)[order]
    actual = project_with_noise(hidden[order], weight, bias, seed=seed, row_ids=row_ids[order])
    torch.testing.assert_close(actual, expected, rtol=0, atol=tol.REORDERED)


def test_one_sided_noise_only_adds():
    hidden, weight, bias = make_inputs(rows=200)
    added = project_with_noise(hidden, weight, bias, seed=0) - project_with_noise(hidden, weight, bias, noise="none")
    assert added.min() >= -tol.FLOAT32
    assert added.max() <= 4.5 + tol.FLOAT32
    assert added.std() > 0.5


def test_the_gradient_is_that_of_the_value():
    inputs = [t.double().requires_grad_() for t in make_inputs(3, 4, 5)]
    assert torch.autograd.gradcheck(lambda h, w, b: project_with_noise(h, w, b, seed=3), inputs)


@PUBLIC_AND_TRITON
@pytest.mark.parametrize("required", [(), (0,), (1,), (2,), (0, 1, 2)], ids=["none", "hidden", "weight", "bias", "all"])
def test_gradients_are_those_of_the_product_without_noise(operator, required):
    inputs = make_inputs()
    for index in required:
        inputs[index].requires_grad_()
    out = operator(*inputs, seed=3, noise_scale=2.0)
    assert out.requires_grad == bool(required)
    if not required:
        return
    upstream = torch.randn_like(out)
    leaves = [inputs[index] for index in required]
    plain = torch.nn.functional.linear(*inputs)
    expected = torch.autograd.grad(plain, leaves, upstream)
    torch.testing.assert_close(torch.autograd.grad(out, leaves, upstream), expected)


@PUBLIC_AND_TRITON
def test_strides_of_the_inputs_and_autocast_do_not_matter(operator):
    hidden, weight, bias = make_inputs()
    expected = operator(hidden, weight, bias, seed=1)
    strided = operator(hidden.T.contiguous().T, weight.T.contiguous().T, bias, seed=1)
    torch.testing.assert_close(strided, expected, rtol=0, atol=tol.REORDERED)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(operator(hidden, weight, bias, seed=1), expected)


@NEEDS_TRITON
def test_the_kernel_gives_gradients_of_mixed_dtypes_but_no_second_derivative():
    hidden, weight, bias = (x.requires_grad_() for x in make_inputs())
    low = hidden.detach().bfloat16().requires_grad_()
    triton_project(low, weight, bias, seed=1).float().sum().backward()
    assert low.grad.dtype == torch.bfloat16
    torch.testing.assert_close(weight.grad, low.detach().float().sum(0).expand_as(weight), rtol=0, atol=tol.FLOAT32)
    (first,) = torch.autograd.grad(triton_project(hidden, weight, seed=1).square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


INVALID = {
    "hidden-shape": (dict(hidden=torch.zeros(8)), ValueError, r"hidden must have shape \[\*, \*\], got \[8\]"),
    "hidden-dtype": (dict(hidden=torch.zeros(4, 8, dtype=torch.int64)), TypeError, "hidden .* got torch.int64"),
    "weight-shape": (dict(weight=torch.zeros(6, 9)), ValueError, r"weight must have shape \[\*, 8\], got \[6, 9\]"),
    "weight-device": (dict(weight=torch.zeros(6, 8, device="meta")), ValueError, "weight is on meta"),
    "bias-shape": (dict(bias=torch.zeros(5)), ValueError, r"bias must have shape \[6\], got \[5\]"),
    "noise": (dict(noise="both"), ValueError, "noise must be one of .* got 'both'"),
    "scale": (dict(noise_scale=-2.0), ValueError, "noise_scale .* got -2.0"),
    "seed": (dict(seed="1"), TypeError, "seed must be an int .* got str"),
    "rows": (dict(row_ids=torch.zeros(4)), TypeError, "row_ids .* got torch.float32"),
    "draws": (dict(exponential=torch.ones(4, 5)), ValueError, r"exponential must have shape \[4, 6\], got \[4, 5\]"),
    "both": (dict(exponential=torch.ones(4, 6), seed=0), ValueError, "either seed or exponential"),
    "impl-bogus": (dict(impl="bogus"), ValueError, "impl must be one of .* got 'bogus'"),
    "impl-triton": (dict(impl="triton"), RuntimeError, "use impl='auto'"),
}


@pytest.mark.parametrize(("change", "error", "message"), INVALID.values(), ids=INVALID)
def test_an_error_names_the_wrong_argument(change, error, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = {"hidden": torch.zeros(4, 8), "weight": torch.zeros(6, 8), "bias": torch.zeros(6), **change}
    with pytest.raises(error, match=message):
        project_with_noise(**arguments)
