"""The seeds that a run derives from its option `seed`: of rollouts, shuffles and the global random streams."""

from __future__ import annotations

EVENTS = 2**31  # counters per seed: below it, no two runs with different seeds derive the same seed
LIMIT = 2**63  # seeds are int64 tensors in the kernels


def derive_seed(seed: int, count: int, epoch: int = 0, epochs: int = 1) -> int:
    """Return the seed in [0, 2^63) of event number `count` of a run, or of one of its `epochs` epochs.

    seed: the option, in [0, 2^32). count: a counter of the run, below 2^31 (rollouts, steps, passes over the data).
    epoch: a number below `epochs`, where one event needs `epochs` seeds.
    """
    # The product has up to 63 bits. More than one epoch can take it past 64 bits, which no generator accepts.
    return ((seed * EVENTS + count) * epochs + epoch) % LIMIT


def shuffle_seed(seed: int) -> int:
    """Return the seed in [0, 2^32) of a PyTorch generator on the CPU, which reads only 32 bits of what it is given.

    seed: in [0, 2^63), of `derive_seed`. A seed below 2^32 is kept.
    """
    high, low = divmod(seed, 2**32)
    return low ^ (high * 0x9E3779B1 % 2**32)  # an odd factor: different high bits give different products


def rank_seed(seed: int, rank: int) -> int:
    """Return the seed in [0, 2^32) of the global random streams of a rank, from which rewards and dropout may draw."""
    # NumPy accepts 32 bits, which `seed` may fill.
    return (seed + rank) % 2**32
