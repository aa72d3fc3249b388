"""Two codecs in a row: coordinates in a subspace, stored in 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prac_fx.codecs.base import Codec, Outer, Rounding, SubspaceShape
from prac_fx.codecs.prac import PracCodec


@dataclass(frozen=True)
class QuantizedCoordinates(Codec):
    """PRAC whose coordinates are quantised.

    Attributes:
        projection: makes the coordinates.
        quantizer: of the r / B coordinates of a token in each block.
    """

    projection: PracCodec
    quantizer: Codec

    @property
    def features(self) -> int:  # type: ignore[override]
        """n."""
        return self.projection.features

    @property
    def name(self) -> str:
        """That of the projection."""
        return self.projection.name

    def describe(self) -> str:
        """Short text for tables, such as `prac 38+38/128 int8/128`."""
        return f"{self.projection.describe()} {self.quantizer.describe()}"

    @property
    def coordinates(self) -> str:
        """The quantiser's name."""
        return self.quantizer.name

    @property
    def is_unbiased(self) -> bool:
        """Both parts have to be."""
        return self.projection.is_unbiased and self.quantizer.is_unbiased

    @property
    def is_coarse(self) -> bool:
        """The projection is."""
        return self.projection.is_coarse

    @property
    def rounding(self) -> Rounding | None:
        """The quantiser's, which sees a row for each token and block."""
        rounding = self.quantizer.rounding
        return rounding and Rounding(rounding.rows * self.projection.blocks, rounding.columns)

    @property
    def subspace(self) -> SubspaceShape:
        """The projection's."""
        return self.projection

    def encode(self, x: Tensor, basis: Tensor, *numbers: Tensor, **_: Any) -> tuple[Tensor, ...]:
        """Codes and scales of the coordinates."""
        (coordinates,) = self.projection.encode(x, basis)
        return self.quantizer.encode(coordinates, *numbers)

    def unpack(self, stored: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The coordinates."""
        return (self.quantizer.decode(stored, dtype),)

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype, *basis: Tensor) -> Tensor:
        """As the projection does."""
        return self.projection.decode(parts, dtype, *basis)

    def weight_gradient(
        self, parts: Sequence[Tensor], dy: Tensor, *basis: Tensor, outer: Outer | None = None
    ) -> Tensor:
        """As the projection does."""
        return self.projection.weight_gradient(parts, dy, *basis, outer=outer)

    def weight_gradient_transposed(
        self, parts: Sequence[Tensor], dy_t: Tensor, *basis: Tensor, outer: Outer | None = None
    ) -> Tensor:
        """As the projection does."""
        return self.projection.weight_gradient_transposed(parts, dy_t, *basis, outer=outer)

    def stored_nbytes(self, rows: int, itemsize: int) -> int:
        """Codes and scales."""
        return self.quantizer.stored_nbytes(rows * self.projection.blocks, itemsize)

    def state_nbytes(self, itemsize: int) -> int:
        """That of the projection."""
        return self.projection.state_nbytes(itemsize)
