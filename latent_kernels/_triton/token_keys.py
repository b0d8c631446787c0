"""Keys that order tokens by value, lower id first: int64, the value's height above the complement of the id.

The height of a float32 is an int32 in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST, HIGHEST = tl.constexpr(-(2**63)), tl.constexpr(2**63 - 1)  # below and above the key of any token
ABSENT = tl.constexpr(-(2**31))  # below the height of any value
ID_MASK = tl.constexpr(0x7FFFFFFF)


@triton.jit
def sortable(value):
    """Map float32 values to int32 in the same order: 0 and -0 are equal, and every NaN is the highest.

    The maximum of a group may be a NaN with other bits than those of its elements. If the two compared as different,
    a group could lie above the row's highest token.
    """
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    bits = tl.where(value == value, bits, 0x7FFFFFFF)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def token_key(value, ids):
    """Return an int64 key that orders tokens by value, lower id first."""
    return (sortable(value).to(tl.int64) << 32) | (ids ^ ID_MASK).to(tl.int64)


@triton.jit
def height_value(height):
    """Return the value of which `height` is the sortable form."""
    return (height ^ ((height >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def key_value(key):
    """Return the value of a key."""
    return height_value((key >> 32).to(tl.int32))


@triton.jit
def key_id(key):
    """Return the id of a key."""
    return (key & ID_MASK).to(tl.int32) ^ ID_MASK


@triton.jit
def frontier_at(value):
    """Return a key just below the keys of all tokens at `value` or above it, with a margin for rounding."""
    return sortable(value - 1e-3 - 1e-5 * tl.abs(value)).to(tl.int64) << 32
