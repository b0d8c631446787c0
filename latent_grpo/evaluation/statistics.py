"""The statistics of an evaluation: unbiased pass@k, means over responses or runs, and bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import numpy as np
from numpy.typing import NDArray

CONFIDENCE, RESAMPLES = 0.95, 1000  # of bootstrap intervals
Values = Sequence[float] | NDArray[np.float64]


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Return the unbiased estimate 1 - C(n - c, k) / C(n, k) of solving a problem in k tries.

    n is `samples`, and c is the number of correct ones. The binomials are whole numbers and only the last division
    rounds, so the estimate is exact to that rounding for every n.

    Raises:
        ValueError: k is not in 1 to n, or c is not in 0 to n.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} samples is not defined; choose k from 1 to the number of samples")
    if not 0 <= correct <= samples:
        raise ValueError(f"{correct} of {samples} samples cannot be right")
    subsets = comb(samples, k)
    return (subsets - comb(samples - correct, k)) / subsets


def mean(values: Values) -> float:
    """Return the mean of values [N], or of values [N, R] the mean over R runs of their means over N responses.

    A NaN in [N, R] is left out of its run, and a run of only NaN out of the mean. The mean of nothing is NaN.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.ndim == 1:
        return float(data.mean()) if len(data) else float("nan")
    counted = ~np.isnan(data)
    counts = counted.sum(0)
    totals = np.where(counted, data, 0.0).sum(0)
    runs = totals[counts > 0] / counts[counts > 0]
    return float(runs.mean()) if len(runs) else float("nan")


def bootstrap_interval(
    values: Values, *, confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = 0
) -> list[float]:
    """Return the percentile bootstrap interval [low, high] of `mean`, from draws of problems with replacement.

    values: [N] for N problems, or [N, R]. The same seed gives the same interval. Without values it is [nan, nan]. If
    all values are equal, it has width 0.
    """
    data = np.asarray(values, dtype=np.float64)
    if not len(data):
        return [float("nan")] * 2
    generator = np.random.default_rng(seed)
    means = [mean(data[generator.integers(len(data), size=len(data))]) for _ in range(resamples)]
    defined = [value for value in means if value == value]  # a draw may hold no counted response
    if not defined:
        return [float("nan")] * 2
    tail = (1.0 - confidence) / 2.0
    return [float(bound) for bound in np.quantile(defined, (tail, 1.0 - tail))]
