"""Refresh what is due: new principal bases and tails for several sites at once.

Sites that are alike go through the linear algebra as one batch. On a GPU a batch of small bases
takes about as long as one of them. Nothing here waits for the device: whether rows hold any
information, or a basis is damaged, is decided there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from prac_fx.codecs.subspace import (
    basis_error,
    is_sound,
    join_basis,
    refreshed_basis,
    working_dtype,
)
from prac_fx.runtime.subspace_state import Subspace

# Of float64 numbers in a batch of bases. Larger ones take longer in proportion, and more memory.
_BATCH_NBYTES = 8 << 20


@torch.no_grad()
def refresh(due: Sequence[Subspace]) -> None:
    """Give each of these states a new tail, and the principal basis that its rows say, if due.

    Bases are changed in place. What is damaged (not finite, not orthonormal) starts again from
    coordinate axes. What the linear algebra finds no basis for keeps the old one.

    Args:
        due: states whose `begin_step` said so in this step.
    """
    draws = {subspace: subspace.next_draw() for subspace in due}
    for iterations in sorted({iterations for _, iterations in draws.values()}):
        for batch in batches([one for one in due if draws[one][1] == iterations]):
            _refresh_alike(batch, [draws[one][0] for one in batch], iterations)


def stagger(subspaces: Sequence[Subspace]) -> None:
    """Spread the refreshes of a graph's states evenly over the interval, batch by batch.

    Where that begins differs from graph to graph, because blocks may be compiled one by one.

    Args:
        subspaces: in the order of the plan, which is the same on each rank.
    """
    groups = list(batches(subspaces))
    if not groups:
        return
    start = int(subspaces[0].stream[:8], 16)
    for number, batch in enumerate(groups):
        for subspace in batch:
            every = subspace.refresh_every
            subspace.phase = (start + number * every // len(groups)) % every


def batches(subspaces: Sequence[Subspace]) -> Iterator[Sequence[Subspace]]:
    """The states by kind, in batches that are small enough to be refreshed at once."""
    alike = defaultdict(list)
    for subspace in subspaces:
        key = subspace.key
        alike[key.codec, key.dtype, subspace.basis.device].append(subspace)
    for (codec, _, _), same in alike.items():
        nbytes = 8 * codec.features * codec.rank // codec.blocks
        count = max(1, _BATCH_NBYTES // nbytes)
        for begin in range(0, len(same), count):
            yield same[begin : begin + count]


def _refresh_alike(
    subspaces: Sequence[Subspace], generators: Sequence[torch.Generator], iterations: int
) -> None:
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
            for subspace, generator in zip(subspaces, generators, strict=True)
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
