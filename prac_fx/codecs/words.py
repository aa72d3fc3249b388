"""Codes of 4 or 8 bits in words of 8 or 32 bits.

On a CPU words have 32 bits, because Inductor's C++ reads those at full speed and nothing smaller
(see `_read_as_floats`).

On a GPU words are bytes. A kernel that reduces a group to its scale can then write the codes of the
group, too, with a thread for each element. Words of four codes would take a kernel of their own,
and a float32 copy of the value between the two kernels.

Layout: codes c_0 .. c_(p - 1) share a word, with p = word bits / bits, and c_0 has the lowest bits.
Which codes share a word is the caller's choice. It takes those that lie g / p apart, so that each
p-th of a group is read in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

WordBits = Literal[8, 32]


def word_bits_on(device: torch.device) -> WordBits:
    """Bits of the words that compiled code for a device handles best."""
    return 32 if device.type == "cpu" else 8


def packed(codes: Tensor, bits: int, dim: int) -> Tensor:
    """Words of 32 bits.

    Args:
        codes: whole numbers in [0, 2^bits), float32 or float64.
        bits: 4 or 8.
        dim: negative; the dimension of the place in the word, p long. The result is without it.

    Returns:
        int32.
    """
    half = 16
    parts = split(codes, dim, (2, half // bits))
    # codes of half a word are summed as floats, which is exact and cheaper than to convert each
    weights = (1 << _places(half, bits, dim, codes.device)).to(codes.dtype)
    halves = (parts * weights).sum(dim).to(torch.int32)
    return (halves << _places(32, half, dim, codes.device)).sum(dim, dtype=torch.int32)


def packed_bytes(codes: Sequence[Tensor], bits: int) -> Tensor:
    """Words of 8 bits.

    Args:
        codes: p tensors, by place in the word, of whole numbers in [0, 2^bits), int32 or floats.
        bits: 4 or 8.

    Returns:
        uint8, in the shape of each of `codes`.
    """
    byte, *others = codes
    for place, higher in enumerate(others, start=1):
        byte = byte + higher * (1 << (bits * place))
    return byte.to(torch.uint8)


def unpacked(words: Tensor, bits: int, dim: int) -> Tensor:
    """The codes of words.

    Args:
        words: what `packed` returned.
        bits: the same.
        dim: negative; before this dimension a new one is inserted, of the place in the word, p
            long.

    Returns:
        int32, in [0, 2^bits).
    """
    word_bits = 8 * words.itemsize
    whole = _read_as_floats(words) if word_bits == 32 else words.to(torch.int32)
    whole = whole.unsqueeze(dim - 1)
    if bits == word_bits:
        return whole
    codes: Tensor = (whole >> _places(word_bits, bits, dim - 1, words.device)) & ((1 << bits) - 1)
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

    Inductor's C++ copies each vector of integers through a buffer (`Vectorized<int>::loadu` with a
    count). That costs eight times as much as the rest of a decode. It loads vectors of floats
    directly. A view as bytes comes in between, and shapes between the views. Without them torch
    would see that the two views as words cancel.
    """
    if words.device.type != "cpu":
        return words
    as_bytes = words.contiguous().view(torch.uint8)
    as_floats = as_bytes.view(-1).view(torch.float32)
    return as_floats.view(words.shape).view(torch.int32)
