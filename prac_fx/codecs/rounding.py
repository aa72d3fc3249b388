"""Uniform numbers for stochastic rounding, as plain index arithmetic.

Every element of a value gets a number that depends on its row, its column, a seed tensor and a salt, and on
nothing else: no generator state is read or moved, and a compiler can fuse the arithmetic into the kernel that
rounds. In two steps, since a row is shared by many elements:

1. `row_key`: a keyed Feistel network on two 16-bit words, once for each row. It gives (step, offset).
2. `uniform`: v = step * column / 2^6 + offset mod 2^16, then two rounds of xor-shift and multiply, for each element.
   The column is mixed in once more, for the few rows whose step is so small that v repeats.

Step 2 is a bijection of `offset`, so each number is exactly uniform over the keys; `step` has more bits than v, so
two columns of a row are independent but for its rounding (multiply-shift hashing, Dietzfelbinger 1996), and the
xor-shifts break the arithmetic progression that is left within a row.

All of it is int32 arithmetic on words of 16 bits with multipliers below 2^15: no product or sum reaches 2^31,
because signed overflow is undefined in the C++ that compilers emit.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFF
_STEP = (1 << 22) - 1
_EXTRA_BITS = 6  # of a step, more than 16: as many as columns of a row have in common
_COLUMN_BITS = 9  # times a step, this is below 2^31
_STEP_MULTIPLIER = 0x5F17
_SEED_MULTIPLIERS = (0x6C8F, 0x5A2D, 0x7931, 0x4B75)
_ROW_MULTIPLIERS = (0x7A35, 0x52D9, 0x6E4B, 0x6193)
_SCRAMBLE = (0x5D2B, 0x6CB5)

Key = tuple[Tensor, Tensor]


def row_index(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Consecutive numbers in the given shape, int32. Sizes may be symbolic; fewer than 2^31 rows."""
    count = 1
    for size in shape:
        count = count * size
    return torch.arange(count, dtype=torch.int32, device=device).view(shape)


def row_key(rows: Tensor, seed: Tensor, salt: int) -> Key:
    """What the elements of one row share.

    Args:
        rows: number of the row, int32, not negative.
        seed: int64 scalar, changes with every step; its low 32 bits count.
        salt: differs between the values of one step.

    Returns:
        A step of 22 bits and an offset of 16 bits, int32, shape of `rows`.
    """
    words = _seed_words(seed, salt)
    low, high = (rows & _WORD) ^ words[0], (rows >> 16) ^ words[1]
    for multiplier, word in zip(_ROW_MULTIPLIERS, words, strict=True):
        low, high = _feistel(low, high, multiplier, word)
    return _step(low), high


def uniform(key: Key, columns: range, trailing: int = 0) -> Tensor:
    """Numbers in (0, 1), 2^16 different ones with mean 1/2.

    Args:
        key: what `row_key` returned, shape (..., 1) or (..., 1, m).
        columns: consecutive columns of the row, c of them. Cheapest while their numbers are below 512.
        trailing: dimensions of the key behind that of the columns.

    Returns:
        float32, shape (..., c) or (..., c, m).
    """
    step, offset = key
    column = torch.arange(columns.start, columns.stop, dtype=torch.int32, device=step.device)
    column = column.view(-1, *[1] * trailing)
    if columns.stop > 1 << _COLUMN_BITS:
        step, offset = _far_key(step, offset, column >> _COLUMN_BITS)
        column = column & ((1 << _COLUMN_BITS) - 1)
    bits = (((step * column) >> _EXTRA_BITS) + offset) & _WORD
    bits = ((bits ^ (bits >> 8) ^ column) * _SCRAMBLE[0]) & _WORD
    bits = ((bits ^ (bits >> 7)) * _SCRAMBLE[1]) & _WORD
    return bits.to(torch.float32) * 2.0**-16 + 2.0**-17


def _seed_words(seed: Tensor, salt: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 16-bit words, int32 scalars, in which every bit of seed and salt counts."""
    low, high = (seed & _WORD).to(torch.int32), ((seed >> 16) & _WORD).to(torch.int32)
    words = []
    for multiplier, word in zip(_SEED_MULTIPLIERS, _salt_words(salt), strict=True):
        low, high = _feistel(low, high, multiplier, word)
        words.append(low)
    return words[0], words[1], words[2], words[3]


def _salt_words(salt: int) -> tuple[int, int, int, int]:
    """Four 16-bit words out of a Python number (the finaliser of splitmix64)."""
    mask = (1 << 64) - 1
    mixed = (salt + 1) * 0x9E3779B97F4A7C15 & mask
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 & mask
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & mask
    mixed ^= mixed >> 31
    return mixed & _WORD, mixed >> 16 & _WORD, mixed >> 32 & _WORD, mixed >> 48


def _feistel(low: Tensor, high: Tensor, multiplier: int, word: Tensor | int) -> Key:
    """One round: a bijection of (low, high), which stay 16-bit words."""
    # the middle of the product: its ends depend on few bits
    return high ^ (((low * multiplier + word) >> 8) & _WORD), low


def _step(word: Tensor) -> Tensor:
    """22 bits out of 16, such that the upper and the lower 16 take (nearly) all values."""
    return (word * _STEP_MULTIPLIER) & _STEP


def _far_key(step: Tensor, offset: Tensor, block: Tensor) -> Key:
    """The key of another stretch of columns. Its cost falls on each element, but only of very long rows."""
    low, high = (step & _WORD) ^ (block & _WORD), offset ^ (block >> 16)
    for multiplier in _ROW_MULTIPLIERS:
        low, high = _feistel(low, high, multiplier, 0x3C6F)
    return _step(low), high
