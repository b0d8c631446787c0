"""What all public operators share: which arguments have gradients, and how they run under torch.compile.

Arguments are differentiable or data. The gradient of data is nothing, whichever implementation runs.

Dynamo cannot trace an operator: noise is drawn in NumPy, an eager step asks how many rows are decided, and kernels are
chosen by device. So, while a graph is traced, a call becomes one node of it, `latent_kernels::call`, and running the
node runs the operator. The node's lists hold the tensors and the numbers among the arguments, and a string holds the
rest. The backward pass is a second node. It runs the operator again, with gradients, and differentiates it. So a
compiled call saves its inputs alone, and its backward pass costs the forward pass once more.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from latent_kernels._types import LatentStepOptions

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# Dynamo makes an int symbolic if it changes from call to call. In a string it would be a constant, and each seed would
# compile a graph of its own.
TENSOR, INT, FLOAT = "<tensor>", "<int>", "<float>"
STEP_OPTIONS = tuple(field.name for field in fields(LatentStepOptions))


class Operator(NamedTuple):
    """A public operator, and what a graph must know of it."""

    function: Callable[..., Any]
    names: tuple[str, ...]  # of its arguments
    differentiable: tuple[str, ...]  # names of arguments
    shapes: Callable[..., list[Tensor]]  # the tensors of its result, of any values, from its arguments by name
    result: Callable[[list[Tensor]], Any]  # its result from these tensors


_operators: dict[str, Operator] = {}


def operator(
    *, differentiable: tuple[str, ...], shapes: Callable[..., list[Tensor]], result: Callable[[list[Tensor]], Any]
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Make a function a public operator, with the fields of `Operator`.

    It returns a tensor, or a tuple of tensors and tuples. The first of its tensors is the one with a gradient.
    """

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        name, names = function.__name__, tuple(inspect.signature(function).parameters)
        _operators[name] = Operator(function, names, differentiable, shapes, result)

        @functools.wraps(function)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            if torch.compiler.is_compiling():
                return _traced(name, dict(zip(names, args, strict=False)) | kwargs)
            if not torch.is_grad_enabled():  # nothing has a gradient, and a decoding step need not look for one
                return function(*args, **kwargs)
            # An argument too many has no name. It is passed on, so that the function complains of it.
            positional = list(zip(itertools.chain(names, itertools.repeat("")), args, strict=False))
            given = [*positional, *kwargs.items()]
            has_graph = any(n in differentiable and _has_gradient(x) for n, x in given)
            ready: list[Any] = [_ready(x, n in differentiable, has_graph) for n, x in given]
            return function(*ready[: len(args)], **dict(zip(kwargs, ready[len(args) :], strict=True)))

        return call

    return decorate


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make the backward pass of an autograd function one whose gradients raise when they are differentiated.

    PyTorch's decorator of this name does so only if the upstream gradient has a graph. That of a plain sum has none, so
    a penalty on the gradient would be a constant without a word.
    """
    decorated = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def call(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():  # with create_graph=True
            grads = tuple(grad.detach().requires_grad_() if isinstance(grad, Tensor) else grad for grad in grads)
        return decorated(ctx, *grads)

    return call


def _has_gradient(value: Any) -> bool:
    """Tell whether an argument is a tensor that requires a gradient."""
    return isinstance(value, Tensor) and value.requires_grad


def _ready(value: Any, differentiable: bool, has_graph: bool) -> Any:
    """Return an argument: a tensor that stands for data is cut from its graph, and can be saved in the call's graph."""
    if not isinstance(value, Tensor):
        return value
    if value.requires_grad and not differentiable:
        value = value.detach()
    return value.clone() if has_graph and value.is_inference() else value


