"""The log-probs name a wrong argument, the value given and the remedy; limits of the kernels."""

from __future__ import annotations

import pytest
import torch
from support import oracle
from support import tolerances as tol
from support.kernels import NEEDS_TRITON, kernel
from support.logprobs import value_and_gradients

from latent_kernels import latent_logprob, latent_logprob_from_logits

IDS, SCORES = torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 3)
SHARED_INVALID = {
    "ids-rows": (dict(ids=IDS[:3]), ValueError, r"ids must have shape \[4, \*\], got \[3, 3\]"),
    "ids-dtype": (dict(ids=IDS.int()), TypeError, "ids must be torch.int64, got torch.int32"),
    "ids-empty": (dict(ids=IDS[:, :0]), ValueError, r"ids .* component .* \[4, 0\]"),
    "scores-shape": (dict(scores=SCORES[:, :2]), ValueError, r"scores must have shape \[4, 3\], got \[4, 2\]"),
    "scores-dtype": (dict(scores=IDS), TypeError, "scores .* got torch.int64"),
    "scores-device": (dict(scores=SCORES.to("meta")), ValueError, "scores is on meta"),
    "temperature-0": (dict(temperature=0.0), ValueError, r"temperature must be in \(0, 3.40282e\+38\], got 0.0"),
    "temperature-str": (dict(temperature="1"), TypeError, "temperature must be a number, got str"),
    "advantages-shape": (dict(advantages=torch.zeros(4, 1)), ValueError, r"advantages .* \[4\], got \[4, 1\]"),
    "advantages-int": (dict(advantages=IDS[:, 0]), TypeError, "advantages .* got torch.int64"),
    "margin-gradient": (dict(margin_gradient="flip"), ValueError, "margin_gradient must be one of .* got 'flip'"),
    "method": (dict(method="grpo"), ValueError, "method must be one of .* got 'grpo'"),
    "components": (dict(components=True), ValueError, "method is 'latent_grpo': .* only with 'multiplex'"),
    "impl-bogus": (dict(impl="bogus"), ValueError, "impl must be one of .* got 'bogus'"),
    "impl-triton": (dict(impl="triton"), RuntimeError, "use impl='auto'"),
}


@pytest.mark.parametrize("operator", [latent_logprob, latent_logprob_from_logits], ids=["hidden", "logits"])
@pytest.mark.parametrize(("change", "error", "message"), SHARED_INVALID.values(), ids=SHARED_INVALID)
def test_an_error_names_the_wrong_argument(operator, change, error, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = (torch.zeros(4, 8), torch.zeros(9, 8)) if operator is latent_logprob else (torch.zeros(4, 9),)
    with pytest.raises(error, match=message):
        operator(*inputs, **{"ids": IDS, "scores": SCORES, **change})


@pytest.mark.parametrize(
    ("hidden", "head", "error", "message"),
    [
        (torch.zeros(4, 2, 8), torch.zeros(9, 8), ValueError, r"hidden must have shape \[\*, \*\], got \[4, 2, 8\]"),
        (torch.zeros(4, 8).long(), torch.zeros(9, 8), TypeError, "hidden .* got torch.int64"),
        (torch.zeros(4, 8), torch.zeros(9, 7), ValueError, r"lm_head must have shape \[\*, 8\], got \[9, 7\]"),
        (torch.zeros(4, 8), torch.zeros(9, 8, device="meta"), ValueError, "lm_head is on meta"),
        (torch.zeros(4, 8), None, TypeError, "lm_head must be a tensor, got NoneType"),
    ],
    ids=["hidden-shape", "hidden-dtype", "head-shape", "head-device", "head-none"],
)
def test_an_error_names_the_wrong_hidden_or_head(hidden, head, error, message):
    with pytest.raises(error, match=message):
        latent_logprob(hidden, head, IDS, SCORES)


def test_an_error_names_the_wrong_logits():
    with pytest.raises(ValueError, match=r"logits must have shape \[\*, \*\], got \[9\]"):
        latent_logprob_from_logits(torch.zeros(9), IDS, SCORES)
    with pytest.raises(TypeError, match=r"logits .* got torch.int64"):
        latent_logprob_from_logits(torch.zeros(4, 9).long(), IDS, SCORES)


@NEEDS_TRITON
@pytest.mark.parametrize("name", ["hidden", "lm_head", "logits"])
def test_kernels_refuse_float64(name):
    inputs = {"hidden": torch.zeros(4, 8), "lm_head": torch.zeros(9, 8)}
    if name == "logits":
        inputs = {"logits": torch.zeros(4, 9)}
    inputs[name] = inputs[name].double()
    operator = latent_logprob_from_logits if name == "logits" else latent_logprob
    with pytest.raises(RuntimeError, match=r"computes in float32, got torch\.float64; use impl='auto'"):
        operator(**inputs, ids=IDS, scores=SCORES, impl="triton")


@NEEDS_TRITON
def test_kernels_take_rows_of_up_to_128_components():
    logits, scores = torch.randn(2, 200), torch.randn(2, 129)
    ids = torch.randint(20, (2, 129))  # most ids occur several times
    with pytest.raises(RuntimeError, match="scores at most 128 components per row, got 129; use impl='auto'"):
        latent_logprob_from_logits(logits, ids, scores, impl="triton")
    assert latent_logprob_from_logits(logits, ids, scores).shape == (2,)
    results = value_and_gradients(
        lambda z: kernel(latent_logprob_from_logits)(z, ids[:, :128], scores[:, :128]), logits, upstream=torch.ones(2)
    )
    expected = oracle.logprob(logits, ids[:, :128], scores[:, :128])
    for actual, exact in zip(results, expected, strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=tol.FLOAT32, atol=tol.FLOAT32)
