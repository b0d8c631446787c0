"""The metrics of the updates of a step, under the names of `docs/metrics.md`."""

from __future__ import annotations

from collections.abc import Mapping

from latent_grpo.config import LatentGRPOConfig

# Statistics of `fused_policy_loss` whose metric has another name.
NAMES = {
    "clip_fraction": "clip_ratio/region_mean",
    "dual_clip_fraction": "clip_ratio/dual_mean",
    "margin_crossed": "latent/margin_crossed",
}
GAP = "sampling/sampling_logp_difference/mean"


def update_metrics(args: LatentGRPOConfig, sums: Mapping[str, float], updates: int) -> dict[str, float]:
    """Return the means over the updates of a step, without statistics that this loss does not have.

    sums: loss, `grad_norm` and the statistics of `fused_policy_loss`, added up over the updates.
    """
    clips = args.loss_type not in ("sapo", "vespo")
    used = {
        "abs_log_ratio": False,  # before the first update it is the metric GAP
        "clip_fraction": clips,
        "dual_clip_fraction": clips and args.loss_type != "cispo" and args.delta is not None,
        "kl": args.beta > 0,
        "margin_crossed": args.latent and args.method != "multiplex",  # which has no margins
        "entropy": args.entropy_coef > 0,  # else it is not computed
    }
    return {NAMES.get(name, name): value / updates for name, value in sums.items() if used.get(name, True)}
