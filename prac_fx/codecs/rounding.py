"""Uniform numbers for stochastic rounding, from a few numbers for each row and column of a value.

The element at (row, column) rounds with u = frac(a[row] + m[row] b[column]). Here a and b are
uniform on the multiples of 2^-16, and m is odd. This is a rotation modulo 1 (Cranley and Patterson
1976), by another step in each row. It has these properties:

- u is exactly uniform, also given all other numbers. b[column] alone makes it so, because a product
  with an odd number permutes the grid. So what is rounded has the right mean, whatever it is
  multiplied with.
- Any two elements of a value are independent. So are all elements of a row, and all elements of a
  column. So any weighted sum of rounding errors has the variance of independent roundings. Each
  element of a weight gradient X^T dY is a sum down a column, and has their whole distribution.
- m keeps two columns from having the same phase difference in all rows. Otherwise the errors of
  values that are much the same everywhere would be matrices of low rank.

An element costs a few float operations. A hash for each element would cost some twenty integer
operations, in kernels that are otherwise a handful of instructions.

The numbers themselves are a hash of their index and a seed tensor. No generator state is read or
moved. All of it is arithmetic on 32-bit words in int64, with multipliers below 2^31. No product
reaches 2^63, because signed overflow is undefined in the C++ that compilers emit.

Values share tables, but no two values have the same stretch. Columns have stretches of their own,
and stretches of rows may overlap. Compilers fuse kernels that read the very same memory. They would
put off the encoding of every layer until that of the last layer.

A stretch is a view in another dtype than its table's, which Inductor hands to kernels as a buffer
of its own. So kernels of layers that are alike have the same code, and are compiled once. An offset
would be a constant in each kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prac_fx.codecs.evaluated_once import mixed, rotated

_MASK = 0xFFFF_FFFF
_SHIFTS = (16, 15, 16)
_MULTIPLIERS = ((0x7FEB352D, 0x5C6BF5A7, 0x68E31DA5), (0x6C8E9CF5, 0x7A3D70A5, 0x53C5E9B7))
# A stretch begins at a multiple of this many numbers: kernels count on buffers that begin at a
# multiple of 16 bytes.
STRETCH_ALIGNMENT = 4
_ODD = 0x3F  # m is twice these bits plus 1, below 2^7


def row_numbers(count: int, seed: Tensor) -> Tensor:
    """m + a for each row: the whole part is the multiplier, the fraction the offset.

    Args:
        count: how many, below 2^31; may be symbolic. A larger count begins with the same numbers.
        seed: int64 scalar of random bits, which differ in every step
            (`prac_fx.runtime.rounding_seed.step_number`); for many seeds of shape (seeds, 1).

    Returns:
        Multiples of 2^-16 plus 2^-17, float32, shape (count,) or (seeds, count).
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
    """`row_numbers` or `column_numbers`, an even count, as a table: int64, shape (count / 2,)."""
    return numbers.view(torch.int64)


def aligned(count: int) -> int:
    """The next multiple of `STRETCH_ALIGNMENT`."""
    return -(-count // STRETCH_ALIGNMENT) * STRETCH_ALIGNMENT


def uniform(rows: Tensor, columns: Tensor) -> Tensor:
    """u for each element, in (0, 1): one of 2^16 numbers, with mean 1/2.

    Args:
        rows: `row_numbers`, in a shape that broadcasts against `columns`.
        columns: `column_numbers`.

    Returns:
        float32.
    """
    return rotated(rows, columns)  # exact: all sums are multiples of 2^-17 below 2^7


def _written_down(numbers: Tensor) -> Tensor:
    """Have compilers store the table: a strided view needs memory to look at.

    Otherwise they would compute the hash anew for each element.
    """
    return numbers.as_strided(numbers.shape, numbers.stride())


def _hash(count: int, seed: Tensor, table: int) -> Tensor:
    """A 32-bit word for each index: a bijection with seed and table as its key.

    It shifts, xors and multiplies, as MurmurHash3 does.
    """
    index = torch.arange(count, dtype=torch.int64, device=seed.device)
    words = index ^ ((seed ^ table) & _MASK)
    key = (seed >> 31) & _MASK
    for number, (shift, multiplier) in enumerate(zip(_SHIFTS, _MULTIPLIERS[table], strict=True)):
        words = mixed(words, shift, multiplier, _MASK)
        if not number:
            words = words ^ key
    return mixed(words, 16, 1, _MASK)
