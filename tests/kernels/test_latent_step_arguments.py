"""The latent step names a wrong argument, the value given and the remedy."""

from __future__ import annotations

import pytest
import torch
from support.latent_steps import WIDTH

from latent_kernels import latent_step, latent_step_from_logits

LOGITS, TABLE = torch.zeros(4, 20), torch.zeros(20, WIDTH)
OTHER_DEVICE = torch.device("meta")
INVALID = {
    "logits-1d": (dict(logits=torch.zeros(20)), ValueError, r"logits must have shape \[\*, \*\], got \[20\]"),
    "logits-int": (dict(logits=torch.zeros(4, 20, dtype=torch.int64)), TypeError, "logits .* got torch.int64"),
    "logits-list": (dict(logits=[[0.0]]), TypeError, "logits must be a tensor, got list"),
    "table-rows": (dict(embedding=torch.zeros(21, 3)), ValueError, r"embedding .* \[20, \*\], got \[21, 3\]"),
    "table-device": (dict(embedding=TABLE.to(OTHER_DEVICE)), ValueError, "embedding is on meta"),
    "top-k-0": (dict(top_k=0), ValueError, "top_k must be between 1 and the vocabulary size 20, got 0"),
    "top-k-large": (dict(top_k=21), ValueError, "top_k .* got 21"),
    "top-k-float": (dict(top_k=2.0), TypeError, "top_k must be an int, got float"),
    "top-k-bool": (dict(top_k=True), TypeError, "top_k must be an int, got bool"),
    "top-p-high": (dict(top_p=1.5), ValueError, r"top_p must be in \[0, 1\], got 1.5"),
    "top-p-low": (dict(top_p=-0.1), ValueError, "top_p .* got -0.1"),
    "top-p-nan": (dict(top_p=float("nan")), ValueError, "top_p .* got nan"),
    "top-p-str": (dict(top_p="0.9"), TypeError, "top_p must be a number, got str"),
    "top-p-rows": (dict(top_p=torch.ones(3)), ValueError, r"top_p must have shape \[4\], got \[3\]"),
    "tau-0": (dict(tau=0.0), ValueError, r"tau must be in \(0, inf\], got 0.0"),
    "tau-int-rows": (dict(tau=torch.ones(4, dtype=torch.int64)), TypeError, "tau .* got torch.int64"),
    "noise-kind": (dict(noise="gumbel"), ValueError, "noise must be one of 'one_sided', .* got 'gumbel'"),
    "noise-scale": (dict(noise_scale=-1.0), ValueError, "noise_scale .* got -1.0"),
    "noise-scale-rows": (dict(noise_scale=torch.ones(4, 1)), ValueError, r"noise_scale .* got \[4, 1\]"),
    "seed-float": (dict(seed=1.0), TypeError, "seed must be an int or a 0-d int64 tensor, got float"),
    "seed-1d": (dict(seed=torch.zeros(1, dtype=torch.int64)), ValueError, r"seed must have shape \[\], got \[1\]"),
    "seed-int32": (dict(seed=torch.tensor(1, dtype=torch.int32)), TypeError, "seed .* got torch.int32"),
    "step-bool": (dict(step=True), TypeError, "step .* got bool"),
    "row-ids-shape": (dict(row_ids=torch.arange(5)), ValueError, r"row_ids must have shape \[4\], got \[5\]"),
    "row-ids-dtype": (dict(row_ids=torch.zeros(4)), TypeError, "row_ids must be torch.int64, got torch.float32"),
    "draws-shape": (dict(exponential=torch.ones(4, 19)), ValueError, r"exponential .* \[4, 20\], got \[4, 19\]"),
    "draws-and-seed": (dict(exponential=torch.ones(4, 20), seed=1), ValueError, "either seed or exponential"),
    "mask-shape": (dict(latent_mask=torch.ones(3, dtype=torch.bool)), ValueError, r"latent_mask .* got \[3\]"),
    "mask-dtype": (dict(latent_mask=torch.ones(4)), TypeError, "latent_mask must be torch.bool, got torch.float32"),
    "end-negative": (dict(end_token_id=-1), ValueError, "end_token_id must be between 0 and 19, got -1"),
    "end-large": (dict(end_token_id=20), ValueError, "end_token_id .* got 20"),
    "end-str": (dict(end_token_id="</think>"), TypeError, "end_token_id must be an int, got str"),
    "delta-negative": (dict(noise_delta=-0.1), ValueError, r"noise_delta must be in \[0, 3.40282e\+38\], got -0.1"),
    "delta-two-sided": (dict(noise_delta=0.1, noise="two_sided"), ValueError, "give noise_delta=0 with .*'two_sided'"),
    "rule": (dict(end_rule="soft"), ValueError, "end_rule must be one of 'raw', 'noisy', got 'soft'"),
    "rule-without-end": (dict(end_rule="noisy"), ValueError, "end_rule='noisy', .* need end_token_id, got None"),
    "least-without-end": (dict(min_latent_steps=1), ValueError, "min_latent_steps .* need end_token_id"),
    "most-without-end": (dict(max_latent_steps=1), ValueError, "max_latent_steps need end_token_id"),
    "least-negative": (dict(min_latent_steps=-1, end_token_id=1), ValueError, "min_latent_steps .* got -1"),
    "least-float": (
        dict(min_latent_steps=1.0, end_token_id=1),
        TypeError,
        "min_latent_steps must be an int, got float",
    ),
    "most-below-least": (
        dict(min_latent_steps=4, max_latent_steps=3, end_token_id=1),
        ValueError,
        r"max_latent_steps must be in \[4, inf\], got 3",
    ),
    "method": (dict(method="grpo"), ValueError, "method must be one of 'latent_grpo', .* got 'grpo'"),
    "multiplex-nucleus": (dict(method="multiplex"), ValueError, "whole distribution; give top_p=1, got 0.95"),
    "impl-bogus": (dict(impl="bogus"), ValueError, "impl must be one of 'auto', 'triton', 'eager', got 'bogus'"),
    "impl-triton": (dict(impl="triton"), RuntimeError, "use impl='auto'"),
}


@pytest.mark.parametrize(("change", "error", "message"), INVALID.values(), ids=INVALID)
def test_an_error_names_the_wrong_argument(change, error, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = {"logits": LOGITS, "embedding": TABLE, "seed": None, **change}
    with pytest.raises(error, match=message):
        latent_step_from_logits(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(hidden=torch.zeros(4)), ValueError, r"hidden must have shape \[\*, \*\], got \[4\]"),
        (dict(lm_head=torch.zeros(20, 9)), ValueError, r"lm_head must have shape \[\*, 8\], got \[20, 9\]"),
        (dict(lm_head=torch.zeros(20, 8, dtype=torch.int8)), TypeError, "lm_head .* got torch.int8"),
        (dict(lm_head=torch.zeros(20, 8, device="meta")), ValueError, "lm_head is on meta"),
        (dict(embedding=torch.zeros(21, 8)), ValueError, r"embedding .* got \[21, 8\]"),
        (dict(impl="triton"), RuntimeError, "use impl='auto'"),
        (dict(impl="bogus"), ValueError, "got 'bogus'"),
    ],
    ids=["hidden-shape", "head-shape", "head-dtype", "head-device", "table-shape", "impl-triton", "impl-bogus"],
)
def test_an_error_names_the_wrong_argument_of_the_step_from_hidden(change, error, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = {"hidden": torch.zeros(4, 8), "lm_head": torch.zeros(20, 8), "embedding": torch.zeros(20, 8), **change}
    with pytest.raises(error, match=message):
        latent_step(**arguments)
