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

The numbers themselves are a hash of their index and a seed tensor. No generator state is read or moved. All of it is
arithmetic on 32-bit words in int64, with multipliers below 2^31: no product reaches 2^63, because signed overflow is
undefined in the C++ that compilers emit.

Values share tables, but no two of them the same stretch: columns have stretches of their own, those of rows may overlap.
Compilers fuse kernels that read the very same memory, and would put off the encoding of every layer until the last one.
A stretch is a view in another dtype than its table's, which Inductor hands to kernels as a buffer of its own. So kernels
of layers that are alike have the same code, and are compiled once; an offset would be a constant in each.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFF_FFFF
_SHIFTS = (16, 15, 16)
_MULTIPLIERS = ((0x7FEB352D, 0x5C6BF5A7, 0x68E31DA5), (0x6C8E9CF5, 0x7A3D70A5, 0x53C5E9B7))
# A stretch begins at a multiple of so many numbers: kernels count on buffers that begin at a multiple of 16 bytes.
STRETCH_ALIGNMENT = 4
_ODD = 0x3F  # m is twice those bits plus one, below 2^7


def row_numbers(count: int, seed: Tensor) -> Tensor:
    """m + a for each row: the whole part is the multiplier, the fraction the offset.

    Args:
        count: how many, below 2^31; may be symbolic. More of them begin with the same ones.
        seed: int64 scalar of random bits, others in every step (`prac_fx.runtime.rounding_seed.step_number`).

    Returns:
        Multiples of 2^-16 plus 2^-17, float32, shape (count,).
    """
    words = _hash(count, seed, 0)
    multiplier = ((words & _ODD) << 17) + 0x1_0000
    return _written_down((multiplier + (words >> 16)).to(torch.float32) * 2.0**-16 + 2.0**-17)


def column_numbers(count: int, seed: Tensor) -> Tensor:
    """b for each column; arguments as for `row_numbers`.

    Returns:
        Multiples of 2^-16 in [0, 1), float32, shape (count,).
    """
    return _written_down((_hash(count, seed, 1) >> 16).to(torch.float32) * 2.0**-16)


def as_table(numbers: Tensor) -> Tensor:
    """An even count of `row_numbers` or `column_numbers` to take stretches of: int64, shape (count / 2,)."""
    return numbers.view(torch.int64)


def stretch(table: Tensor, start: int, count: int) -> Tensor:
    """Numbers of a table from `start`, a multiple of `STRETCH_ALIGNMENT`: float32, shape (count,)."""
    words = table[start // 2 : (start + count + 1) // 2]
    return words.view(torch.float32)[:count]


def aligned(count: int) -> int:
    """The next multiple of `STRETCH_ALIGNMENT`."""
    return -(-count // STRETCH_ALIGNMENT) * STRETCH_ALIGNMENT


def uniform(rows: Tensor, columns: Tensor) -> Tensor:
    """u for each element, in (0, 1): 2^16 different numbers with mean 1/2.

    Args:
        rows: `row_numbers`, in a shape that broadcasts against `columns`.
        columns: `column_numbers`.

    Returns:
        float32.
    """
    multiplier = rows.floor()
    total = (rows - multiplier) + multiplier * columns  # exact: a multiple of 2^-17 below 2^7
    return total - total.floor()


def _written_down(numbers: Tensor) -> Tensor:
    """A strided view needs memory to look at, so compilers store the table instead of hashing for each element."""
    return numbers.as_strided(numbers.shape, (1,))


def _hash(count: int, seed: Tensor, table: int) -> Tensor:
    """A 32-bit word for each index: a bijection, keyed by seed and table (xor-shift and multiply, as in MurmurHash3)."""
    index = torch.arange(count, dtype=torch.int64, device=seed.device)
    words = index ^ ((seed ^ table) & _MASK)
    key = (seed >> 31) & _MASK
    for number, (shift, multiplier) in enumerate(zip(_SHIFTS, _MULTIPLIERS[table], strict=True)):
        words = ((words ^ (words >> shift)) * multiplier) & _MASK
        if not number:
            words = words ^ key
    return words ^ (words >> 16)
