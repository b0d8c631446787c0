"""The types that the eager and the Triton loss share: what is given for a row, and what is computed of it."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from latent_kernels._types import PLAIN_HEAD, HeadOptions, PolicyStats


class LogprobSpec(NamedTuple):
    """What the log-probs of N rows depend on besides the product with the LM head (Eq. 15-17).

    With `components`, the log-prob of every component is wanted instead of their sum.
    """

    ids: Tensor  # [N, K] int64
    scores: Tensor  # [N, K]
    advantages: Tensor | None  # [N]
    temperature: float
    margin_gradient: str
    method: str = "latent_grpo"
    components: bool = False
    head: HeadOptions = PLAIN_HEAD  # turns the product into logits

    @property
    def rows(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the tensors of the rows, for autograd to save: it raises if they change before the backward pass."""
        return self.ids, self.scores, self.advantages

    def with_rows(self, ids: Tensor, scores: Tensor, advantages: Tensor | None) -> LogprobSpec:
        """Return the same for other rows."""
        return self._replace(ids=ids, scores=scores, advantages=advantages)

    def select(self, rows: slice | Tensor) -> LogprobSpec:
        """Return the same for some of the rows."""
        advantages = None if self.advantages is None else self.advantages[rows]
        return self._replace(ids=self.ids[rows], scores=self.scores[rows], advantages=advantages)


class RowGradient(NamedTuple):
    """The gradient of n rows in their product with the head, stored over the product: row i is scale_i * dlogits_i."""

    dlogits: Tensor  # [n, V]
    scale: Tensor | None  # [n] float32; None stands for 1

    def times(self, factor: Tensor | None) -> Tensor | None:
        """Return the scale times a factor [n]; None stands for 1."""
        if self.scale is None or factor is None:
            return factor if self.scale is None else self.scale
        return self.scale * factor


class RowScores(NamedTuple):
    """The log-probs of a chunk of n rows."""

    logprob: Tensor  # [n], or [n, K] with `components`
    crossed: Tensor  # [n] integer, latent components with a negative margin
    gradient: RowGradient | None  # of the log-prob


class RowForward(NamedTuple):
    """The log-probs of a chunk of n rows, and what a backward pass over the same chunk needs."""

    logprob: Tensor  # [n], or [n, K] with `components`
    crossed: Tensor  # [n] integer, latent components with a negative margin
    log_z: Tensor  # [n] log-sum-exp of the row's logits, on a text row of logits / temperature
    entropy: Tensor | None  # [n] nats, if wanted; 0 on latent rows


class LossOptions(NamedTuple):
    """The options of `fused_policy_loss`. All except the last are options of `policy_loss` too."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = 3.0
    aggregation: str = "token-mean"
    ratio: str = "token"
    objective: str = "clip"
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    kl_bias_correction: bool = False
    sapo_temperatures: tuple[float, float] = (1.0, 1.05)  # these pairs: of positive and of other advantages
    vespo_k: tuple[float, float] = (2.0, 3.0)
    vespo_lambda: tuple[float, float] = (3.0, 2.0)
    entropy_coef: float | Tensor = 0.0

    @property
    def reads_responses(self) -> bool:
        """Whether the loss of a step depends on the log-probs of its whole response."""
        return self.ratio == "sequence" or self.objective == "vespo"


class ResponseTerms(NamedTuple):
    """What the loss of steps [R, T] depends on their whole responses for."""

    advantages: Tensor  # [R, T]; with "vespo" they are weighed
    log_ratio: Tensor | None  # [R] mean log-ratio of a response, for ratio="sequence"
    kl: Tensor | None  # [R] mean KL of a response, for ratio="sequence" with kl_bias_correction


class LossSpec(NamedTuple):
    """What the loss of N response steps depends on besides their log-probs.

    Tensors are [N]. With ratio="component", log-probs and advantages are [N, K].
    """

    old_logprob: Tensor
    advantages: Tensor
    ref_logprob: Tensor | None
    weights: Tensor  # [N], weight of a step in the loss
    sequence_log_ratio: Tensor | None  # mean log-ratio of the step's response, for ratio="sequence"
    sequence_kl: Tensor | None  # mean KL of the step's response, for ratio="sequence" with kl_bias_correction
    options: LossOptions
    bonus: Tensor | None = None  # [N], weight of the entropy of a text step, 0 on latent steps

    def select(self, steps: slice | Tensor) -> LossSpec:
        """Return the same for some of the steps."""
        selected: dict[str, Any] = {name: x[steps] for name, x in self._asdict().items() if isinstance(x, Tensor)}
        return self._replace(**selected)


# The sums over the steps, or over the components with ratio="component", in this order: the loss (weighted), plain
# statistics, the KL term (weighted).
SUMS = ("loss", "clip_fraction", "dual_clip_fraction", "approx_kl", "abs_log_ratio", "kl")


class StepLosses(NamedTuple):
    """The loss of n response steps."""

    gradient: Tensor | None  # gradient of the weighted loss in the log-probs, in their shape
    sums: Tensor  # [6] in the order of SUMS


def loss_and_stats(
    sums: Tensor, count: Tensor | int, unit: Tensor | float, crossed: Tensor, entropy: Tensor
) -> tuple[Tensor, ...]:
    """Return the loss and the fields of PolicyStats, all 0-d, from sums [6] over `count` steps or components.

    The weights of the steps were divided by `unit`, so the weighted sums are multiplied by it.
    """
    weighted = sums * unit
    means = sums / (count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1))
    stats = PolicyStats(
        **{name: means[i].float() for i, name in enumerate(SUMS[1:-1], start=1)},
        kl=weighted[SUMS.index("kl")].float(),
        margin_crossed=crossed.float(),
        entropy=entropy.float(),
    )
    return weighted[0], *stats
