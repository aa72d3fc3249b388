"""The codec that keeps some rows of a value: column-row sampling, "winner take all".

Source: Liu et al., "Winner-Take-All Column Row Sampling", WTA-CRS, arXiv 2305.15265, section 3. A
weight gradient X^T dY is a sum over tokens, and a sum can be estimated from some of its terms. Of
m rows k are kept, by their size: c *winners* as they are, and k - c that are drawn from all others
with probabilities p proportional to their sizes. A drawn row is stored times 1 / ((k - c) p), so
that the sum has the right mean.

    X^T dY  ~  kept^T dY[index]        2 k n o FLOPs instead of 2 m n o

The number of winners is the one that leaves least variance, the c with the smallest S / (k - c),
where S is the summed size of the others. It depends on the data, but all shapes are static: it is a
tensor, and each of the k places looks up whether it is a winner's.

This code differs from the paper in three ways:

- The size of a row is its norm. The paper multiplies it with the norm of the row's output gradient,
  as the last pass over the same sample had it. Here nothing is kept from step to step, and every
  sample may be new. The mean is right with any sizes.
- Rows are drawn by strata: S is cut into k - c equal parts, and each has a draw of its own. No
  variance is larger than with the paper's independent draws, since all that lies between the parts
  is left out of it.
- A row that is not finite is a winner, so that a gradient that was not finite stays so.

Letters: m tokens, n features, k kept rows, c winners, d = k - c drawn rows, o outputs, E a batch of
independent matrices (experts), each with k rows of its own.
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

# Of the numbers that `uniform` returns. They lie in the middle between the points of the grid.
_GRID = 2.0**-16


@dataclass(frozen=True)
class SampledRows(RowShare):
    """A share of the rows of a value. Attributes are those of `RowShare`."""

    kept_as = "sampled rows"

    @property
    def name(self) -> str:
        """Always `sampled`."""
        return "sampled"

    @property
    def is_unbiased(self) -> bool:
        """Weight gradients are, whatever the sizes that rows are drawn by."""
        return True

    @property
    def rounding(self) -> Rounding:
        """A number for each row, of which the first k are used, and two for columns."""
        return Rounding(1, 2)

    # -- tensors ----------------------------------------------------------------------------------

    def encode(self, x: Tensor, rows: Tensor, columns: Tensor, **_: Any) -> tuple[Tensor, ...]:
        """The kept rows, and which they are.

        Args:
            x: (m, n), or (E, m, n); any floating dtype.
            rows: `rounding.row_numbers`, m or E m of them.
            columns: `rounding.column_numbers`, 2 of them.

        Returns:
            The rows times their factors, (k, n) or (E, k, n), dtype of `x`; and their indices, (k,)
            or (E, k), int32. In float16 rows are divided by a power of two, so that they do not
            overflow.
        """
        kept = self.kept(x.shape[-2])
        numbers = rows.view(x.shape[:-1]).narrow(-1, 0, kept)
        index, factor = drawn_rows(row_sizes(x), kept, _fine_uniform(numbers, columns))
        factor = times(factor, self._guard(x.dtype)).unsqueeze(-1)
        return (rows_at(x, index) * factor).to(x.dtype), index.to(torch.int32)

    def weight_gradient(
        self, parts: Sequence[Tensor], dy: Tensor, *basis: Tensor, outer: Outer | None = None
    ) -> Tensor:
        """The estimate of X^T dY.

        Args:
            parts: what `encode` returned.
            dy: (m, o), or (E, m, o).
            *basis: there is none.
            outer: None; groups of rows are not stored so.

        Returns:
            (n, o), or (E, n, o); dtype of `dy`.
        """
        rows, index = parts
        return times(rows.mT @ rows_at(dy, index), 1 / self._guard(dy.dtype))

    def weight_gradient_transposed(
        self, parts: Sequence[Tensor], dy_t: Tensor, *basis: Tensor, outer: Outer | None = None
    ) -> Tensor:
        """The estimate of dY^T X, the form that `F.linear` needs.

        Args:
            parts: what `encode` returned.
            dy_t: (o, m), or (E, o, m).
            *basis: there is none.
            outer: None; groups of rows are not stored so.

        Returns:
            (o, n), or (E, o, n); dtype of `dy_t`.
        """
        rows, index = parts
        # rows of dY lie in memory one by one, columns of dY^T do not
        taken = rows_at(dy_t.mT, index).mT
        return times(taken @ rows, 1 / self._guard(dy_t.dtype))

    def _guard(self, dtype: torch.dtype) -> float:
        """The power of two that stored rows are multiplied with.

        A row times its factor is at most m / k times as long as the longest row, and one element
        may be as large as that is long. In float16 this can overflow where x itself does not.
        """
        if dtype != torch.float16:
            return 1.0
        return 2.0 ** -math.ceil(math.log2(math.sqrt(self.features) / self.share))

    # -- sizes and costs --------------------------------------------------------------------------

    def stored_nbytes(self, rows: int, itemsize: int) -> int:
        """Bytes stored for this many rows of all matrices together."""
        return self.kept_of_all(rows) * (self.features * itemsize + INDEX_NBYTES)


def row_sizes(x: Tensor) -> Tensor:
    """The norm of each row: not negative, infinite for a row that is not finite, and never NaN.

    Where the square would overflow or vanish, it is the largest element instead. The mean of an
    estimate is right with any sizes, as long as only a row of zeros has size zero.

    Args:
        x: (..., m, n), any floating dtype.

    Returns:
        (..., m), float32, or float64 for float64.
    """
    x = x.to(working_dtype(x.dtype))
    square, largest = x.square().sum(-1), x.abs().amax(-1)
    in_range = (square >= torch.finfo(square.dtype).tiny) & (square < math.inf)
    sizes = torch.where(in_range, square.sqrt(), largest)
    return torch.where(sizes.isnan(), math.inf, sizes)


def drawn_rows(sizes: Tensor, kept: int, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows are kept, and what they are multiplied with.

    Rows stand in ascending order, so that what is summed over all but the largest is a running sum:
    its last k numbers are the S of d = 1 .. k drawn rows. A sum that is not finite is never the
    smallest, unless there are more such rows than places: then these rows are kept.

    Args:
        sizes: (..., m), not negative, not NaN.
        kept: k, at most m.
        uniforms: (..., k), in (0, 1).

    Returns:
        Indices, (..., k), int64, and factors, (..., k), dtype of `sizes`: 1 for a winner, 1 / (d p)
        for a row that is drawn.
    """
    m, dtype = sizes.shape[-1], exact_dtype(sizes.device)
    ordered, order = sizes.sort(dim=-1, stable=True)
    weights = ordered.to(dtype) / m  # divided, so that no sum overflows
    running = weights.cumsum(-1)
    sums = running.narrow(-1, m - kept, kept)
    place = torch.arange(kept, device=sizes.device)
    best = (sums / (place + 1)).argmin(-1, keepdim=True)  # d - 1
    drawn, total = best + 1, sums.gather(-1, best)
    is_drawn = (place < drawn) & (total < math.inf)
    found = torch.searchsorted(running, (place + uniforms) / drawn * total, right=True)
    at = torch.where(is_drawn, torch.minimum(found, m - kept + best), m - kept + place)
    weight = weights.gather(-1, at)
    # where the sum is zero all that is left are rows of zeros
    factor = torch.where(is_drawn & (weight > 0), total / (drawn * weight), 1.0)
    return order.gather(-1, at), factor.to(sizes.dtype)


def _fine_uniform(rows: Tensor, columns: Tensor) -> Tensor:
    """Numbers in (0, 1), one of 2^32 each: 16 bits of each column's number.

    16 bits alone would never draw a row that has less than 2^-16 of a stratum.
    """
    coarse, fine = uniform(rows.unsqueeze(-1), columns).to(exact_dtype(rows.device)).unbind(-1)
    return coarse - _GRID / 2 + fine * _GRID