def _traced(name: str, arguments: dict[str, Any]) -> Any:
    """Add the call of an operator to the graph that is being traced."""
    options = arguments.pop("options", None)
    if options is not None:
        arguments |= {field: getattr(options, field) for field in STEP_OPTIONS}
    tensors: list[Tensor] = []
    ints: list[int] = []
    floats: list[float] = []
    text, wanted = [], []
    for key, value in arguments.items():
        constant: Any = value
        if isinstance(value, Tensor):
            constant = TENSOR
            differentiable = key in _operators[name].differentiable
            tensors.append(value if differentiable else value.detach())
            wanted.append(differentiable and value.requires_grad)
        elif isinstance(value, float):
            constant = FLOAT
            floats.append(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            constant = INT
            ints.append(value)
        elif value is not None and not isinstance(value, bool | str | tuple):
            raise TypeError(f"{key} of {name} must not be {type(value).__name__} under torch.compile")
        text.append(f"{key!r}: {constant!r}")
    outputs = torch.ops.latent_kernels.call(name, wanted, tensors, ints, floats, "{" + ", ".join(text) + "}")
    return _operators[name].result([outputs[0], *(output.detach() for output in outputs[1:])])


def _arguments(tensors: Sequence[Any], ints: Sequence[int], floats: Sequence[float], text: str) -> dict[str, Any]:
    """Return the arguments of a node by name."""
    sources = {TENSOR: iter(tensors), INT: iter(ints), FLOAT: iter(floats)}
    constants: dict[str, Any] = ast.literal_eval(text)
    return {name: next(sources[value]) if value in sources else value for name, value in constants.items()}


def single(outputs: list[Tensor]) -> Tensor:
    """Return the result of an operator that has one tensor."""
    return outputs[0]


def _leaves(result: Any) -> list[Tensor]:
    """Return the tensors of a result, in their order."""
    return [result] if isinstance(result, Tensor) else [leaf for part in result for leaf in _leaves(part)]


# "nondeterministic_seeded", because an operator without a seed draws one: two such calls must not become one.
@torch.library.custom_op("latent_kernels::call", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _call(
    name: str, wanted: list[bool], tensors: list[Tensor], ints: list[int], floats: list[float], text: str
) -> list[Tensor]:
    """Run an operator. `wanted` are the tensors whose gradients are."""
    # Neither an input nor another output may share the memory of an output, and each must be laid out as its fake.
    outputs, used = [], {tensor.untyped_storage().data_ptr() for tensor in tensors}
    with torch.no_grad():
        result = _operators[name].function(**_arguments(tensors, ints, floats, text))
    for output in _leaves(result):
        output = output.contiguous()
        outputs.append(output.clone() if output.untyped_storage().data_ptr() in used else output)
        used.add(output.untyped_storage().data_ptr())
    return outputs


@_call.register_fake
def _(
    name: str, wanted: list[bool], tensors: list[Tensor], ints: list[int], floats: list[float], text: str
) -> list[Tensor]:
    return _operators[name].shapes(**_arguments(tensors, ints, floats, text))


@torch.library.custom_op("latent_kernels::call_backward", mutates_args=())
def _call_backward(
    name: str, grad: Tensor, wanted: list[bool], tensors: list[Tensor], ints: list[int], floats: list[float], text: str
) -> list[Tensor]:
    """Return the gradients of the wanted tensors, given that of an operator's first output."""
    # Inside a custom operator, gradients are off in a way that only leaving the inference mode undoes.
    with torch.inference_mode(False):
        inputs = [tensor.detach().requires_grad_(wants) for tensor, wants in zip(tensors, wanted, strict=True)]
        arguments = _arguments(inputs, ints, floats, text)
        if "seed" in _operators[name].names and arguments.get("seed") is None and arguments.get("exponential") is None:
            arguments["seed"] = 0  # no gradient depends on the noise, and another seed is not to be drawn
        output = _leaves(_operators[name].function(**arguments))[0]
        leaves = [tensor for tensor in inputs if tensor.requires_grad]
        gradients = torch.autograd.grad(output, leaves, grad, allow_unused=True, materialize_grads=True)
    return [gradient.clone(memory_format=torch.contiguous_format) for gradient in gradients]


@_call_backward.register_fake
def _(
    name: str, grad: Tensor, wanted: list[bool], tensors: list[Tensor], ints: list[int], floats: list[float], text: str
) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor, wants in zip(tensors, wanted, strict=True) if wants]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    """Keep the inputs of a node for its backward pass."""
    ctx.name, ctx.wanted, tensors, *ctx.constants = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    """Return the gradients of a node's inputs."""
    gradients = iter(
        torch.ops.latent_kernels.call_backward(ctx.name, grads[0], ctx.wanted, list(ctx.saved_tensors), *ctx.constants)
    )
    inputs = [next(gradients) if wants else None for wants in ctx.wanted]
    # PyTorch takes an empty list for one of tensors, and so expects a list of their gradients.
    return None, None, inputs, *(None if constant else [] for constant in ctx.constants)


_call.register_autograd(_backward, setup_context=_save)
