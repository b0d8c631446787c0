"""The oracle that judges the operators: held against the released code's outputs and against cases by hand."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest
import torch
from support import oracle, oracle_loss
from support import tolerances as tol
from support.golden import advantage_inputs, latent_step_options, policy_loss_options
from torch import Tensor


@pytest.mark.parametrize("module", [oracle, oracle_loss], ids=["oracle", "oracle_loss"])
def test_the_oracle_imports_nothing_of_what_it_judges(module):
    imported = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).split(".")[0])
    assert imported <= {"__future__", "collections", "itertools", "math", "typing", "numpy", "torch", "support"}


# Against the released code


@pytest.mark.golden("official_a_latent_step")
def test_latent_step_equals_the_released_sampler(golden_case):
    options = latent_step_options(golden_case)
    step = oracle.latent_step(golden_case["logits"], golden_case["table"], **options)
    assert torch.equal(step.ids, golden_case["ids"])
    torch.testing.assert_close(step.weights, golden_case["weights"], rtol=0, atol=tol.GOLDEN_VALUE)
    torch.testing.assert_close(step.embedding, golden_case["embedding"], rtol=0, atol=tol.GOLDEN_VALUE)
    live = golden_case["latent"]
    assert torch.equal(step.ids[live, 0], golden_case["next_ids"][live])


@pytest.mark.golden("official_a_latent_step")
def test_replayed_mixture_equals_the_released_embedding(golden_case):
    options = latent_step_options(golden_case)
    ended = golden_case["logits"].argmax(-1) == options["end_token_id"]
    live = golden_case["latent"] & ~ended
    tau = 1.0 if options["noise"] == "none" else options["tau"]
    mixture = oracle.mixture(golden_case["ids"][live], golden_case["scores"][live], golden_case["table"], tau)
    expected = golden_case["embedding"][live].double()
    torch.testing.assert_close(mixture, expected, rtol=0, atol=tol.GOLDEN_VALUE)


@pytest.mark.golden("official_a_logp")
def test_log_probs_and_gradients_equal_the_released_ones(golden_case):
    inputs = golden_case["logits"], golden_case["ids"], golden_case["scores"]
    temperature = float(golden_case["temperature"])
    scored = oracle.logprob(
        *inputs, temperature=temperature, advantages=golden_case["advantages"], margin_gradient="released"
    )
    gradient = golden_case["upstream"].double().unsqueeze(-1) * scored.gradient
    torch.testing.assert_close(scored.value, golden_case["logp"].double(), rtol=0, atol=tol.GOLDEN_VALUE)
    torch.testing.assert_close(gradient, golden_case["grad_logits"].double(), rtol=0, atol=tol.GOLDEN_GRADIENT)
    value = oracle.logprob(*inputs, temperature=temperature).value
    torch.testing.assert_close(value, golden_case["logp_noadv"].double(), rtol=0, atol=tol.GOLDEN_VALUE)


@pytest.mark.golden("official_a_advantage")
@pytest.mark.parametrize("released", ["adv_exclude", "adv_include", "adv_grpo"])
def test_group_advantages_equal_the_released_ones(golden_case, released):
    result = oracle_loss.group_advantages(**advantage_inputs(golden_case, released))
    mask = golden_case["mask"]
    actual = result.advantages.unsqueeze(-1).repeat(1, mask.shape[1])
    actual[:, 0] = result.first_step
    torch.testing.assert_close(actual * mask, golden_case[released] * mask, rtol=0, atol=tol.GOLDEN_VALUE)


@pytest.mark.golden("official_a_policy_loss")
def test_policy_loss_and_gradient_equal_the_released_ones(golden_case):
    inputs = [golden_case[name] for name in ("logp", "old_logp", "advantages", "mask")]
    options, kl_coef = policy_loss_options(golden_case)
    loss, gradient, stats = oracle_loss.policy_loss(
        *inputs, ref_logprob=golden_case["ref_logp"], kl_coef=kl_coef, **options
    )
    torch.testing.assert_close(gradient, golden_case["grad_logp"].double(), rtol=0, atol=tol.GOLDEN_GRADIENT)
    without_kl = oracle_loss.policy_loss(*inputs, **options).loss
    for actual, name in (
        (loss, "total"),
        (without_kl, "loss"),
        (stats["clip_fraction"], "clipfrac"),
        (stats["dual_clip_fraction"], "clipfrac_lower"),
        (stats["approx_kl"], "approx_kl"),
        (stats["kl"], "kl_loss"),
    ):
        assert actual == pytest.approx(golden_case[name].item(), abs=tol.GOLDEN_VALUE), name


# Against published or hand-computed numbers

FULL = 0xFFFFFFFF
# kat_vectors of Random123, philox4x32 with 10 rounds: counter, key, output.
KNOWN_ANSWERS = {
    "zeros": ((0, 0, 0, 0), (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    "ones": ((FULL,) * 4, (FULL,) * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
}


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS.values(), ids=KNOWN_ANSWERS)
def test_philox_gives_the_known_answers_of_random123(counter, key, words):
    assert oracle.philox(counter, key) == words


def test_draws_are_minus_the_logarithm_of_the_words_of_their_counter():
    draws = oracle.exponential_draws(5, [3, -1], seed=(7 << 32) + 9, step=11)
    for row, (low, high) in enumerate([(3, 0), (FULL, FULL)]):
        words = [oracle.philox((i, low, high, 11), (9, 7))[0] for i in range(5)]
        expected = torch.tensor([-math.log((word + 0.5) / 2**32) for word in words])
        torch.testing.assert_close(draws[row], expected, rtol=tol.FLOAT32, atol=0)


def test_noise_is_clamped_at_both_ends_and_shifted_where_one_sided():
    draws = torch.tensor([0.0, math.exp(-3.5), 1.0, math.e, 100.0]).numpy()
    assert oracle.gumbel(draws, "two_sided").tolist() == pytest.approx([3.0, 3.0, 0.0, -1.0, -1.5], abs=1e-6)
    assert oracle.gumbel(draws, "one_sided").tolist() == pytest.approx([4.5, 4.5, 1.5, 0.5, 0.0], abs=1e-6)
    assert oracle.gumbel(draws, "none").tolist() == [0.0] * 5


def test_a_projection_adds_the_scaled_noise_of_each_unit():
    hidden, weight, bias = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([0.5, -0.5])
    draws = torch.tensor([[1.0, 100.0]])
    out = oracle.project_with_noise(hidden, weight, bias, draws, "one_sided", torch.tensor([2.0]))
    assert out.tolist() == [[11.0 + 0.5 + 2.0 * 1.5, 2.0 - 0.5]]


def test_coefficients_of_each_mode_on_both_sides_of_the_target():
    fall, rise = 1.0 - math.exp(-0.5), 1.0 - math.exp(0.5)
    for mode in ("aligned", "released", "none"):
        assert oracle.coefficient(0.5, -1.0, mode) == pytest.approx(fall)  # short of the target: no mode differs
        assert oracle.coefficient(-0.5, 1.0, mode) == pytest.approx(rise)  # a positive advantage pulls back
        assert oracle.coefficient(-0.5, None, mode) == pytest.approx(rise)
    assert oracle.coefficient(-0.5, 0.0, "aligned") == pytest.approx(fall)
    assert oracle.coefficient(-0.5, 0.0, "released") == pytest.approx(-fall)
    assert oracle.coefficient(-0.5, 0.0, "none") == pytest.approx(rise)


def test_the_entropy_of_equal_logits_is_the_logarithm_of_their_number():
    logits = torch.tensor([[2.0, 2.0, 2.0, -torch.inf]] * 2)
    value, gradient = oracle.entropy(logits, torch.tensor([[1, oracle.UNUSED], [1, 2]]), 0.7)
    assert value.tolist() == pytest.approx([math.log(3.0), 0.0])
    torch.testing.assert_close(gradient, torch.zeros(2, 4).double(), rtol=0, atol=tol.FLOAT64)


@pytest.mark.parametrize(
    ("estimator", "value", "gradient"),
    [("k1", -0.5, 1.0), ("k2", 0.125, -0.5), ("k3", math.exp(0.5) - 1.5, 1.0 - math.exp(0.5))],
)
def test_kl_estimates_of_a_step_by_hand(estimator, value, gradient):
    sample = oracle_loss.Sample(-1.0, -1.0, 1.0, -0.5, None)
    assert oracle_loss.kl(sample, estimator) == pytest.approx((value, gradient))


# Against finite differences: the oracle writes its gradients as formulas


def numerical_gradient(function, leaf: Tensor) -> Tensor:
    """Return central differences of a function of one float64 tensor."""
    gradient, step = torch.zeros_like(leaf), 1e-6
    for i in range(leaf.numel()):
        change = torch.zeros(leaf.numel(), dtype=torch.float64).index_fill(0, torch.tensor([i]), step).view_as(leaf)
        gradient.view(-1)[i] = (function(leaf + change) - function(leaf - change)) / (2.0 * step)
    return gradient


def test_gradients_of_log_probs_and_entropies_are_those_of_their_values(make_trajectory):
    data = make_trajectory(4, 7, 3, margins="positive")
    logits, weights = data.logits, torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    for values in (
        lambda z: oracle.logprob(z, data.ids, data.scores, temperature=0.7, advantages=data.advantages),
        lambda z: oracle.entropy(z, data.ids, 0.7),
    ):
        expected = numerical_gradient(lambda z, f=values: float(weights @ f(z).value), logits)
        actual = weights.unsqueeze(-1) * values(logits).gradient
        torch.testing.assert_close(actual, expected, rtol=0, atol=tol.FINITE_DIFFERENCE)


def test_gradients_of_a_mixture_are_those_of_its_value():
    ids, scores = torch.tensor([[1, 4, 1], [2, oracle.UNUSED, oracle.UNUSED]]), torch.randn(2, 3).double()
    table, upstream = torch.randn(5, 4).double(), torch.randn(2, 4).double()
    for_scores, for_table = oracle.mixture_gradients(ids, scores, table, 0.7, upstream)
    for actual, function, leaf in (
        (for_scores, lambda x: float((oracle.mixture(ids, x, table, 0.7) * upstream).sum()), scores),
        (for_table, lambda x: float((oracle.mixture(ids, scores, x, 0.7) * upstream).sum()), table),
    ):
        torch.testing.assert_close(actual, numerical_gradient(function, leaf), rtol=0, atol=tol.FINITE_DIFFERENCE)


@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_the_gradient_of_the_policy_loss_is_that_of_its_value(aggregation, kl_estimator):
    logprob, old, ref = -torch.rand(3, 4).double(), -torch.rand(3, 4).double(), -torch.rand(3, 4).double()
    advantages, mask = torch.tensor([[1.0], [-1.0], [0.5]]).expand(3, 4), torch.rand(3, 4) < 0.8

    options = dict(dual_clip=1.1, aggregation=aggregation, kl_estimator=kl_estimator)

    def run(x: Tensor) -> oracle_loss.PolicyLoss:
        return oracle_loss.policy_loss(x, old, advantages, mask, ref_logprob=ref, kl_coef=0.3, **options)

    expected = numerical_gradient(lambda x: run(x).loss, logprob)
    torch.testing.assert_close(run(logprob).gradient, expected, rtol=0, atol=tol.FINITE_DIFFERENCE)


def test_gradients_of_the_fused_loss_are_those_of_its_value(make_trajectory):
    hidden, head = torch.randn(2, 2, 3).double(), torch.randn(7, 3).double()
    data = make_trajectory(4, 7, 3, margins="positive", logits=hidden.flatten(0, 1) @ head.T)
    old, advantages = -torch.rand(2, 2).double(), torch.tensor([[1.0, 0.0], [-1.0, 2.0]]).double()
    mask = torch.tensor([[True, True], [True, False]])
    batch = dict(hidden=hidden, lm_head=head, ids=data.ids.view(2, 2, 3), scores=data.scores.view(2, 2, 3))
    batch |= dict(old_logprob=old, advantages=advantages, mask=mask)
    options = dict(temperature=0.7, entropy_coef=0.2, dual_clip=None, clip_low=1.0, clip_high=1e3)
    result = oracle_loss.fused_policy_loss(batch, **options)
    for name in ("hidden", "lm_head"):
        expected = numerical_gradient(
            lambda x, n=name: oracle_loss.fused_policy_loss({**batch, n: x}, **options).loss, batch[name]
        )
        torch.testing.assert_close(getattr(result, name), expected, rtol=tol.FINITE_DIFFERENCE, atol=1e-6)
    assert result.hidden[1, 1].tolist() == [0.0] * 3


def test_the_share_of_crossed_margins_counts_components_of_latent_rows():
    logits = torch.zeros(2, 4)
    scores = torch.tensor([[-1.0, -2.0], [-9.0, -9.0]])  # log-probs are -1.386
    assert oracle_loss.crossed_share(logits, torch.tensor([[0, 1], [2, oracle.UNUSED]]), scores) == 0.5
