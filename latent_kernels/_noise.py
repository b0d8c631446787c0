"""Counter-based noise: Philox-4x32-10 words, exponential draws, clamped Gumbel noise (Eq. 12-13).

The noise of a token is a function of (seed, step, row id, vocabulary id) only. So it is the same in any batch, any
order, any tiling and any implementation. The 32-bit arithmetic is emulated in int64, whose products wrap modulo 2^64
and so keep the high word of a 32 x 32 bit product.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

GUMBEL_LOW, GUMBEL_HIGH = -1.5, 3.0  # the clamp of the Gumbel noise (Eq. 12-13)
NOISE_KINDS = ("one_sided", "two_sided", "none")

# The constants of Philox-4x32-10 (Salmon et al. 2011); Triton's `tl.philox` has the same.
_WORD = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def draw_seed() -> int:
    """Draw a 63-bit seed from torch's default CPU generator, so that `torch.manual_seed` governs it."""
    return int(torch.randint(2**63 - 1, ()).item())


def _multiply(value: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """Return the high and the low 32-bit word of a product."""
    product = value * multiplier
    return (product >> 32) & _WORD, product & _WORD


def philox_words(ids: Tensor, row_ids: Tensor, seed: int | Tensor, step: int | Tensor) -> Tensor:
    """Return the first output word of Philox-4x32-10 for every (row, id): [B, M] int64 in [0, 2^32).

    ids is [B, M] or [M] int64, row_ids [B] int64. seed and step are an int or a 0-d int64 tensor; step may also be [B].
    Key = (seed low, seed high); counter = (id, row low, row high, step).
    """
    rows = row_ids.unsqueeze(-1)
    if isinstance(step, Tensor) and step.ndim:
        step = step.unsqueeze(-1)
    if ids.device.type == "cpu":
        # A hundred small operations cost NumPy a fifth of what they cost torch.
        keys = _round_keys(seed.numpy()) if isinstance(seed, Tensor) and seed.ndim else _kept_keys(int(seed))
        return torch.from_numpy(_numpy_words(ids.numpy(), rows.numpy(), keys, _on_host(step)))
    c0, c1, c2, c3 = ids & _WORD, rows & _WORD, (rows >> 32) & _WORD, step & _WORD
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0


def _on_host(number: int | Tensor) -> Any:
    """Return an array [B, 1] for a tensor with dimensions, otherwise an array [1]."""
    return number.numpy() if isinstance(number, Tensor) and number.ndim else np.array([int(number)])


def _round_keys(seed: Any) -> list[tuple[Any, Any]]:
    """Return the two key words of every round, given an int or an array: those of the seed plus n steps in round n."""
    low, high = seed & _WORD, (seed >> 32) & _WORD
    steps = [(n * _KEY_STEPS[0], n * _KEY_STEPS[1]) for n in range(_ROUNDS)]
    return [(np.uint64((low + first) & _WORD), np.uint64((high + second) & _WORD)) for first, second in steps]


_kept_keys = functools.lru_cache(maxsize=64)(_round_keys)  # of a seed that is an int


def _numpy_words(ids: Any, rows: Any, keys: list[tuple[Any, Any]], step: Any) -> Any:
    """Compute `philox_words` on int64 arrays that broadcast against each other. Words are the low halves of uint64."""
    half, word = np.uint64(32), np.uint64(_WORD)
    first, second = (np.uint64(multiplier) for multiplier in _MULTIPLIERS)
    ids, rows, step = (x.view(np.uint64) for x in (ids, rows, step))
    c0, c1, c2, c3 = ids & word, rows & word, rows >> half, step & word
    *keys, (last, _) = keys
    for key0, key1 in keys:
        product0, product1 = c0 * first, c2 * second
        c0, c2 = (product1 >> half) ^ c1 ^ key0, (product0 >> half) ^ c3 ^ key1
        c1, c3 = product1 & word, product0 & word
    # Of the last round, only the first word is wanted.
    return (((c2 * second) >> half) ^ c1 ^ last).view(np.int64)


def uniform(words: Tensor) -> Tensor:
    """Return uniform draws in (0, 1], float32.

    The draw is `(x + 0.5) / 2^32`, rounded once to float32, as the kernels compute it.
    """
    return words.to(torch.float32) * 2.0**-32 + 2.0**-33


def exponential_draws(ids: Tensor, row_ids: Tensor, seed: int | Tensor, step: int | Tensor) -> Tensor:
    """Return Exp(1) draws `-log(u)` [B, M] float32."""
    return -torch.log(uniform(philox_words(ids, row_ids, seed, step)))


def uniform_draws(count: int, row_ids: Tensor, seed: int | Tensor, step: int | Tensor) -> Tensor:
    """Return the uniform draws in (0, 1) of the ids 0, 1, ..., count - 1 of each row, [B, count] float64."""
    words = philox_words(torch.arange(count, device=row_ids.device), row_ids, seed, step)
    return (words.double() + 0.5) * 2.0**-32


def gumbel_noise(exponential: Tensor, kind: str, delta: float = 0.0) -> Tensor:
    """Return Gumbel noise `clamp(-log(e), -1.5, 3)`, shifted to [delta, 4.5 + delta] if one-sided (Eq. 12-13).

    It is in float32, or in float64 for float64 draws.
    """
    exponential = exponential.to(torch.promote_types(exponential.dtype, torch.float32))
    noise = torch.clamp(-torch.log(exponential), GUMBEL_LOW, GUMBEL_HIGH)
    if kind != "one_sided":
        return noise
    noise = noise - GUMBEL_LOW
    return noise + delta if delta else noise


def noise_bounds(kind: str, delta: float = 0.0) -> tuple[float, float]:
    """Return a lower and an upper bound of `gumbel_noise`, which are its extremes if delta is 0."""
    if kind != "one_sided":
        return GUMBEL_LOW, GUMBEL_HIGH
    # A sum with delta is rounded in float32 or in float64, whichever the draws have.
    slack = 2.0**-22 if delta else 0.0
    return delta * (1.0 - slack), (GUMBEL_HIGH - GUMBEL_LOW + delta) * (1.0 + slack)
