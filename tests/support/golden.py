"""Arguments of the operators from cases of the golden vectors, which the released code wrote."""

from __future__ import annotations

from typing import Any


def latent_step_options(case: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of the latent step in a case."""
    _, _, top_k, top_p, scale, tau, one_sided, noise_on, end = case["params"].tolist()
    kind = "one_sided" if one_sided else "two_sided"
    return dict(
        top_k=int(top_k),
        top_p=top_p,
        tau=tau,
        noise_scale=scale,
        noise=kind if noise_on else "none",
        exponential=case["exponential"],
        latent_mask=case["latent"],
        end_token_id=int(end),
    )


# The released estimators by the names of their arrays.
RELEASED_ADVANTAGES = {
    "adv_exclude": dict(invalid="exclude", first_token="best_of_group"),
    "adv_include": dict(invalid="keep", first_token="best_of_group"),
    "adv_grpo": dict(invalid="keep", first_token="all"),
}


def advantage_inputs(case: dict[str, Any], released: str) -> dict[str, Any]:
    """Return all arguments of group advantages in a case, for one of the released estimators."""
    mask = case["mask"]
    length = mask.sum(-1)
    return dict(
        rewards=case["rewards"],
        group_ids=case["group"],
        invalid_mask=length >= int(case["max_len"]),
        mean_logprob=(case["old_logp"] * mask).sum(-1) / length.clamp_min(1.0),
        normalize_std=bool(case["norm_std"]),
        **RELEASED_ADVANTAGES[released],
    )


def policy_loss_options(case: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """Return the options of the policy loss in a case, and the coefficient of its KL."""
    clip_low, clip_high, dual_clip, kl_coef = case["params"].tolist()
    options = dict(clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, aggregation=case["mode"])
    return options, kl_coef
