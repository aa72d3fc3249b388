"""The codec for masks: eight bools to a byte, lossless.

Layout: n bools are padded with zeros to 8 w. Byte j holds the elements j, j + w, ..., j + 7 w, the
lowest bit first. So each eighth of a row is read in order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prac_fx.codecs.base import Codec


@dataclass(frozen=True)
class BitCodec(Codec):
    """A bool tensor whose last dimension has `features` elements, n.

    Attributes:
        features: n.
        dim: the packed dimension, -1.
    """

    features: int
    dim: int = -1

    def __post_init__(self) -> None:
        """Reject what cannot be packed."""
        if self.dim != -1:
            raise ValueError(f"dim must be -1, not {self.dim}")
        if self.features < 1:
            raise ValueError(f"cannot pack {self.features} features")

    @property
    def name(self) -> str:
        """Always `bits`."""
        return "bits"

    @property
    def is_unbiased(self) -> bool:
        """Nothing is lost."""
        return True

    @property
    def is_lossless(self) -> bool:
        """Nothing is lost."""
        return True

    @property
    def width(self) -> int:
        """w, bytes of a row."""
        return math.ceil(self.features / 8)

    def describe(self) -> str:
        """Short text for tables."""
        return self.name

    def encode(self, x: Tensor, *numbers: Any, **_: Any) -> tuple[Tensor, ...]:
        """Pack eight bools to a byte.

        Args:
            x: (..., n), bool.
            *numbers: none are needed; codecs that round take some.

        Returns:
            One tensor, (..., w), uint8.
        """
        padding = 8 * self.width - self.features
        if padding:
            x = torch.constant_pad_nd(x, [0, padding])
        first, *others = x.view(*x.shape[:-1], 8, self.width).unbind(-2)
        byte = first.to(torch.int32)
        for place, eighth in enumerate(others, start=1):
            byte = byte | (eighth.to(torch.int32) << place)
        return (byte.to(torch.uint8),)

    def decode(
        self, parts: Sequence[Tensor], dtype: torch.dtype = torch.bool, *basis: Tensor
    ) -> Tensor:
        """The bools, (..., n)."""
        places = torch.arange(8, dtype=torch.int32, device=parts[0].device).view(8, 1)
        bits = (parts[0].unsqueeze(-2).to(torch.int32) >> places) & 1
        flat = bits.flatten(-2)
        if flat.shape[-1] != self.features:
            flat = flat.narrow(-1, 0, self.features)
        return flat.to(dtype)

    def stored_nbytes(self, rows: int, itemsize: int = 1) -> int:
        """Bytes stored for `rows` times n bools."""
        return rows * self.width
