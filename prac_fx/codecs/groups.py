"""How many elements share a scale: the size of groups that compiled code handles fast.

Letters: n features, g elements of a group, p codes in a word (`words`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from prac_fx.codecs.words import WordBits

_VECTORS = (16, 8)  # how many words of 32 bits CPUs read at once (AVX-512, AVX2)
# strides from which on Inductor pads rows on a GPU, and to which multiple (of bytes)
_PADDED_FROM, _PADDED_TO = 1024, 128


def group_size(features: int, group: int, bits: int, word_bits: WordBits) -> int:
    """g, a multiple of p up to `group`.

    It is the first of these that there is:

    1. on a CPU, the largest fast size that divides n, down to a quarter of `group`;
    2. the fast size that takes fewest bytes, with up to a sixteenth of padding;
    3. the largest divisor of n, down to half of `group`;
    4. the size that makes groups as equal as can be.

    Where some sizes are faster than others, 1 and 2 try the faster sizes first.

    Args:
        features: n.
        group: at most this many elements share a scale; at least p.
        bits: of a code.
        word_bits: of the words that codes are packed in, which tells a CPU from a GPU.
    """
    unit, most = word_bits // bits, min(group, features)
    on_cpu = word_bits == 32
    fast = _on_a_cpu if on_cpu else _on_a_gpu
    found = fast(features, group, bits, unit)
    if found:
        return found
    divisors = [g for g in range(unit, most + 1, unit) if features % g == 0 and 2 * g > most]
    if divisors:
        return divisors[-1]
    groups = math.ceil(features / (group // unit * unit))
    return _round_up(math.ceil(features / groups), unit)


def _on_a_cpu(n: int, group: int, bits: int, unit: int) -> int:
    """Rules 1 and 2 for words of 32 bits, which are read in whole vectors; 0 for no such size."""
    for count in _VECTORS:
        sizes = list(range(unit * count, group + 1, unit * count))
        whole = [g for g in sizes if n % g == 0 and 4 * g >= min(group, n)]
        if whole:
            return whole[-1]
        little = _with_little_padding(n, sizes)
        if little:
            # no key: Dynamo traces this
            fewest = min([_row_nbytes(n, g, bits) for g in little])
            return next(g for g in little if _row_nbytes(n, g, bits) == fewest)
    return 0


def _on_a_gpu(n: int, group: int, bits: int, unit: int) -> int:
    """Rule 2 for bytes: fewest bytes, or up to a sixteenth more for a power of two; 0 for none.

    Each thread has a word. The threads are a power of two, and most should have work. Groups that
    begin at a multiple of their own size are read and written in whole sectors: encoding groups of
    119 took 2.4 times as long on an H200.
    """
    least = max(1, min(group, n) // (4 * unit))
    words = [w for w in range(least, group // unit + 1) if 8 * w >= 5 * _threads(w)]
    sizes = _with_little_padding(n, [unit * count for count in words])
    if not sizes:
        return 0
    fewest = min([_padded_nbytes(n, g, bits) for g in sizes])
    aligned = [
        g
        for g in sizes
        if g & (g - 1) == 0 and 16 * (_padded_nbytes(n, g, bits) - fewest) <= fewest
    ]
    best = min([_padded_nbytes(n, g, bits) for g in aligned or sizes])
    return [g for g in aligned or sizes if _padded_nbytes(n, g, bits) == best][-1]


def _threads(words: int) -> int:
    return 1 << (words - 1).bit_length()


def _with_little_padding(n: int, sizes: Sequence[int]) -> list[int]:
    return [g for g in sizes if 16 * (_round_up(n, g) - n) <= n]


def _row_nbytes(n: int, size: int, bits: int) -> int:
    """Bytes of a row in groups of this size, with scales of float32."""
    return math.ceil(n / size) * (size * bits // 8 + 4)


def _padded_nbytes(n: int, size: int, bits: int) -> int:
    """The same on a GPU, where Inductor pads long rows."""
    groups = math.ceil(n / size)
    codes = groups * size * bits // 8
    if codes > _PADDED_FROM:
        codes = _round_up(codes, _PADDED_TO)
    return codes + 4 * groups


def _round_up(number: int, unit: int) -> int:
    return math.ceil(number / unit) * unit
