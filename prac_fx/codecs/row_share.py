"""What codecs have in common that keep a share of the rows, for weight gradients alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from prac_fx.codecs.base import Codec

INDEX_NBYTES = 4  # of int32


@dataclass(frozen=True)
class RowShare(Codec):
    """A codec that stores some rows of a value, k of m, and is never decoded.

    Attributes:
        features: n.
        share: k / m, above 0 and at most 1; k is rounded up.
        matrices: E, a batch of independent matrices, each with k rows of its own.
        kept_as: what the rows are called.
    """

    features: int
    share: float
    matrices: int = 1
    kept_as: ClassVar[str]

    def __post_init__(self) -> None:
        """Reject what keeps nothing, or more than there is."""
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, not {self.share}")

    def describe(self) -> str:
        """Short text for tables, such as `sampled 0.25`."""
        return f"{self.name} {self.share:g}"

    @property
    def is_decodable(self) -> bool:
        """Most rows are gone, and what could be rebuilt only a weight gradient should see."""
        return False

    def kept(self, rows: int) -> int:
        """k of m rows, at least one of any; both may be symbolic."""
        exact = Fraction(repr(self.share))  # 0.3 is 3 / 10 here, as its reader expects
        return (rows * exact.numerator + exact.denominator - 1) // exact.denominator

    def kept_of_all(self, rows: int) -> int:
        """How many rows of all matrices together are kept."""
        return self.matrices * self.kept(rows // self.matrices)

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype, *basis: Tensor) -> Tensor:
        """Not to be called: see `is_decodable`."""
        raise NotImplementedError(f"of {self.kept_as} weight gradients are made, and nothing else")


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x, (m, n) or (E, m, n), at (k,) or (E, k) indices."""
    if x.dim() == 2:
        return x[index]
    return x.gather(-2, index.to(torch.int64).unsqueeze(-1).expand(-1, -1, x.shape[-1]))
