"""What holds for every operator: which arguments have gradients, what may be given to it, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.calls import NAMES, calls, leaves
from support.kernels import NEEDS_TRITON, SLOW_IF_INTERPRETED, kernel
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import latent_kernels as kernels

WITHOUT_KERNEL = ("philox_uniform",)


def each(names: Iterable[str]) -> list[Any]:
    """Return parameters: names of operators with their implementations."""
    pairs = [pytest.param(name, "eager") for name in names]
    for name in names:
        # The interpreter takes seconds for the sort of a latent step.
        marks = [NEEDS_TRITON, *(SLOW_IF_INTERPRETED if name.startswith("latent_step") else [])]
        if name not in WITHOUT_KERNEL:
            pairs.append(pytest.param(name, "triton", marks=marks))
    return pairs


DIFFERENTIABLE = [name for name in NAMES if calls()[name].differentiable]


def run(name: str, impl: str, arguments: dict[str, Any]) -> list[Tensor]:
    """Call an operator and return the tensors of its result."""
    operator = calls()[name].operator
    if impl == "eager":
        return leaves(operator(**arguments) if name in WITHOUT_KERNEL else operator(**arguments, impl="eager"))
    return leaves(kernel(operator)(**arguments))


def arguments_of(name: str) -> dict[str, Any]:
    """Return new arguments of an operator."""
    return calls()[name].arguments


def test_every_operator_has_a_call():
    operators = {name for name in kernels.__all__ if callable(getattr(kernels, name)) and name == name.lower()}
    assert set(NAMES) == operators - {"chunk_bytes", "kernels_for"}


@pytest.mark.parametrize(("name", "impl"), each(NAMES))
def test_only_differentiable_arguments_have_gradients(name: str, impl: str):
    arguments, differentiable = arguments_of(name), calls()[name].differentiable
    floats = [key for key, x in arguments.items() if isinstance(x, Tensor) and x.is_floating_point()]
    for key in floats:
        arguments[key].requires_grad_()
    first = run(name, impl, arguments)[0]
    assert first.requires_grad == bool(differentiable)
    if differentiable:
        first.sum().backward()
    assert {key for key in floats if arguments[key].grad is not None} == set(differentiable) & set(floats)


@pytest.mark.parametrize(("name", "impl"), each([name for name in NAMES if name not in DIFFERENTIABLE]))
def test_data_alone_makes_no_graph(name: str, impl: str):
    arguments = arguments_of(name)
    for x in arguments.values():
        if isinstance(x, Tensor) and x.is_floating_point():
            x.requires_grad_()
    assert not any(x.requires_grad for x in run(name, impl, arguments))


def assert_same(results: list[Tensor], expected: list[Tensor]) -> None:
    """Compare the tensors of two results bit for bit."""
    for one, other in zip(results, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("name", "impl"), each(NAMES))
def test_without_gradients_the_values_are_the_same(name: str, impl: str, context: Callable[[], Any]):
    expected = run(name, impl, arguments_of(name))
    arguments = arguments_of(name)
    for key in calls()[name].differentiable:
        arguments[key].requires_grad_()
    with context():
        results = run(name, impl, arguments)
        made_inside = run(name, impl, arguments_of(name))
    assert_same(results, expected)
    assert_same(made_inside, expected)
    assert not any(x.requires_grad for x in results)


@pytest.mark.parametrize(("name", "impl"), each(NAMES))
def test_inference_tensors_are_inputs_like_others(name: str, impl: str):
    with torch.inference_mode():
        arguments = arguments_of(name)
    assert_same(run(name, impl, arguments), run(name, impl, arguments_of(name)))
    for wanted in calls()[name].differentiable:
        gradients = []
        for source in (arguments, arguments_of(name)):
            leaf = source[wanted].detach().clone().requires_grad_()
            run(name, impl, source | {wanted: leaf})[0].sum().backward()
            gradients.append(leaf.grad)
        assert torch.equal(*gradients)


@pytest.fixture(scope="module")
def shard() -> Iterator[Callable[[Tensor], Tensor]]:
    """Return a function that makes a tensor a DTensor of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    yield lambda x: distribute_tensor(x, mesh, [Shard(0)])
    dist.destroy_process_group()


@pytest.mark.parametrize("name", NAMES)
def test_a_sharded_tensor_is_refused_by_name(name: str, shard: Callable[[Tensor], Tensor]):
    call = calls()[name]
    for key, value in call.arguments.items():
        if isinstance(value, Tensor):
            with pytest.raises(TypeError, match=rf"^{key} must be an ordinary tensor, got a DTensor; give {key}\.full"):
                call.operator(**call.arguments | {key: shard(value)})


