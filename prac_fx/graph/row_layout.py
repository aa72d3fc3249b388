"""How a dense tensor lies in memory, and how to see it as rows of features with any strides."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from prac_fx.graph.nbytes import size_hint

# With fewer features than this, the last dimension is joined with the next: a scale for each
# handful of elements would cost too much.
_NARROW = 32


@dataclass(frozen=True)
class Layout:
    """A permutation of the dimensions to memory order, and which of the last count as features.

    Attributes:
        order: the dimensions by descending stride.
        inner: sizes, in that order, of the trailing dimensions that together are the features.
    """

    order: tuple[int, ...]
    inner: tuple[int, ...]

    @property
    def features(self) -> int:
        """n, the number of features of a row."""
        return math.prod(self.inner)

    def to_rows(self, x: Tensor, *, is_written: bool = True) -> Tensor:
        """View of `x` as (..., n), in memory order.

        Args:
            x: a tensor of this layout.
            is_written: have compiled code write `x` to memory, with the strides of this layout.

        The view is made with as_strided. Inductor treats what as_strided reads as it treats an
        output: it computes `x` once, into memory. Plain Inductor does so with every value that it
        saves. Without that, each reader would compute `x` again, in another precision, and the
        forward pass would no longer be the same to the bit.
        """
        outer = self.order[: len(self.order) - len(self.inner)]
        if not is_written:
            return x.permute(self.order).flatten(len(outer))
        sizes = [*(x.shape[dim] for dim in outer), self.features]
        return x.as_strided(sizes, [*(x.stride(dim) for dim in outer), 1])

    def from_rows(self, rows: Tensor) -> Tensor:
        """The inverse of `to_rows`: shape and strides of the original, as a view of `rows`."""
        if len(self.inner) > 1:
            rows = rows.view(*rows.shape[:-1], *self.inner)
        inverse = [0] * len(self.order)
        for position, dim in enumerate(self.order):
            inverse[dim] = position
        return rows.permute(inverse)


def layout_of(value: Tensor) -> Layout | None:
    """The layout of a (fake) tensor; None when it cannot be seen as rows of features.

    It cannot when it has no dimensions, when its elements do not fill its storage exactly once, or
    when the size of its innermost dimension is symbolic.
    """
    if not value.dim():
        return None
    sizes = [size_hint(size) for size in value.shape]
    strides = [size_hint(stride) for stride in value.stride()]
    order = sorted(range(value.dim()), key=lambda dim: (-strides[dim], dim))
    # a dimension of size 1 may have any stride: leave it where its index puts it
    expected = 1
    for dim in reversed(order):
        if sizes[dim] != 1 and strides[dim] != expected:
            return None
        expected *= sizes[dim]
    inner: list[int] = []
    for dim in reversed(order):
        size = value.shape[dim]
        if not isinstance(size, int) or (inner and math.prod(inner) >= _NARROW):
            break
        inner.insert(0, size)
    return Layout(tuple(order), tuple(inner)) if inner else None
