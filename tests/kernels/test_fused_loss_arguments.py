"""The fused policy loss names a wrong argument, the value given and the remedy."""

from __future__ import annotations

import pytest
import torch

from latent_kernels import fused_policy_loss

FLAT = torch.zeros(2, 3)
IDS = torch.zeros(2, 3, 4, dtype=torch.int64)
INVALID = {
    "hidden-shape": (
        dict(hidden=torch.zeros(6, 8)),
        ValueError,
        r"hidden must have shape \[\*, \*, \*\], got \[6, 8\]",
    ),
    "hidden-dtype": (dict(hidden=torch.zeros(2, 3, 8).long()), TypeError, "hidden .* got torch.int64"),
    "head-shape": (dict(lm_head=torch.zeros(9, 7)), ValueError, r"lm_head must have shape \[\*, 8\], got \[9, 7\]"),
    "head-device": (dict(lm_head=torch.zeros(9, 8, device="meta")), ValueError, "lm_head is on meta"),
    "ids-shape": (dict(ids=IDS[:, :2]), ValueError, r"ids must have shape \[2, 3, \*\], got \[2, 2, 4\]"),
    "ids-dtype": (dict(ids=IDS.float()), TypeError, "ids must be torch.int64, got torch.float32"),
    "ids-empty": (dict(ids=IDS[..., :0], scores=torch.zeros(2, 3, 0)), ValueError, "ids .* component"),
    "scores-shape": (dict(scores=torch.zeros(2, 3, 3)), ValueError, r"scores .* \[2, 3, 4\], got \[2, 3, 3\]"),
    "old-shape": (dict(old_logprob=torch.zeros(6)), ValueError, r"old_logprob must have shape \[2, 3\], got \[6\]"),
    "advantages-shape": (dict(advantages=torch.zeros(2)), ValueError, r"advantages .* \[2, 3\], got \[2\]"),
    "mask-shape": (dict(mask=torch.zeros(3, 2)), ValueError, r"mask must have shape \[2, 3\], got \[3, 2\]"),
    "mask-device": (dict(mask=FLAT.to("meta")), ValueError, "mask is on meta"),
    "temperature": (dict(temperature=-1.0), ValueError, "temperature .* got -1.0"),
    "margin-gradient": (dict(margin_gradient="x"), ValueError, "margin_gradient must be one of .* got 'x'"),
    "method": (dict(method="x"), ValueError, "method must be one of .* got 'x'"),
    "ratio": (dict(ratio="x"), ValueError, "ratio must be one of 'token', 'sequence', 'component', got 'x'"),
    "component-old": (
        dict(ratio="component", method="multiplex"),
        ValueError,
        r"old_logprob .* \[2, 3, 4\], got \[2, 3\]",
    ),
    "component-method": (
        dict(ratio="component", old_logprob=torch.zeros(2, 3, 4)),
        ValueError,
        "method is 'latent_grpo': .* only with 'multiplex'",
    ),
    "clip-low": (dict(clip_low=2.0), ValueError, "clip_low .* got 2.0"),
    "clip-high": (dict(clip_high="a"), TypeError, "clip_high must be a number, got str"),
    "dual-clip": (dict(dual_clip=0.5), ValueError, "dual_clip .* got 0.5"),
    "aggregation": (dict(aggregation="sum"), ValueError, "aggregation must be one of .* got 'sum'"),
    "entropy-coef": (dict(entropy_coef=-0.1), ValueError, "entropy_coef .* got -0.1"),
    "kl-without-ref": (dict(kl_coef=0.5), ValueError, "kl_coef is 0.5, but ref_logprob is None"),
    "ref-shape": (dict(ref_logprob=torch.zeros(2, 2)), ValueError, r"ref_logprob .* got \[2, 2\]"),
    "impl-bogus": (dict(impl="bogus"), ValueError, "impl must be one of .* got 'bogus'"),
    "impl-triton": (dict(impl="triton"), RuntimeError, "use impl='auto'"),
}


@pytest.mark.parametrize(("change", "error", "message"), INVALID.values(), ids=INVALID)
def test_an_error_names_the_wrong_argument(change, error, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = {"hidden": torch.zeros(2, 3, 8), "lm_head": torch.zeros(9, 8), "ids": IDS}
    arguments |= {"scores": torch.zeros(2, 3, 4), "old_logprob": FLAT, "advantages": FLAT, "mask": FLAT.bool()}
    with pytest.raises(error, match=message):
        fused_policy_loss(**{**arguments, **change})
