"""Uniform numbers for stochastic rounding, out of a few numbers for each row and each column of a value.

The element at (row, column) rounds with u = frac(a[row] + m[row] b[column]): a and b are uniform on the multiples of
2^-16, m is odd. A rotation modulo 1 (Cranley and Patterson 1976), by another step in each row. What that gives:

- u is exactly uniform, also given all numbers of all other sites, which may share a and m: b[column] alone makes it
  so, because multiplying with an odd number permutes the grid. So what is rounded has the right mean, whatever it is
  multiplied with.
- Any two elements of a value are independent, and so are all elements of a row and all elements of a column. So any
  weighted sum of rounding errors has the variance of independent roundings, and each element of a weight gradient
  X^T dY, a sum down a column, has their whole distribution.
- m keeps two columns from having the same phase difference in all rows: otherwise errors of values that are much the
  same everywhere would be matrices of low rank.

An element costs a few float operations, where a hash of its own would cost some twenty integer ones, in kernels that
are otherwise a handful of instructions.

The numbers themselves are a hash of their index, a seed tensor and a salt: a Feistel network on two 16-bit words. No
generator state is read or moved. All of it is int32 arithmetic on words of 16 bits with multipliers below 2^15: no
product or sum reaches 2^31, because signed overflow is undefined in the C++ that compilers emit.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFF
_SEED_MULTIPLIERS = (0x6C8F, 0x5A2D, 0x7931, 0x4B75)
_INDEX_MULTIPLIERS = (0x7A35, 0x52D9, 0x6E4B, 0x6193)  # run through twice
_MULTIPLIER_BITS = 0x3F  # m = 2 bits + 1 is below 2^7


def row_numbers(count: int, seed: Tensor) -> Tensor:
    """m + a for each row: the whole part is the multiplier, the fraction the offset.

    Args:
        count: how many, below 2^31; may be symbolic. More of them begin with the same ones.
        seed: int64 scalar, changes with every step; its low 32 bits count.

    Returns:
        Multiples of 2^-16 plus 2^-17, float32, shape (count,).
    """
    low, high = _hash(count, seed, salt=0)
    multiplier = (low & _MULTIPLIER_BITS) * 2 + 1
    return _written_down(high.to(torch.float32) * 2.0**-16 + 2.0**-17 + multiplier)


def column_numbers(count: int, seed: Tensor) -> Tensor:
    """b for each column; arguments as for `row_numbers`.

    Returns:
        Multiples of 2^-16 in [0, 1), float32, shape (count,).
    """
    _, high = _hash(count, seed, salt=1)
    return _written_down(high.to(torch.float32) * 2.0**-16)


def uniform(rows: Tensor, columns: Tensor) -> Tensor:
    """u for each element, in (0, 1): 2^16 different numbers with mean 1/2.

    Args:
        rows: `row_numbers`, in a shape that broadcasts against `columns`.
        columns: `column_numbers`, likewise.

    Returns:
        float32.
    """
    multiplier = rows.floor()
    total = (rows - multiplier) + multiplier * columns  # exact: a multiple of 2^-17 below 2^7
    return total - total.floor()


def _written_down(numbers: Tensor) -> Tensor:
    """A strided view needs memory to look at, so compilers store the table instead of hashing for each element."""
    return numbers.as_strided(numbers.shape, (1,))


def _hash(count: int, seed: Tensor, salt: int) -> tuple[Tensor, Tensor]:
    """Two 16-bit words for each of `count` indices, int32: a bijection of the index, keyed by seed and salt."""
    words = _seed_words(seed, salt)
    index = torch.arange(count, dtype=torch.int32, device=seed.device)
    low, high = (index & _WORD) ^ words[0], (index >> 16) ^ words[1]
    for multiplier, word in zip(_INDEX_MULTIPLIERS * 2, words + words[::-1], strict=True):
        low, high = _feistel(low, high, multiplier, word)
    return low, high


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


def _feistel(
    low: Tensor, high: Tensor, multiplier: int, word: Tensor | int
) -> tuple[Tensor, Tensor]:
    """One round: a bijection of (low, high), which stay 16-bit words."""
    # the middle of the product: its ends depend on few bits
    return high ^ (((low * multiplier + word) >> 8) & _WORD), low
