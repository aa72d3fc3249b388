"""Uniform numbers for stochastic rounding, out of a few numbers for each row and each column of a value.

The element at (row, column) rounds with u = frac(a[row] + m[row] b[column]): a and b are uniform on the multiples of
2^-16, m is odd. A rotation modulo 1 (Cranley and Patterson 1976), by another step in each row. What that gives:

- u is exactly uniform, also given all other numbers: b[column] alone makes it so, because multiplying with an odd
  number permutes the grid. So what is rounded has the right mean, whatever it is multiplied with.
- Any two elements of a value are independent, and so are all elements of a row and all elements of a column. So any
  weighted sum of rounding errors has the variance of independent roundings, and each element of a weight gradient
  X^T dY, a sum down a column, has their whole distribution.
- m keeps two columns from having the same phase difference in all rows: otherwise errors of values that are much the
  same everywhere would be matrices of low rank.

An element costs a few float operations, where a hash of its own would cost some twenty integer ones, in kernels that
are otherwise a handful of instructions.

The numbers themselves are a hash of their index, a seed tensor and a salt. No generator state is read or moved. Each
value has a table of its own: compilers fuse kernels that read the same memory, and would put off the encoding of every
layer until that of the last one. All of it is arithmetic on 32-bit words in int64, with multipliers below 2^31: no
product reaches 2^63, because signed overflow is undefined in the C++ that compilers emit.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFF_FFFF
_SHIFTS = (16, 15, 16)
_MULTIPLIERS = (0x7FEB352D, 0x5C6BF5A7, 0x68E31DA5)
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio
_ODD = 0x3F  # m is twice those bits plus one, below 2^7


def rounding_table(rows: int, columns: int, seed: Tensor, salt: int = 0) -> tuple[Tensor, Tensor]:
    """What the elements of one value round with.

    Args:
        rows: of the value; may be symbolic. Rows and columns together are below 2^32.
        columns: of the value.
        seed: int64 scalar of random bits, others in every step (`prac_fx.rounding_state.step_number`).
        salt: tells values with the same seed apart.

    Returns:
        m + a for each row, the whole part being the multiplier and the fraction the offset, a multiple of 2^-16 plus 2^-17;
        and b for each column, a multiple of 2^-16 in [0, 1). Both float32.
    """
    # the columns come first, so that those of a value do not depend on how many rows it has
    index = torch.arange(columns + rows, dtype=torch.int64, device=seed.device)
    words = _hash(index, seed, salt)
    fraction = (words >> 16).to(torch.float32)
    multiplier = (((words & _ODD) << 17) + 0x1_0000).to(torch.float32)
    numbers = torch.where(index < columns, fraction, fraction + multiplier + 0.5)
    # a strided view needs memory to look at, so compilers store the table instead of hashing for each element
    table = (numbers * 2.0**-16).as_strided((columns + rows,), (1,))
    return table[columns:], table[:columns]


def uniform(rows: Tensor, columns: Tensor) -> Tensor:
    """u for each element, in (0, 1): 2^16 different numbers with mean 1/2.

    Args:
        rows: of a `rounding_table`, in a shape that broadcasts against `columns`.
        columns: of it, too.

    Returns:
        float32.
    """
    multiplier = rows.floor()
    total = (rows - multiplier) + multiplier * columns  # exact: a multiple of 2^-17 below 2^7
    return total - total.floor()


def _hash(index: Tensor, seed: Tensor, salt: int) -> Tensor:
    """A 32-bit word for each index: a bijection, keyed by seed and salt (xor-shift and multiply, as in MurmurHash3)."""
    mixed = _mixed(salt)
    words = index ^ ((seed ^ mixed) & _MASK)
    key = ((seed >> 31) ^ (mixed >> 32)) & _MASK
    for number, (shift, multiplier) in enumerate(zip(_SHIFTS, _MULTIPLIERS, strict=True)):
        words = ((words ^ (words >> shift)) * multiplier) & _MASK
        if not number:
            words = words ^ key
    return words ^ (words >> 16)


def _mixed(salt: int) -> int:
    """63 bits of a Python number (SplitMix64; Steele, Lea, Flood 2014)."""
    mask = (1 << 64) - 1
    mixed = (salt + 1) * _GOLDEN & mask
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 & mask
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & mask
    return (mixed ^ (mixed >> 31)) >> 1
