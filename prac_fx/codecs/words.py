"""Codes of 4 or 8 bits in 32-bit words.

Words because compilers move them well: a GPU stores four bytes at a time, and Inductor's C++ reads them at full speed,
which it does with nothing smaller (see `_read_as_floats`).

Layout: of codes c_0 .. c_(p - 1) that share a word, p = 32 / bits, c_0 has the lowest bits. Which codes share one is
the caller's choice; it takes those that lie g / p apart, so that each p-th of a group is read in order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WORD_BITS = 32


def packed(codes: Sequence[Tensor], bits: int) -> Tensor:
    """Words of codes.

    Args:
        codes: p tensors of one shape, whole numbers in [0, 2^bits), float32 or float64.
        bits: 4 or 8.

    Returns:
        int32, the shape of one of them.
    """
    middle = len(codes) // 2
    low, high = (_sixteen_bits(half, bits) for half in (codes[:middle], codes[middle:]))
    return low | (high << (WORD_BITS // 2))


def unpacked(words: Tensor, bits: int, dim: int) -> Tensor:
    """The codes of words.

    Args:
        words: what `packed` returned.
        bits: the same.
        dim: negative; a dimension of p, the place in the word, is inserted before this one.

    Returns:
        int32, in [0, 2^bits).
    """
    shifts = torch.arange(0, WORD_BITS, bits, dtype=torch.int32, device=words.device)
    shifts = shifts.view(-1, *[1] * -dim)
    codes: Tensor = (_read_as_floats(words).unsqueeze(dim - 1) >> shifts) & ((1 << bits) - 1)
    return codes


def _sixteen_bits(codes: Sequence[Tensor], bits: int) -> Tensor:
    """Put together as floats, which is exact and cheaper than converting each code."""
    total = codes[-1]
    for code in reversed(codes[:-1]):
        total = total * float(1 << bits) + code
    return total.to(torch.int32)


def _read_as_floats(words: Tensor) -> Tensor:
    """The same words, which compiled code for a CPU loads as float32.

    Inductor's C++ copies each vector of integers through a buffer (`Vectorized<int>::loadu` with a count), which costs
    eight times as much as the rest of a decode; vectors of floats it loads directly. A view as bytes comes in between,
    and shapes between the views, or torch would see that the two views as words cancel.
    """
    if words.device.type != "cpu":
        return words
    as_bytes = words.contiguous().view(torch.uint8)
    as_floats = as_bytes.view(-1).view(torch.float32)
    return as_floats.view(words.shape).view(torch.int32)
