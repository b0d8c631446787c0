"""What the eager and the Triton loss share: how rows are cut into chunks, and what is known and found of a row."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from latent_kernels._types import PolicyStats


class LogprobSpec(NamedTuple):
    """What N rows are to be scored for: ids, scores [N, K], advantages [N] or None, and the options of SPEC 4."""

    ids: Tensor
    scores: Tensor
    advantages: Tensor | None
    temperature: float
    margin_gradient: str

    def rows(self, part: slice | Tensor) -> LogprobSpec:
        """The same for a part of the rows."""
        advantages = None if self.advantages is None else self.advantages[part]
        return self._replace(ids=self.ids[part], scores=self.scores[part], advantages=advantages)


class RowScores(NamedTuple):
    """Log-probs of a chunk of n rows."""

    logprob: Tensor  # [n]
    crossed: Tensor  # [n] integer, latent components with a negative margin
    slope: Tensor | None  # [n, V] d logprob / d logits, where the logits were


class RowEntropies(NamedTuple):
    """Log-probs and entropies of a chunk of n rows."""

    logprob: Tensor  # [n]
    crossed: Tensor  # [n] integer, latent components with a negative margin
    log_z: Tensor  # [n] log-sum-exp of the row's logits, of a text row's over the temperature
    entropy: Tensor  # [n] nats; 0 on latent rows


class LossOptions(NamedTuple):
    """The options of `fused_policy_loss`, but the last one those of `policy_loss` too, with their defaults."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = 3.0
    aggregation: str = "token-mean"
    ratio: str = "token"
    objective: str = "clip"
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0


class LossSpec(NamedTuple):
    """What the loss of N response steps needs besides their log-probs; tensors are [N]."""

    old_logprob: Tensor
    advantages: Tensor
    ref_logprob: Tensor | None
    weights: Tensor  # of a step in the loss
    sequence_log_ratio: Tensor | None  # of the step's response, where that is what is clipped
    options: LossOptions

    def rows(self, part: slice | Tensor) -> LossSpec:
        """The same for a part of the steps."""
        parts: dict[str, Any] = {name: x[part] for name, x in self._asdict().items() if isinstance(x, Tensor)}
        return self._replace(**parts)


# What is summed over the steps, in this order: the loss (weighted), plain statistics, the KL term (weighted).
SUMS = ("loss", "clip_fraction", "dual_clip_fraction", "approx_kl", "abs_log_ratio", "kl")


class StepLosses(NamedTuple):
    """The loss of n response steps."""

    gradient: Tensor  # [n] of the weighted loss, in the log-prob
    sums: Tensor  # [6] in the order of SUMS


def loss_and_stats(
    sums: Tensor, count: Tensor | int, unit: Tensor | float, crossed: Tensor, entropy: Tensor
) -> tuple[Tensor, ...]:
    """The loss and PolicyStats from sums over `count` steps whose weights were divided by `unit`; all 0-d."""
    weighted = sums * unit
    means = sums / (count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1))
    stats = PolicyStats(
        **{name: means[i].float() for i, name in enumerate(SUMS[1:-1], start=1)},
        kl=weighted[SUMS.index("kl")].float(),
        margin_crossed=crossed.float(),
        entropy=entropy.float(),
    )
    return weighted[0], *stats
