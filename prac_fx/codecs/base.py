"""What passes and run time ask of a codec; they never ask for its class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# products of the rows of each group of two matrices, (m, p) and (m, o): (E, p, o), see `grouped`
Outer = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Rounding:
    """How many random numbers stochastic rounding takes (see `rounding`).

    Attributes:
        rows: numbers for rows, for each row of the value.
        columns: numbers for columns.
    """

    rows: int
    columns: int


@dataclass(frozen=True)
class SubspaceShape:
    """Ranks and blocks of a subspace. All counts are totals over the blocks.

    Attributes:
        features: n, divisible by `blocks`.
        principal: r1, divisible by `blocks`.
        random: r2, divisible by `blocks`.
        blocks: B, the number of feature blocks; each has a basis of its own.
        sample_rows: s, tokens copied out of each forward pass for the refresh of the basis.
    """

    features: int
    principal: int
    random: int
    blocks: int
    sample_rows: int

    @property
    def rank(self) -> int:
        """r = r1 + r2, coordinates stored for each token."""
        return self.principal + self.random

    @property
    def basis_shape(self) -> tuple[int, ...]:
        """(n, r) for one block, (B, n / B, r / B) for several."""
        if self.blocks == 1:
            return (self.features, self.rank)
        return (self.blocks, self.features // self.blocks, self.rank // self.blocks)

    def flops(self, tokens: int, outputs: int, products: int = 0, columns: int = 0) -> int:
        """FLOPs of encoding a matrix once and of its weight gradients.

        Args:
            tokens: m, rows that are encoded.
            outputs: o, columns of all weight gradients.
            products: rows that each reads times its columns, over all; 0 means m o.
            columns: o, with those of each expert; 0 means o.
        """
        encode = 2 * tokens * self.features * self.rank // self.blocks
        small = 2 * self.rank * (products or tokens * outputs)
        project = 2 * self.features * self.rank * (columns or outputs) // self.blocks
        return encode + small + project


class Codec(ABC):
    """How a saved value is stored, and what backward does with what is stored.

    A codec is a frozen dataclass: it is part of a plan and of the key of torch's compile cache. Its
    methods on tensors are traced into the joint graph as ordinary aten operators. So what they do
    may not depend on the data.

    A value arrives as rows of `features` elements, (m, n). What `encode` stores has m rows, too,
    unless only `weight_gradient` reads it.
    """

    features: int

    @property
    @abstractmethod
    def name(self) -> str:
        """The name by which the options and the report call the codec."""

    @abstractmethod
    def describe(self) -> str:
        """Short text for tables, such as `int8/128`."""

    # -- what it promises -------------------------------------------------------------------------

    @property
    @abstractmethod
    def is_unbiased(self) -> bool:
        """Does `decode` return, on average over the random numbers, what was encoded?"""

    @property
    def is_lossless(self) -> bool:
        """Does `decode` return what was encoded, to the bit?"""
        return False

    @property
    def is_decodable(self) -> bool:
        """Can `decode` return the whole value? If not, only weight gradients may read it."""
        return True

    @property
    def is_coarse(self) -> bool:
        """Are its errors so large that a curved function of a decoded value has a notable bias?"""
        return False

    @property
    def coordinates(self) -> str | None:
        """How the coordinates in its subspace are stored.

        None when they are stored as they are, or when there is no subspace.
        """
        return None

    # -- what it needs ----------------------------------------------------------------------------

    @property
    def rounding(self) -> Rounding | None:
        """How many random numbers `encode` takes last, for rows and for columns; None for none."""
        return None

    @property
    def subspace(self) -> SubspaceShape | None:
        """The subspace whose basis, (n, r), `encode` and `decode` take; None for none."""
        return None

    # -- tensors ----------------------------------------------------------------------------------

    @abstractmethod
    def encode(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """What is stored of x, (m, n).

        The other arguments are the basis, if the codec has a subspace, and the numbers, if it
        rounds.
        """

    def unpack(self, stored: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """What all readers in backward share, made once from what is stored.

        Args:
            stored: what `encode` returned.
            dtype: that of x.
        """
        return tuple(stored)

    @abstractmethod
    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype, *basis: Tensor) -> Tensor:
        """What stands for x, in the shape that was encoded.

        Args:
            parts: what `unpack` returned.
            dtype: that of x.
            *basis: the basis that x was encoded with, if any.
        """

    def weight_gradient(
        self, parts: Sequence[Tensor], dy: Tensor, *basis: Tensor, outer: Outer | None = None
    ) -> Tensor:
        """x^T dy, (n, o), without x; dy is (m, o). Asked only where nothing else reads x.

        With `outer`, x_e^T dy_e of each group of rows, (E, n, o). Only codecs with a subspace are
        asked for that.
        """
        raise NotImplementedError(f"{self.name} has to be decoded")

    def weight_gradient_transposed(
        self, parts: Sequence[Tensor], dy_t: Tensor, *basis: Tensor, outer: Outer | None = None
    ) -> Tensor:
        """dy^T x, (o, n), without x; dy^T is (o, m). Asked only where nothing else reads x.

        With `outer`, dy_e^T x_e of each group of rows, (E, o, n). Only codecs with a subspace are
        asked for that.
        """
        raise NotImplementedError(f"{self.name} has to be decoded")

    # -- bytes ------------------------------------------------------------------------------------

    @abstractmethod
    def stored_nbytes(self, rows: int, itemsize: int) -> int:
        """Bytes stored for this many rows of elements of `itemsize` bytes."""

    def state_nbytes(self, itemsize: int) -> int:
        """Bytes that live as long as the parameter that owns them."""
        return 0


def times(x: Tensor, factor: float) -> Tensor:
    """`x * factor`, without an operator in the graph when there is nothing to multiply."""
    return x if factor == 1.0 else x * factor