FINITE = dict(temperature=1.0, kl_coef=0.0, entropy_coef=0.0, noise_scale=1.0, noise_delta=0.0, logit_scale=1.0)
SCALARS = {
    "latent_step": ("top_p", "tau", "noise_scale", "noise_delta", "logit_scale", "softcap"),
    "latent_step_from_logits": ("top_p", "tau", "noise_scale", "noise_delta"),
    "latent_step_with_logits": ("top_p", "tau", "noise_scale", "noise_delta", "logit_scale", "softcap"),
    "decoding_step": (
        "top_p",
        "tau",
        "noise_scale",
        "logit_scale",
        "softcap",
        "temperature",
        "text_top_p",
    ),
    "mix_embeddings": ("tau",),
    "latent_logprob": ("temperature", "logit_scale", "softcap"),
    "latent_logprob_from_logits": ("temperature",),
    "policy_loss": ("clip_low", "clip_high", "dual_clip", "kl_coef"),
    "fused_policy_loss": (
        *("temperature", "clip_low", "clip_high", "dual_clip", "kl_coef", "entropy_coef", "logit_scale", "softcap"),
    ),
    "project_with_noise": ("noise_scale", "noise_delta"),
}
MAY_BE_INFINITE = ("tau", "clip_high", "dual_clip")


@pytest.mark.parametrize(("name", "scalar"), [(name, scalar) for name in SCALARS for scalar in SCALARS[name]])
def test_scalars_are_checked_by_name(name: str, scalar: str):
    call = calls()[name]
    bad = [float("nan"), -1.0, -float("inf")] + ([] if scalar in MAY_BE_INFINITE else [float("inf")])
    for value in bad:
        with pytest.raises(ValueError, match=rf"^{scalar} must be in .* got {value}"):
            call.operator(**call.arguments | {scalar: value})
    for value in (True, "1", 1j, [1.0]):
        with pytest.raises(TypeError, match=rf"^{scalar} must be a number, got {type(value).__name__}"):
            call.operator(**call.arguments | {scalar: value})


INTEGERS = {
    "latent_step": ("top_k", "seed", "step", "end_token_id", "min_latent_steps", "max_latent_steps"),
    "project_with_noise": ("seed", "step"),
    "philox_uniform": ("seed", "step"),
}


@pytest.mark.parametrize(("name", "number"), [(name, number) for name in INTEGERS for number in INTEGERS[name]])
def test_integers_are_checked_by_name(name: str, number: str):
    call = calls()[name]
    arguments = {key: value for key, value in call.arguments.items() if key != "exponential"}
    for value in (True, 1.0, "1"):
        with pytest.raises(TypeError, match=rf"^{number} must be an int"):
            call.operator(**arguments | {number: value})
    with pytest.raises(ValueError, match=rf"^{number} must be"):
        call.operator(**arguments | {number: 2**63 if number in ("seed", "step") else -1})


@pytest.mark.parametrize(("name", "flag"), [("group_advantages", "normalize_std"), ("latent_logprob", "components")])
def test_flags_are_checked_by_name(name: str, flag: str):
    call = calls()[name]
    with pytest.raises(TypeError, match=f"^{flag} must be True or False, got 1"):
        call.operator(**call.arguments | {flag: 1})


@contextmanager
def suppress_inplace_error() -> Iterator[None]:
    """Let autograd refuse to use a tensor that has changed."""
    try:
        yield
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise


CHANGES = [
    (name, wanted, key)
    for name, keys in {
        "latent_logprob": ("ids", "scores", "advantages", "hidden", "lm_head"),
        "latent_logprob_from_logits": ("ids", "scores", "advantages"),
        "mix_embeddings": ("ids", "embedding"),
        "project_with_noise": ("hidden",),
    }.items()
    for wanted in calls()[name].differentiable
    for key in keys
    if key != wanted
]


@pytest.mark.parametrize("impl", ["eager", pytest.param("triton", marks=NEEDS_TRITON)])
@pytest.mark.parametrize(("name", "wanted", "key"), CHANGES)
def test_a_change_before_the_backward_pass_raises_or_changes_nothing(name: str, wanted: str, key: str, impl: str):
    gradients = []
    for changes in (False, True):
        arguments = arguments_of(name)
        leaf = arguments[wanted].requires_grad_()
        out = run(name, impl, arguments)[0].square().sum()
        if changes:
            arguments[key].fill_(1)
        if changes:
            with suppress_inplace_error():
                out.backward()
        else:
            out.backward()
        gradients.append(leaf.grad)
    assert gradients[1] is None or torch.equal(*gradients)


@pytest.mark.parametrize(("name", "impl"), each(DIFFERENTIABLE))
def test_backward_may_run_twice(name: str, impl: str):
    arguments = arguments_of(name)
    leaves_ = [arguments[key].requires_grad_() for key in calls()[name].differentiable]
    out = run(name, impl, arguments)[0].sum()
    first, second = (torch.autograd.grad(out, leaves_, retain_graph=True) for _ in range(2))
    assert_same(list(first), list(second))
