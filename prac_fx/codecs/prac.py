"""The PRAC codec: coordinates in a principal plus a random subspace.

Source: arXiv 2602.23111, section 4. With P = [Q1, sqrt(k) Q2] a value X (m tokens, n features) is
stored as C = X P and stands for X~ = C P^T = X P P^T. A weight gradient X~^T dY = P (C^T dY) never
needs X~ itself. `rac` is the case r1 = 0, `pac` the case r2 = 0 (biased).

Letters: m tokens, n features, r = r1 + r2 coordinates, B blocks (n and r are divided by B within a
block), o outputs, E a batch of independent matrices (experts) that share one basis.

Layout of the coordinates: B = 1 stores C, shape (..., m, r). B > 1 stores the transposes block by
block, shape (B, r / B, m). Then both the encoding and the weight gradient are plain batched matmuls
without a copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prac_fx.codecs.base import Codec, Outer, SubspaceShape, times
from prac_fx.codecs.subspace import tail_scale


@dataclass(frozen=True)
class PracCodec(SubspaceShape, Codec):
    """A value as coordinates in a principal plus a random subspace.

    The fields are those of `SubspaceShape`.
    """

    @property
    def scale(self) -> float:
        """k = (n - r1) / r2 (Theorem 6)."""
        return tail_scale(self.features, self.principal, self.random)

    @property
    def name(self) -> str:
        """`prac`, or `rac` (no principal part), or `pac` (no random part)."""
        if not self.principal:
            return "rac"
        return "prac" if self.random else "pac"

    def describe(self) -> str:
        """Short text for tables, such as `prac 76+76/256` or `prac 408+408/1376 x4`."""
        blocks = f" x{self.blocks}" if self.blocks > 1 else ""
        return f"{self.name} {self.principal}+{self.random}/{self.features}{blocks}"

    @property
    def is_unbiased(self) -> bool:
        """Without a random part (`pac`), what lies outside of the principal subspace is lost."""
        return self.random > 0

    @property
    def subspace(self) -> SubspaceShape:
        """Its own."""
        return self

    # -- tensors ----------------------------------------------------------------------------------

    def encode(self, x: Tensor, basis: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        """Coordinates of `x`.

        Args:
            x: (m, n), or (E, m, n) when there is one block.
            basis: `basis_shape`, dtype of `x`.

        Returns:
            One tensor, (m, r), (E, m, r), or (B, r / B, m); dtype of `x`. It is finite as long as
            the norm of each token, times sqrt(k), is within the range of float32. This holds for
            float16, too.
        """
        basis = self._guarded(basis)
        if self.blocks == 1:
            if x.dim() == 2:
                return (x.mm(basis),)
            flat = x.reshape(-1, self.features).mm(basis)
            return (flat.view(x.shape[0], -1, self.rank),)
        per_block = x.view(-1, self.blocks, self.features // self.blocks)
        return (basis.mT.bmm(per_block.permute(1, 2, 0)),)

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype, *basis: Tensor) -> Tensor:
        """X~ = C P^T, the unbiased estimate of x, in the shape that was encoded."""
        return self._decoded(*parts, *basis)

    def _decoded(self, coordinates: Tensor, basis: Tensor) -> Tensor:
        if self.blocks == 1:
            flat = coordinates if coordinates.dim() == 2 else coordinates.reshape(-1, self.rank)
            decoded = times(flat.mm(basis.mT), self._unguard(basis.dtype))
            if coordinates.dim() == 2:
                return decoded
            return decoded.view(*coordinates.shape[:-1], self.features)
        per_block = times(basis.bmm(coordinates), self._unguard(basis.dtype))  # (B, n / B, m)
        return per_block.permute(2, 0, 1).reshape(-1, self.features)

    def weight_gradient(
        self, parts: Sequence[Tensor], dy: Tensor, *basis: Tensor, outer: Outer | None = None
    ) -> Tensor:
        """X~^T dY without X~: P (C^T dY), 2 m r o + 2 n r o FLOPs instead of 2 m n o.

        Args:
            parts: what `encode` returned.
            dy: (m, o), or (E, m, o).
            *basis: the basis it was encoded with.
            outer: of grouped rows: gives C_e^T dY_e of each group e. There is one block then.

        Returns:
            (n, o), or (E, n, o); dtype of `dy`.
        """
        return self._gradient(dy, *parts, *basis, outer=outer)

    def _gradient(
        self, dy: Tensor, coordinates: Tensor, basis: Tensor, *, outer: Outer | None = None
    ) -> Tensor:
        unguard = self._unguard(dy.dtype)
        if outer is not None:
            small = times(outer(coordinates, dy), unguard)
            return basis.expand(small.shape[0], -1, -1).bmm(small)
        if self.blocks == 1:
            if dy.dim() == 2:
                return basis.mm(times(coordinates.mT.mm(dy), unguard))
            small = times(coordinates.mT.bmm(dy), unguard)
            return basis.expand(dy.shape[0], -1, -1).bmm(small)
        small = times(coordinates.view(self.rank, -1).mm(dy), unguard)
        per_block = small.view(self.blocks, self.rank // self.blocks, -1)
        return basis.bmm(per_block).view(self.features, -1)

    def weight_gradient_transposed(
        self, parts: Sequence[Tensor], dy_t: Tensor, *basis: Tensor, outer: Outer | None = None
    ) -> Tensor:
        """dY^T X~ without X~: (dY^T C) P^T, the form that `F.linear` needs.

        Args:
            parts: what `encode` returned.
            dy_t: (o, m), or (E, o, m).
            *basis: the basis it was encoded with.
            outer: of grouped rows: gives dY_e^T C_e of each group e. There is one block then.

        Returns:
            (o, n), or (E, o, n); dtype of `dy_t`.
        """
        return self._gradient_transposed(dy_t, *parts, *basis, outer=outer)

    def _gradient_transposed(
        self, dy_t: Tensor, coordinates: Tensor, basis: Tensor, *, outer: Outer | None = None
    ) -> Tensor:
        if outer is not None:
            small = times(outer(dy_t.mT, coordinates), self._unguard(dy_t.dtype))
            flat = small.reshape(-1, self.rank).mm(basis.mT)
            return flat.view(*small.shape[:-1], self.features)
        if self.blocks > 1:
            # the blocks of this result lie where they belong, without a copy
            return self._gradient(dy_t.mT, coordinates, basis).mT
        unguard = self._unguard(dy_t.dtype)
        if dy_t.dim() == 2:
            return times(dy_t.mm(coordinates), unguard).mm(basis.mT)
        small = times(dy_t.bmm(coordinates), unguard)
        return small.bmm(basis.mT.expand(dy_t.shape[0], -1, -1))

    def _guarded(self, basis: Tensor) -> Tensor:
        unguard = self._unguard(basis.dtype)
        return basis if unguard == 1.0 else basis * (1.0 / unguard)

    def _unguard(self, dtype: torch.dtype) -> float:
        """The power of two that float16 coordinates are divided by when they are stored.

        A coordinate is at most |x| sqrt(k), and |x| is at most sqrt(n) times the largest feature.
        In float16 that can overflow where x itself does not. Other dtypes have the range.
        """
        if dtype != torch.float16:
            return 1.0
        n = self.features / self.blocks
        return 2.0 ** math.ceil(math.log2(math.sqrt(n * max(self.scale, 1.0))))

    # -- sizes and costs --------------------------------------------------------------------------

    def stored_nbytes(self, rows: int, itemsize: int) -> int:
        """Bytes stored for this many tokens."""
        return rows * self.rank * itemsize

    def state_nbytes(self, itemsize: int) -> int:
        """Bytes that live as long as the parameter: the basis and the sampled rows."""
        basis = self.features * self.rank // self.blocks
        return (basis + self.sample_rows * self.features) * itemsize
