"""The codec that stands each row of a value on one of few: point-approximate matrix multiplication.

Source: Khalf et al., "QKV Projections Require a Fraction of Their Memory", PAMM, arXiv 2506.02939,
section 3. Of m rows k are drawn as *representatives*. Every row x_i is stored as which of them
points most in its direction, or against it, and as its projection on that one:

    x~_i = a_i c_f(i)        with c_j of length 1, f(i) = argmax |<x_i, c_j>|, a_i = <x_i, c_f(i)>
    X~^T dY = C^T (A^T dY)   with A, (m, k), that has a_i at (i, f(i)) and zeros elsewhere

Both matmuls of the weight gradient are small, and so is the one that finds f: 2 m k (n + o) + 2 k n
o FLOPs instead of 2 m n o. A^T dY is a matmul, too, where a sum by index would add in an order of
its own each time.

**It is biased**: a projection is never longer than its row, and what lies across is lost in every
step. The draw of other representatives in each step does not make up for that. The paper trains
well with it on the inputs of query, key and value, with m / k up to 512. It also may leave out rows
that are far from all representatives, which made no difference there and is not done here.

Letters: m tokens, n features, k representatives, o outputs, E a batch of independent matrices
(experts), each with representatives of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prac_fx.codecs.base import Outer, Rounding, times
from prac_fx.codecs.rounding import uniform
from prac_fx.codecs.row_share import INDEX_NBYTES, RowShare, rows_at
from prac_fx.codecs.subspace import exact_dtype, working_dtype


@dataclass(frozen=True)
class PammCodec(RowShare):
    """A value as its rows' projections on a share of them. Attributes are those of `RowShare`."""

    kept_as = "representatives"

    @property
    def name(self) -> str:
        """Always `pamm`."""
        return "pamm"

    @property
    def is_unbiased(self) -> bool:
        """What lies across of a representative is lost."""
        return False

    @property
    def rounding(self) -> Rounding:
        """A number for each row, of which the first k are used, and one for columns."""
        return Rounding(1, 1)

    def encode(self, x: Tensor, rows: Tensor, columns: Tensor, **_: Any) -> tuple[Tensor, ...]:
        """The representatives, and what each row is of them.

        Args:
            x: (m, n), or (E, m, n); any floating dtype.
            rows: `rounding.row_numbers`, m or E m of them.
            columns: `rounding.column_numbers`, 1 of them.

        Returns:
            C, (k, n) or (E, k, n), dtype of `x`, rows of length 1 (in float16 shorter, by a power
            of two); f, (m,) or (E, m), int32; a, in the shape of f, dtype of `x`. A row that is not
            finite has no finite a.
        """
        m = x.shape[-2]
        kept = self.kept(m)
        numbers = uniform(rows.view(x.shape[:-1]).narrow(-1, 0, kept), columns)
        directions = self._directions(rows_at(x, _one_of_each_stratum(numbers, m)))
        products = x @ directions.mT
        index = products.abs().argmax(-1, keepdim=True)
        lengths = products.gather(-1, index).squeeze(-1)
        return directions, index.squeeze(-1).to(torch.int32), lengths

    def _directions(self, representatives: Tensor) -> Tensor:
        """Rows of length 1, or `_guard`; zeros stay zeros."""
        rows = representatives.to(working_dtype(representatives.dtype))
        largest = rows.abs().amax(-1, keepdim=True)
        rows = torch.where(largest == 0, rows, rows / largest)  # so that squares stay in range
        length = rows.square().sum(-1, keepdim=True).sqrt().clamp_min(0.5)
        return (rows * (self._guard(representatives.dtype) / length)).to(representatives.dtype)

    def weight_gradient(
        self, parts: Sequence[Tensor], dy: Tensor, *basis: Tensor, outer: Outer | None = None
    ) -> Tensor:
        """X~^T dY = C^T (A^T dY).

        Args:
            parts: what `encode` returned.
            dy: (m, o), or (E, m, o).
            *basis: there is none.
            outer: None; groups of rows are not stored so.

        Returns:
            (n, o), or (E, n, o); dtype of `dy`.
        """
        directions = parts[0]
        small = _assignment(parts).mT @ dy
        return times(directions.mT @ small, self._guard(dy.dtype) ** -2)

    def weight_gradient_transposed(
        self, parts: Sequence[Tensor], dy_t: Tensor, *basis: Tensor, outer: Outer | None = None
    ) -> Tensor:
        """dY^T X~ = (dY^T A) C, the form that `F.linear` needs.

        Args:
            parts: what `encode` returned.
            dy_t: (o, m), or (E, o, m).
            *basis: there is none.
            outer: None; groups of rows are not stored so.

        Returns:
            (o, n), or (E, o, n); dtype of `dy_t`.
        """
        directions = parts[0]
        return times((dy_t @ _assignment(parts)) @ directions, self._guard(dy_t.dtype) ** -2)

    def _guard(self, dtype: torch.dtype) -> float:
        """The power of two that representatives are as long as.

        A projection is as long as its row at most. In float16 that can overflow where the row
        itself does not.
        """
        if dtype != torch.float16:
            return 1.0
        return 2.0 ** -math.ceil(math.log2(math.sqrt(self.features)))

    def stored_nbytes(self, rows: int, itemsize: int) -> int:
        """Bytes stored for this many rows of all matrices together."""
        return self.kept_of_all(rows) * self.features * itemsize + rows * (itemsize + INDEX_NBYTES)


def _one_of_each_stratum(numbers: Tensor, m: int) -> Tensor:
    """Indices below m, (..., k), one in each of k equal parts; from numbers in (0, 1), (..., k)."""
    k = numbers.shape[-1]
    place = torch.arange(k, device=numbers.device)
    positions = (place + numbers.to(exact_dtype(numbers.device))) * m / k
    return positions.to(torch.int64).clamp(max=m - 1)


def _assignment(parts: Sequence[Tensor]) -> Tensor:
    """A, (m, k) or (E, m, k)."""
    directions, index, lengths = parts
    place = torch.arange(directions.shape[-2], dtype=index.dtype, device=index.device)
    return torch.where(index.unsqueeze(-1) == place, lengths.unsqueeze(-1), 0.0)
