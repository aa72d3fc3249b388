"""Codecs that store a value in 8 or 4 bits per element, with a scale for each group of elements.

Letters: n features (length of the quantised dimension), k groups of g elements (k g >= n, the rest
is padding), m the size behind the quantised dimension when that is not the last.

Rounding: x / scale goes to floor(x / scale + u) with u uniform in (0, 1) (see `rounding`). The mean
of that is x / scale. On a GPU it goes to the whole number nearest to x / scale + u - 1/2, which is
the same (see `evaluated_once.rounded`). For the mean to be exact, no value may be clipped, and both
sides must use the same scale to the last bit. So each group stores its largest absolute value in
the dtype of x, which is exact. With `zero_point` it stores its largest and its smallest value. Both
sides make the scale from these. A scale rounded to bfloat16 would meet neither condition. A
compiler may leave out a cast to bfloat16 and back, and then one side would use what the other never
sees. There is one exception: of a group that spans less than 2^-110, only the zeros are exact. All
that is decoded of it lies within that span.

Layout: p codes make a word, of 32 bits on a CPU and of 8 on a GPU (see `words`). Word i of a group
holds its elements i, i + g / p, i + 2 g / p and so on, so each p-th of a group is read in order.

Loops: encoding runs over (..., k, g) or (..., k, g / p), in its reduction and in its pointwise
part. What the reduction returns is stored as it is. So a compiler can make a single loop over the
groups of it. Decoding is pointwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from prac_fx.codecs.base import Codec, Rounding
from prac_fx.codecs.evaluated_once import rounded
from prac_fx.codecs.groups import group_size
from prac_fx.codecs.rounding import column_numbers, row_numbers, uniform
from prac_fx.codecs.words import WordBits, packed, packed_bytes, split, unpacked

Format = Literal["int8", "int4"]

# largest code that is used, either side of zero
_SYMMETRIC_LEVELS = {"int8": 127, "int4": 7}
_OFFSET_LEVELS = {"int8": 255, "int4": 15}
_BITS = {"int8": 8, "int4": 4}
_MARGIN = 1 - 2.0**-18  # keeps a code in range whatever float32 rounds, and u < 1 - 2^-18
_BITS_OF_SIZE = 0x7FFF_FFFF  # of a float32: all but its sign
_SMALLEST = 2.0**-110  # span of a group, so that its reciprocal times the levels is finite


@dataclass(frozen=True)
class QuantCodec(Codec):
    """Format and grouping of a site.

    Attributes:
        format: how an element is stored.
        features: n, length of the quantised dimension.
        group: at most this many elements share a scale.
        dim: the quantised dimension, -1 or -2.
        stochastic: unbiased rounding instead of rounding to nearest.
        zero_point: codes count from an offset stored for each group instead of from zero.
        word_bits: of the words that codes are packed in (`words.word_bits_on`).
    """

    format: Format
    features: int
    group: int
    dim: int = -1
    stochastic: bool = True
    zero_point: bool = False
    word_bits: WordBits = 32

    def __post_init__(self) -> None:
        """Reject what cannot be stored."""
        if self.format not in _SYMMETRIC_LEVELS:
            raise ValueError(f"unknown format {self.format!r}, not one of {[*_SYMMETRIC_LEVELS]}")
        if self.dim not in (-1, -2):
            raise ValueError(f"dim must be -1 or -2, not {self.dim}")
        if self.features < 1 or self.group < self._unit:
            raise ValueError(f"cannot make groups of {self.group} out of {self.features} features")

    @property
    def name(self) -> str:
        """The format."""
        return self.format

    @property
    def is_unbiased(self) -> bool:
        """Rounding to nearest has a bias."""
        return self.stochastic

    @property
    def is_coarse(self) -> bool:
        """With 4 bits there are only 7 levels on either side of zero."""
        return _BITS[self.format] <= 4

    @property
    def rounding(self) -> Rounding | None:
        """A number for each row and one for each padded column, when rounding is stochastic."""
        return Rounding(1, self.padded_features) if self.stochastic else None

    @property
    def padded_features(self) -> int:
        """k g, elements of a row with padding."""
        return self.groups * self.group_size

    @property
    def groups(self) -> int:
        """k, the number of scales along the quantised dimension."""
        return math.ceil(self.features / self.group_size)

    @property
    def group_size(self) -> int:
        """g, a multiple of p up to `group`; see `groups.group_size`."""
        return group_size(self.features, self.group, _BITS[self.format], self.word_bits)

    def describe(self) -> str:
        """Short text for tables, such as `int8/128` or `int4/64 nearest`."""
        nearest = "" if self.stochastic else " nearest"
        return f"{self.format}/{self.group}{nearest}{' zero-point' if self.zero_point else ''}"

    # -- tensors ----------------------------------------------------------------------------------

    def numbers(self, x: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        """What `encode` rounds x with, if no other value has the same seed (an int64 scalar)."""
        rows = row_numbers(x.numel() // self.features, seed)
        return rows, column_numbers(self.padded_features, seed)

    def encode(
        self, x: Tensor, rows: Tensor | None = None, columns: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, ...]:
        """Codes and scales, and offsets with `zero_point`.

        Args:
            x: (..., n), or (..., n, m) for `dim` -2; any float dtype.
            rows: for stochastic rounding, `rounding.row_numbers`, one for each (...) or (..., m).
            columns: likewise `rounding.column_numbers`, `padded_features` of them. No other value
                of a step rounds with these.

        Returns:
            words: (..., k g / p), or the same with m behind; int32 or uint8.
            largest: of the absolute values of each group, (..., k) or (..., k, m), dtype of x. With
                `zero_point`, of the values themselves; the smallest is a third tensor.

        Raises:
            ValueError: rounding is stochastic and there are no numbers.
        """
        if self.is_unbiased and (rows is None or columns is None):
            raise ValueError("stochastic rounding needs random numbers")
        # a CPU's compiler compares each index of padded values with the end, so the last group is
        # encoded by itself there
        whole = self.features // self.group_size * self.group_size
        if self._padding and self.word_bits == 8:
            whole = 0
        pieces = [self._encoded(x.narrow(self.dim, 0, whole), rows, columns)] if whole else []
        if whole < self.features:
            rest = self._padded(x.narrow(self.dim, whole, self.features - whole))
            behind = self.padded_features - whole
            of_rest = None if columns is None else columns.narrow(0, whole, behind)
            pieces.append(self._encoded(rest, rows, of_rest))
        if len(pieces) == 1:
            return pieces[0]
        return tuple(torch.cat(parts, self.dim) for parts in zip(*pieces, strict=True))

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype, *basis: Tensor) -> Tensor:
        """What stands for x, in the shape that was encoded.

        Nothing in a group with an infinity or NaN in it is finite. In other groups everything is
        finite, but for an exception in float32 and float64: where the largest value is within 1e-5
        of the largest number. With `zero_point` there is another exception: where the difference of
        the largest and the smallest value is.

        Args:
            parts: what `encode` returned.
            dtype: that of x.
            *basis: none.
        """
        codes, *bounds = parts
        work = _working(dtype)
        each = [bound.unsqueeze(self.dim).unsqueeze(self.dim).to(work) for bound in bounds]
        low, span = self._span(each)
        scale = span * (1 / (self._levels * _MARGIN))
        values = self._numbers(codes).to(work) * scale
        if low is not None:
            values = values + low
        # from (k, p, g / p) at once: compilers do not simplify the index of one view of another
        values = values.flatten(self._at - 1, self._at + 1)
        if self._padding:
            values = values.narrow(self.dim, 0, self.features)
        return values.to(dtype).contiguous()

    def stored_nbytes(self, rows: int, itemsize: int) -> int:
        """Bytes stored for `rows` times n elements of `itemsize` bytes.

        `rows` is the product of all other sizes.
        """
        codes = self.padded_features * _BITS[self.format] // 8
        bounds = self.groups * (2 if self.zero_point else 1)
        return rows * (codes + bounds * itemsize)

    # -- parts ------------------------------------------------------------------------------------

    @property
    def _unit(self) -> int:
        """p, the number of elements that share a word; g is a multiple of it."""
        return self.word_bits // _BITS[self.format]

    @property
    def _padding(self) -> int:
        return self.padded_features - self.features

    @property
    def _at(self) -> int:
        """Where the groups are once the dimension is split into (k, g)."""
        return self.dim - 1

    @property
    def _bias(self) -> int:
        """What is added to a code to make it count from zero."""
        return 0 if self.zero_point else 1 << (_BITS[self.format] - 1)

    @property
    def _levels(self) -> int:
        levels = _OFFSET_LEVELS if self.zero_point else _SYMMETRIC_LEVELS
        return levels[self.format]

    def _padded(self, x: Tensor) -> Tensor:
        """x with `_padding` elements more, which make its groups whole."""
        if not self.zero_point:
            return torch.constant_pad_nd(x, [0, 0] * (-1 - self.dim) + [0, self._padding])
        # zeros would widen the range of the group
        size = x.shape[self.dim]
        index = torch.arange(size + self._padding, device=x.device)
        return x.index_select(self.dim, index.clamp_max(size - 1))

    def _encoded(
        self, x: Tensor, rows: Tensor | None, columns: Tensor | None
    ) -> tuple[Tensor, ...]:
        """`encode` for whole groups."""
        places = (-1, self._unit, self.group_size // self._unit)
        parts = split(x, self.dim, places)  # (..., k, p, g / p [, m])
        bounds = self._bounds(parts)
        work = _working(x.dtype)
        low, span = self._span([bound.unsqueeze(self._at).to(work) for bound in bounds])
        factor = self._levels * _MARGIN / span.clamp_min(_SMALLEST)
        codes = []
        for part, *numbers in self._by_place(parts, rows, columns):
            scaled = part.to(work)
            if low is not None:
                scaled = scaled - low
            codes.append(self._rounded(scaled * factor, *numbers))
        words = self._packed(codes).flatten(self._at, self._at + 1)
        return (words, *(bound.squeeze(self.dim) for bound in bounds))

    def _by_place(
        self, parts: Tensor, rows: Tensor | None, columns: Tensor | None
    ) -> Iterator[tuple[Tensor, ...]]:
        """The parts, each with the numbers to round it with.

        For words of 32 bits there is a single part of all places, else a part for each place. A
        compiler for a GPU would write the codes of all places down before it packs them. So each
        place starts from x.
        """
        whole, at = self.word_bits == 32, self._at
        pieces = (parts,) if whole else parts.chunk(self._unit, at)
        if not self.is_unbiased or rows is None or columns is None:
            yield from ((piece,) for piece in pieces)
            return
        shape, first = parts.shape, parts.dim() + at - 1
        of_row, trailing = shape[first : first + 3], shape[first + 3 :]
        rows = rows.view(*shape[:first], 1, 1, 1, *trailing)
        columns = columns.narrow(0, 0, math.prod(of_row)).view(*of_row, *[1] * len(trailing))
        for piece, own in zip(
            pieces, (columns,) if whole else columns.chunk(self._unit, at), strict=True
        ):
            yield piece, rows, own

    def _bounds(self, parts: Tensor) -> list[Tensor]:
        """What is stored besides the codes, each (..., k, 1 [, m]); NaN if the group has a NaN."""
        if not self.zero_point:
            return [self._largest(parts)]
        return [self._extreme(parts, torch.amax), self._extreme(parts, torch.amin)]

    def _largest(self, parts: Tensor) -> Tensor:
        """The largest absolute value of each group.

        Triton's comparison of floats asks for NaN each time. Among the bits of absolute values
        every NaN is above every number, so an integer comparison will do. Where the groups are not
        along the last dimension, a second kernel may read what the reduction returned, so that
        has to be what is stored.
        """
        if self.word_bits == 32 or self.dim == -2 or parts.dtype == torch.float64:
            return self._extreme(parts.abs(), torch.amax)
        bits = parts.to(torch.float32).view(torch.int32) & _BITS_OF_SIZE
        return self._extreme(bits, torch.amax).view(torch.float32).to(parts.dtype)

    def _extreme(self, parts: Tensor, of: Callable[..., Tensor]) -> Tensor:
        """The extreme of each group.

        It goes by halves over the places, so that the loop over the rest is the loop of packing.
        """
        while parts.shape[self._at] > 1:
            halves = (2, parts.shape[self._at] // 2)
            parts = of(split(parts, self._at, halves), self._at - 1)
        return of(parts.squeeze(self._at), self.dim, keepdim=True)

    def _span(self, bounds: list[Tensor]) -> tuple[Tensor | None, Tensor]:
        """What code zero stands for (None for zero), and its distance to the largest code."""
        largest, *others = bounds
        if not others:
            return None, largest
        return others[0], largest - others[0]

    def _rounded(self, scaled: Tensor, *numbers: Tensor) -> Tensor:
        """Codes, as numbers from zero up; rounded to nearest if there are no random numbers."""
        if numbers and self.word_bits == 8 and scaled.dtype == torch.float32:
            rows, columns = numbers
            return rounded(scaled, rows, columns, self._bias)
        whole = (scaled + uniform(*numbers)).floor() if numbers else scaled.round()
        return whole + self._bias

    def _packed(self, codes: list[Tensor]) -> Tensor:
        """Codes of all places, or of each, in words (..., k, g / p [, m])."""
        bits = _BITS[self.format]
        if self.word_bits == 8:
            return packed_bytes(codes, bits).squeeze(self._at)
        return packed(codes[0], bits, self._at)

    def _numbers(self, codes: Tensor) -> Tensor:
        """What the codes stand for before scaling, by group and place, (..., k, p, g / p [, m])."""
        codes = split(codes, self.dim, (self.groups, self.group_size // self._unit))
        return unpacked(codes, _BITS[self.format], self.dim) - self._bias


def _working(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
