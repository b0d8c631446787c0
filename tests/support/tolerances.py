"""Every numerical tolerance of the test suite, with its reason."""

from __future__ import annotations

import torch

# The released code ran in float32, and an independent float64 evaluation agrees with its outputs to 3e-6.
GOLDEN_VALUE = 1e-5
GOLDEN_GRADIENT = 1e-5
# The stored scores of rows 4-7 of case c0 differ from the float64 formula by up to 2.9e-5, all others by 1e-6. That
# is an error of the released sampler's float32. The weights and embeddings of the rows hold to GOLDEN_VALUE.
GOLDEN_DRIFTED_SCORES = 3e-5

# A log-prob of size 10 to 30 carries a float32 rounding error of 1e-6 to 2e-6. The sum over the vocabulary adds a few.
STEP_SCORES = 1e-5
# Weights are in [0, 1] and their exponents carry STEP_SCORES.
STEP_WEIGHTS = 1e-5
# A sum of K rounded weights in [0, 1].
WEIGHT_SUM = 1e-6
# Products and sums are in float32. The last rounding to the table's dtype may fall either way, which is one unit in the
# last place relative to the size of the embedding.
EMBEDDING = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
# Adding a constant of up to 50 to logits of size 10 rounds them by 4e-6 each.
SHIFTED_LOGITS = 3e-5

# Float64 against float64: a few hundred roundings of 1e-16 on values up to 1e3.
FLOAT64 = 1e-10
# The same sums in float32 taken in another order: chunks, or all rows at once.
REORDERED = 1e-5
# Results and statistics that are computed and returned in float32, compared with float64.
FLOAT32 = 1e-5
EXACT = {torch.float64: FLOAT64, torch.float32: FLOAT32}  # by the dtype that an operator computes in
# Central differences with a step of 1e-6: roundings of 1e-16 on values of about 10, over twice the step, and the square
# of the step.
FINITE_DIFFERENCE = 1e-7

# Parameters after one update at a learning rate of 1e-4 whose gradients differ by roundings. Where a gradient is near
# zero, Adam's quotient magnifies the roundings to up to a tenth of the update.
TRAINING_STEP = 1e-5
# Distance between the parameters after a few such updates, divided by the distance that they moved.
SEVERAL_UPDATES = 1e-2

# An operator's error against float64 may be this many times the least error of a composition of PyTorch operations.
# The composition rounds logits and their gradient to the dtype ...
ERROR_FACTOR = 2.0
# ... plus a floor of a few roundings, for cases where the composition happens to be exact. The floor is relative to the
# largest value, or to 1: log-probs of that size are subtracted on the way.
ERROR_FLOOR = {torch.float32: 2.0**-21, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}

# The statistic of a sampler must stay under its 99.9% quantile. Seeds are fixed, so a pass is a pass forever.
CHI_SQUARED_Z = 3.09


def chi_squared_bound(degrees: int) -> float:
    """Return the 99.9% quantile of the chi-squared distribution.

    The formula is Wilson-Hilferty's, accurate to 1% from 3 degrees of freedom on.
    """
    spread = 2.0 / (9.0 * degrees)
    return degrees * (1.0 - spread + CHI_SQUARED_Z * spread**0.5) ** 3


# Predicted and measured peak memory of training differ by temporaries of one operation and by the allocator's reserve.
MEMORY_PLAN = 0.15

# Twenty decoding steps of a float32 model in batches of other sizes, whose products round differently.
ANOTHER_BATCH = 1e-3
