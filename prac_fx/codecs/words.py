"""Codes of 4 or 8 bits in 32-bit words.

Words because compilers move them well: a GPU stores four bytes at a time, and Inductor's C++ reads them at full speed,
which it does with nothing smaller (see `_read_as_floats`).

Layout: of codes c_0 .. c_(p - 1) that share a word, p = 32 / bits, c_0 has the lowest bits. Which codes share one is
the caller's choice; it takes those that lie g / p apart, so that each p-th of a group is read in order.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BITS = 32


def packed(codes: Tensor, bits: int, dim: int) -> Tensor:
    """Words of codes.

    Args:
        codes: whole numbers in [0, 2^bits), float32 or float64.
        bits: 4 or 8.
        dim: negative; the dimension of p, the place in the word, which is left out of the result.

    Returns:
        int32.
    """
    half = WORD_BITS // 2
    parts = split(codes, dim, (2, half // bits))
    # codes of half a word are put together as floats, which is exact and cheaper than converting each
    weights = (1 << _places(half, bits, dim, codes.device)).to(codes.dtype)
    halves = (parts * weights).sum(dim).to(torch.int32)
    return (halves << _places(WORD_BITS, half, dim, codes.device)).sum(dim, dtype=torch.int32)


def unpacked(words: Tensor, bits: int, dim: int) -> Tensor:
    """The codes of words.

    Args:
        words: what `packed` returned.
        bits: the same.
        dim: negative; a dimension of p, the place in the word, is inserted before this one.

    Returns:
        int32, in [0, 2^bits).
    """
    shifts = _places(WORD_BITS, bits, dim - 1, words.device)
    codes: Tensor = (_read_as_floats(words).unsqueeze(dim - 1) >> shifts) & ((1 << bits) - 1)
    return codes


def split(x: Tensor, dim: int, sizes: tuple[int, ...]) -> Tensor:
    """A view with `sizes` in the place of dimension `dim`, which is negative."""
    at = x.dim() + dim
    return x.view(*x.shape[:at], *sizes, *x.shape[at + 1 :])


def _places(stop: int, step: int, dim: int, device: torch.device) -> Tensor:
    """0, step, ... below `stop`, along dimension `dim`, which is negative."""
    numbers = torch.arange(0, stop, step, dtype=torch.int32, device=device)
    return numbers.view(-1, *[1] * (-1 - dim))


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
