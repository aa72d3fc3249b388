"""Refresh what is due: new principal bases and tails for many sites at once.

Sites that are alike go through the linear algebra as one batch. Nothing here waits for the device:
whether rows hold any information, or a basis is damaged, is decided there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from prac_fx.codecs import SubspaceShape
from prac_fx.codecs.subspace import (
    basis_error,
    is_sound,
    join_basis,
    refreshed_basis,
    working_dtype,
)
from prac_fx.runtime.subspace_state import Subspace

# Of float64 numbers in a batch of bases. More memory than this would not make it faster.
_BATCH_NBYTES = 64 << 20

# a state, and the generator of its new tail
_Drawn: TypeAlias = tuple[Subspace, torch.Generator]


@torch.no_grad()
def refresh(due: Sequence[Subspace]) -> None:
    """Give each of these states a new tail, and the principal basis that its rows say, if due.

    Bases are changed in place. What is damaged (not finite, not orthonormal) starts again from
    coordinate axes. What the linear algebra finds no basis for keeps the old one.

    Args:
        due: states whose `begin_step` said so in this step.
    """
    alike = defaultdict(list)
    for subspace in due:
        generator, iterations = subspace.next_draw()
        key = (subspace.key.codec, subspace.key.dtype, subspace.basis.device, iterations)
        alike[key].append((subspace, generator))
    for (codec, _, _, iterations), drawn in alike.items():
        for batch in _batches(drawn, codec):
            _refresh_alike(batch, iterations)


def _batches(drawn: Sequence[_Drawn], codec: SubspaceShape) -> Iterator[Sequence[_Drawn]]:
    nbytes = 8 * codec.features * codec.rank // codec.blocks
    count = max(1, _BATCH_NBYTES // nbytes)
    for start in range(0, len(drawn), count):
        yield drawn[start : start + count]


def _refresh_alike(drawn: Sequence[_Drawn], iterations: int) -> None:
    subspaces = [subspace for subspace, _ in drawn]
    codec, dtype = subspaces[0].key.codec, subspaces[0].key.dtype
    r1 = codec.principal // codec.blocks
    old = torch.stack([subspace.basis for subspace in subspaces])
    q1 = _undamaged(old[..., :r1].to(working_dtype(dtype)), r1)
    rows = [subspace.rows for subspace in subspaces if subspace.rows is not None]
    sampled = torch.stack(rows) if iterations else None
    directions = torch.stack(
        [
            torch.randn(
                (*subspace.basis.shape[:-1], codec.random // codec.blocks),
                dtype=q1.dtype,
                device=q1.device,
                generator=generator,
            )
            for subspace, generator in drawn
        ]
    )
    new = join_basis(*refreshed_basis(q1, directions, sampled, iterations))
    is_new = torch.isfinite(new).flatten(1).all(dim=1).view(-1, *[1] * (new.dim() - 1))
    for subspace, basis in zip(subspaces, torch.where(is_new, new, old), strict=True):
        subspace.basis.copy_(basis)


def _undamaged(q1: Tensor, r1: int) -> Tensor:
    """Principal bases, with the first coordinate axes in the place of damaged ones."""
    n = q1.shape[-2]
    axes = torch.eye(n, r1, dtype=q1.dtype, device=q1.device)
    return torch.where(is_sound(basis_error(q1, r1))[..., None, None], q1, axes)
