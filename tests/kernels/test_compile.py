"""Every operator under torch.compile(fullgraph=True) on a CPU gives the values and gradients of an uncompiled call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import latent_kernels as kernels

ROWS, VOCAB, WIDTH, COMPONENTS = 3, 50, 8, 4
# In a fused loop, Inductor adds up in another order and multiplies and adds without rounding in between.
FUSED = 1e-5


class Call(NamedTuple):
    """A call of an operator on a tensor x [ROWS, WIDTH], at a seed."""

    run: Callable[[Tensor, int | Tensor], Any]
    differentiable: bool


def table(width: int, seed: int) -> Tensor:
    """Return a random matrix [VOCAB, width]."""
    return torch.randn(VOCAB, width, generator=torch.Generator().manual_seed(seed))


HEAD, TABLE = table(WIDTH, 1), table(5, 2)
IDS = torch.tensor([[7, -100, -100, -100], [1, 2, 3, 4], [9, 9, 8, 0]])
SCORES = table(COMPONENTS, 3)[:ROWS]
OLD = table(WIDTH, 4)[:ROWS] - 3
ADVANTAGES = table(WIDTH, 5)[:ROWS]
GROUPS = torch.zeros(ROWS, dtype=torch.int64)
OPTIONS = dict(top_k=COMPONENTS, top_p=0.9, end_token_id=3, max_latent_steps=100)


def loss(x: Tensor) -> tuple[Tensor, kernels.PolicyStats]:
    """Return the loss of log-probs with every argument."""
    keep = ADVANTAGES > -1
    return kernels.policy_loss(
        x, OLD, ADVANTAGES, keep, dual_clip=None, ratio="sequence", ref_logprob=OLD, kl_coef=0.1, clip_high=0.3
    )


def fused(x: Tensor) -> tuple[Tensor, kernels.PolicyStats]:
    """Return the fused loss of one response."""
    data = IDS[None], SCORES[None], OLD[None, :, 0], ADVANTAGES[None, :, 0], torch.ones(1, ROWS)
    soft = dict(objective="sapo", sapo_temperatures=(1.2, 0.9), entropy_coef=0.01)
    return kernels.fused_policy_loss(x[None], x.tanh().repeat(10, 1), *data, temperature=0.7, **soft)


CALLS = {
    "latent_step": Call(lambda x, s: kernels.latent_step(x, HEAD, TABLE, seed=s, step=s, **OPTIONS), False),
    "latent_step_from_logits": Call(
        lambda x, s: kernels.latent_step_from_logits(x @ HEAD.T, TABLE, seed=s, tau=x[:, 0].exp(), top_k=2), False
    ),
    "latent_step_with_logits": Call(
        lambda x, s: kernels.latent_step_with_logits(
            x, HEAD, TABLE, kernels.LatentStepOptions(seed=s, method="soft_grpo", **OPTIONS)
        ),
        False,
    ),
    "decoding_step": Call(
        lambda x, s: kernels.decoding_step(
            x, HEAD, TABLE, kernels.LatentStepOptions(seed=s, latent_mask=x[:, 0] > 0, **OPTIONS), temperature=0.5
        ),
        False,
    ),
    "mix_embeddings": Call(lambda x, s: kernels.mix_embeddings(IDS, x[:, :COMPONENTS], x.repeat(20, 1), tau=0.7), True),
    "latent_logprob": Call(
        lambda x, s: kernels.latent_logprob(x, x.cos().repeat(5, 1), IDS, SCORES, advantages=OLD[:, 0]), True
    ),
    "latent_logprob_from_logits": Call(
        lambda x, s: kernels.latent_logprob_from_logits(x @ HEAD.T, IDS, SCORES, method="multiplex", components=True),
        True,
    ),
    "group_advantages": Call(lambda x, s: kernels.group_advantages(x[:, 0], GROUPS, mean_logprob=x[:, 1]), False),
    "policy_loss": Call(lambda x, s: loss(x), True),
    "fused_policy_loss": Call(lambda x, s: fused(x), True),
    "project_with_noise": Call(lambda x, s: kernels.project_with_noise(x, HEAD, x[0].repeat(7)[:VOCAB], seed=s), True),
    "philox_uniform": Call(lambda x, s: kernels.philox_uniform(torch.arange(ROWS), seed=s, step=s), False),
}


def leaves(result: Any) -> list[Tensor]:
    """Return the tensors of a result."""
    return [result] if isinstance(result, Tensor) else [leaf for part in result for leaf in leaves(part)]


def types(result: Any) -> Any:
    """Return the types of a result and of its parts."""
    return type(result) if isinstance(result, Tensor) else (type(result), [types(part) for part in result])


def compiled(function: Callable[..., Any], backend: str) -> tuple[Callable[..., Any], list[Any]]:
    """Return a function compiled as one graph, and the list that its graphs are added to."""
    torch._dynamo.reset()
    graphs: list[Any] = []

    def compile_graph(graph: Any, example_inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, example_inputs)

    return torch.compile(function, fullgraph=True, backend=compile_graph), graphs


def assert_equal_runs(call: Call, function: Callable[..., Any], seed: int | Tensor, tolerance: float) -> None:
    """Run both on the same inputs, and compare results, their types and gradients."""
    inputs = [torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(6)) for _ in range(2)]
    runs = zip((call.run, function), inputs, strict=True)
    results = [run(x.requires_grad_(call.differentiable), seed) for run, x in runs]
    expected, got = (leaves(result) for result in results)
    assert types(results[1]) == types(results[0])
    for one, other in zip(expected, got, strict=True):
        assert other.requires_grad == one.requires_grad
        torch.testing.assert_close(other, one, rtol=tolerance, atol=tolerance, equal_nan=True)
    if call.differentiable:
        for first in (expected[0], got[0]):
            first.square().sum().backward()
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=FUSED, atol=FUSED)


def test_every_operator_has_a_case():
    operators = {name for name in kernels.__all__ if callable(getattr(kernels, name)) and name == name.lower()}
    assert set(CALLS) == operators - {"chunk_bytes", "kernels_for"}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", CALLS)
def test_compiled_equals_eager(name: str, backend: str):
    function, _ = compiled(CALLS[name].run, backend)
    for seed in (3, 8):
        assert_equal_runs(CALLS[name], function, seed, tolerance=0.0)


@pytest.mark.slow  # Inductor builds C++
@pytest.mark.parametrize("name", CALLS)
def test_inductor_equals_eager(name: str):
    function, _ = compiled(CALLS[name].run, "inductor")
    assert_equal_runs(CALLS[name], function, 3, FUSED)


def test_new_seeds_and_steps_compile_no_more_graphs():
    def run(x: Tensor, seed: int, step: int) -> Tensor:
        drawn = kernels.latent_step(x, HEAD, TABLE, seed=seed, step=step, top_k=COMPONENTS)
        return kernels.latent_logprob(x, HEAD, drawn.ids, drawn.scores)

    function, graphs = compiled(run, "aot_eager")
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    for call in range(8):
        seed, step = 2**62 - 77 * call, 5 + call // 2
        torch.testing.assert_close(function(x, seed, step), run(x, seed, step))
    assert len(graphs) <= 3  # the first has constants, the second a seed that changes, the third both


def test_tensors_of_seed_and_step():
    call = Call(lambda x, s: kernels.latent_step(x, HEAD, TABLE, seed=s, step=s + 1, top_k=COMPONENTS), False)
    function, graphs = compiled(call.run, "aot_eager")
    for seed in (3, 2**40, -1):
        assert_equal_runs(call, function, torch.tensor(seed), tolerance=0.0)
    assert len(graphs) == 1


def test_calls_without_a_seed_draw_from_torchs_generator_when_they_run():
    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.project_with_noise(x, HEAD), kernels.project_with_noise(x, HEAD)

    function, _ = compiled(run, "aot_eager")
    results = []
    for each in (function, run, function):
        torch.manual_seed(5)
        results.append(each(torch.zeros(ROWS, WIDTH)))
    for one, other in zip(results[0], results[1], strict=True):
        assert torch.equal(one, other)
    assert torch.equal(results[0][0], results[2][0])
    assert not torch.equal(results[0][0], results[0][1])
    assert not torch.equal(function(torch.zeros(ROWS, WIDTH))[0], results[0][0])


def test_backward_draws_no_seed():
    function, _ = compiled(lambda x: kernels.project_with_noise(x, HEAD).sum(), "aot_eager")
    out = function(torch.zeros(ROWS, WIDTH, requires_grad=True))
    state = torch.get_rng_state()
    out.backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_shapes_may_be_dynamic():
    call = Call(lambda x, s: kernels.mix_embeddings(s, x, HEAD), True)
    function, graphs = compiled(call.run, "aot_eager")
    for rows in (2, 5, 7):
        ids, x = torch.arange(rows * 2).view(rows, 2), torch.randn(rows, 2, requires_grad=True)
        torch.testing.assert_close(function(x, ids), call.run(x, ids))
    assert len(graphs) <= 2


def test_bad_arguments_raise_the_same_errors():
    function, _ = compiled(lambda x: kernels.latent_logprob(x, HEAD, IDS, SCORES, temperature=-1.0), "aot_eager")
    with pytest.raises(ValueError, match="temperature must be in"):
        function(torch.zeros(ROWS, WIDTH))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context: Callable[[], Any]):
    function, _ = compiled(CALLS["fused_policy_loss"].run, "aot_eager")
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    with context():
        got, expected = function(x, 0)[0], CALLS["fused_policy_loss"].run(x, 0)[0]
    assert not got.requires_grad
    assert torch.equal(got, expected)
