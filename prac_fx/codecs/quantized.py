"""Codecs that store a value in 8 or 4 bits per element, with a scale for each group of elements.

Letters: n features (length of the quantised dimension), k groups of g elements (k g >= n, the rest is padding),
m the size behind the quantised dimension when that is not the last.

Rounding: x / scale goes to floor(x / scale + u) with u uniform in (0, 1) (see `rounding`), whose mean is x / scale.
For this to be exact no value may be clipped, and both sides must use the same scale to the last bit. So each
group stores its largest absolute value (with `zero_point` its largest and smallest value) in the dtype of x, which
is exact, and both sides make the scale out of that. A scale rounded to bfloat16 would do neither: a compiler may
leave out a cast to bfloat16 and back, and then one side would use what the other never sees. The float8
formats round to nearest.

Layout: codes lie like x. In `int4` a byte holds element i of a group (low half) and element i + g / 2 (high half),
so both halves of a group are read in order. Encoding runs over (..., k, g) or (..., k, g / 2), reduction and
pointwise alike, and what the reduction returns is stored as it is, so that a compiler can make it one loop
over the groups; decoding is pointwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prac_fx.codecs.rounding import column_numbers, row_numbers, uniform

Format = Literal["int8", "int4", "fp8_e4m3", "fp8_e5m2"]

_FLOAT8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
# largest code that is used, either side of zero
_SYMMETRIC_LEVELS = {"int8": 127, "int4": 7, "fp8_e4m3": 448, "fp8_e5m2": 57344}
_OFFSET_LEVELS = {"int8": 255, "int4": 15}
_BIAS = 8  # int4 codes -7..7 are stored as 1..15
_MARGIN = 1 - 2.0**-18  # keeps a code in range whatever float32 rounds, and u < 1 - 2^-18
_SMALLEST = 2.0**-110  # span of a group, so that its reciprocal times the levels is finite


@dataclass(frozen=True)
class QuantCodec:
    """Format and grouping of one site.

    Attributes:
        format: how an element is stored.
        features: n, length of the quantised dimension.
        group: at most this many elements share a scale.
        dim: the quantised dimension, -1 or -2.
        stochastic: unbiased rounding instead of rounding to nearest; integer formats only.
        zero_point: codes count from an offset stored for each group instead of from zero; integer formats only.
    """

    format: Format
    features: int
    group: int
    dim: int = -1
    stochastic: bool = True
    zero_point: bool = False

    def __post_init__(self) -> None:
        """Reject what cannot be stored."""
        if self.format not in _SYMMETRIC_LEVELS:
            raise ValueError(f"unknown format {self.format!r}, not one of {[*_SYMMETRIC_LEVELS]}")
        if self.dim not in (-1, -2):
            raise ValueError(f"dim must be -1 or -2, not {self.dim}")
        if self.features < 1 or self.group < self._unit:
            raise ValueError(f"cannot make groups of {self.group} out of {self.features} features")
        if self.zero_point and self._is_float:
            raise ValueError(f"zero_point is for integer formats, not {self.format}")

    @property
    def name(self) -> str:
        """The format."""
        return self.format

    @property
    def is_unbiased(self) -> bool:
        """Is the mean of what `decode` returns, over the seeds, what was encoded?"""
        return self.stochastic and not self._is_float

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
        """g: the largest divisor of n from half of `group` to `group`, a multiple of 8 if there is one.

        Without such a divisor, groups as equal as can be; rows are then padded, which costs a little time.
        """
        most = min(self.group, self.features)
        step = 2 if self.format == "int4" else 1
        for unit in (8, step):
            for size in range(most // unit * unit, most // 2, -unit):
                if self.features % size == 0:
                    return size
        groups = math.ceil(self.features / self._most)
        return _round_up(math.ceil(self.features / groups), self._unit)

    def describe(self) -> str:
        """Short text for tables, such as `int8/128` or `int4/64 nearest`."""
        nearest = " nearest" if not (self.stochastic or self._is_float) else ""
        return f"{self.format}/{self.group}{nearest}{' zero-point' if self.zero_point else ''}"

    # -- tensors ----------------------------------------------------------------------------------

    def numbers(self, x: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        """What `encode` rounds x with when it is the only value with this seed, an int64 scalar."""
        rows = row_numbers(x.numel() // self.features, seed)
        return rows, column_numbers(self.padded_features, seed)

    def encode(
        self, x: Tensor, rows: Tensor | None = None, columns: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Codes and scales, and offsets with `zero_point`.

        Args:
            x: (..., n), or (..., n, m) for `dim` -2; any float dtype.
            rows: for stochastic rounding, `rounding.row_numbers`, at least one for each (...) or (..., m).
            columns: likewise `rounding.column_numbers`, `padded_features` that no other value of a step rounds with.

        Returns:
            codes: (..., k g), or half that for `int4`, or the same with m behind; int8, uint8 (`int4`, or with
                `zero_point`) or float8.
            largest: of the absolute values of each group, (..., k) or (..., k, m), dtype of x. With `zero_point`, of
                the values themselves, and the smallest as a third tensor.

        Raises:
            ValueError: rounding is stochastic and there are no numbers.
        """
        if self.is_unbiased and (rows is None or columns is None):
            raise ValueError("stochastic rounding needs random numbers")
        parts = self._parts(x)
        bounds = self._bounds(parts)
        work = _working(x.dtype)
        low, span = self._span([bound.to(work) for bound in bounds])
        scaled = [part.to(work) for part in parts]
        if low is not None:
            scaled = [part - low for part in scaled]
        factor = self._levels * _MARGIN / span
        codes = self._codes([part * factor for part in scaled], rows, columns)
        codes = codes.flatten(self._at, self._at + 1)
        return (codes, *(bound.squeeze(self.dim) for bound in bounds))

    def decode(self, stored: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """What stands for x, in the shape that was encoded.

        Nothing in a group with an infinity or NaN in it is finite. All of any other is, except in float32 and float64
        where the largest value is within 1e-5 of the largest number, and with `zero_point` where the difference of
        the largest and the smallest value is.

        Args:
            stored: what `encode` returned.
            dtype: that of x.
        """
        bounds = [bound.unsqueeze(self.dim).to(_working(dtype)) for bound in stored[1:]]
        low, span = self._span(bounds)
        scale = span * (1 / (self._levels * _MARGIN))
        values = self._integers(stored[0]).to(_working(dtype)) * scale
        if low is not None:
            values = values + low
        values = values.flatten(self._at, self._at + 1)
        if self._padding:
            values = values.narrow(self.dim, 0, self.features)
        return values.to(dtype).contiguous()

    def stored_nbytes(self, rows: int, itemsize: int) -> int:
        """Bytes stored for `rows` times n elements (`rows` is the product of all other sizes) of `itemsize` bytes."""
        codes = self.padded_features // (2 if self.format == "int4" else 1)
        bounds = self.groups * (2 if self.zero_point else 1)
        return rows * (codes + bounds * itemsize)

    # -- parts ------------------------------------------------------------------------------------

    @property
    def _is_float(self) -> bool:
        return self.format in _FLOAT8

    @property
    def _unit(self) -> int:
        """What g is a multiple of."""
        if min(self.features, self.group) >= 8:
            return 8
        return 2 if self.format == "int4" else 1

    @property
    def _most(self) -> int:
        """`group`, rounded down so that g stays within it."""
        return self.group // self._unit * self._unit

    @property
    def _padding(self) -> int:
        return self.padded_features - self.features

    @property
    def _at(self) -> int:
        """Where the groups are once the dimension is split into (k, g)."""
        return self.dim - 1

    @property
    def _levels(self) -> int:
        levels = _OFFSET_LEVELS if self.zero_point else _SYMMETRIC_LEVELS
        return levels[self.format]

    def _parts(self, x: Tensor) -> list[Tensor]:
        """The elements by group, (..., k, g [, m]), or for `int4` the halves of the groups, (..., k, g / 2 [, m])."""
        if self._padding:
            x = self._padded(x)
        if self.format != "int4":
            return [_split(x, self.dim, (self.groups, self.group_size))]
        halves = _split(x, self.dim, (self.groups, 2, self.group_size // 2))
        return list(halves.unbind(self._at))

    def _padded(self, x: Tensor) -> Tensor:
        if not self.zero_point:
            return torch.constant_pad_nd(x, [0, 0] * (-1 - self.dim) + [0, self._padding])
        # zeros would widen the range of the group
        index = torch.arange(self.features + self._padding, device=x.device)
        return x.index_select(self.dim, index.clamp_max(self.features - 1))

    def _bounds(self, parts: list[Tensor]) -> list[Tensor]:
        """What is stored besides the codes, each (..., k, 1 [, m]); NaN if there is one in the group."""
        if not self.zero_point:
            sizes = [part.abs() for part in parts]
            return [_fold(torch.maximum, sizes).amax(self.dim, keepdim=True)]
        return [
            _fold(torch.maximum, parts).amax(self.dim, keepdim=True),
            _fold(torch.minimum, parts).amin(self.dim, keepdim=True),
        ]

    def _span(self, bounds: list[Tensor]) -> tuple[Tensor | None, Tensor]:
        """What code zero stands for (None: zero), and the distance from there to the largest code."""
        largest, *others = bounds
        if not others:
            return None, largest.clamp_min(_SMALLEST)
        return others[0], (largest - others[0]).clamp_min(_SMALLEST)

    def _codes(self, scaled: list[Tensor], rows: Tensor | None, columns: Tensor | None) -> Tensor:
        """Rounded and packed, (..., k, g [, m]) or (..., k, g / 2 [, m])."""
        if self._is_float:
            return scaled[0].to(_FLOAT8[self.format])
        if self.stochastic and rows is not None and columns is not None:
            numbers = self._uniform(rows, columns, scaled[0].shape)
            rounded = [(part + u).floor() for part, u in zip(scaled, numbers, strict=True)]
        else:
            rounded = [part.round() for part in scaled]
        if self.format == "int8":
            return rounded[0].to(torch.uint8 if self.zero_point else torch.int8)
        low, high = rounded
        bias = 0 if self.zero_point else _BIAS * 17
        return (high * 16.0 + low + bias).to(torch.uint8)

    def _uniform(self, rows: Tensor, columns: Tensor, shape: Sequence[int]) -> list[Tensor]:
        """u for each part of shape (..., k, g) or (..., k, g / 2), with m behind for `dim` -2."""
        trailing = list(shape[len(shape) + self.dim + 1 :])
        leading = list(shape[: self._at])
        count = math.prod(leading) * math.prod(trailing)
        rows = rows[:count].view(*leading, 1, 1, *trailing)
        columns = columns.view(self.groups, -1, shape[self.dim], *[1] * len(trailing))
        return [uniform(rows, part) for part in columns.unbind(1)]

    def _integers(self, codes: Tensor) -> Tensor:
        """Codes by group, (..., k, g [, m])."""
        if self.format != "int4":
            return _split(codes, self.dim, (self.groups, self.group_size))
        halves = _split(codes, self.dim, (self.groups, 1, self.group_size // 2))
        shift = torch.arange(0, 8, 4, dtype=torch.int32, device=codes.device)
        nibbles: Tensor = (halves.to(torch.int32) >> shift.view(2, *[1] * -self.dim)) & 15
        nibbles = nibbles.flatten(self._at, self._at + 1)
        return nibbles if self.zero_point else nibbles - _BIAS


def _working(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _split(x: Tensor, dim: int, sizes: tuple[int, ...]) -> Tensor:
    """A view with `sizes` in the place of dimension `dim`, which is negative."""
    at = x.dim() + dim
    return x.view(*x.shape[:at], *sizes, *x.shape[at + 1 :])


def _fold(function: Callable[[Tensor, Tensor], Tensor], parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else function(parts[0], parts[1])


def _round_up(number: int, unit: int) -> int:
    return math.ceil(number / unit) * unit
