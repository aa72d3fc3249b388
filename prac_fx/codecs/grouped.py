"""Products of the rows of each group: what weight gradients of grouped experts are made of.

The rows of a, (m, p), and of b, (m, o), are sorted by group: group e has those from offs[e - 1] up
to offs[e]. The product of a group is a_e^T b_e, (p, o), and zero for a group without rows. Rows
behind the last group are not read.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

_ALIGNMENT_NBYTES = 16


def grouped_outer(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
    """The product of each group, by torch's grouped matmul.

    torch takes rows of whole 16 bytes only (`check_valid_strides` in
    torch/_meta_registrations.py), so columns of zeros are added where a row has not as many.

    Args:
        a: (m, p), bfloat16, or another dtype that torch multiplies so.
        b: (m, o), likewise; either may be a transposed view.
        offs: (E,), int32, the ends of the groups.

    Returns:
        (E, p, o), dtype of `a`.
    """
    p, o = a.shape[1], b.shape[1]
    product = torch._grouped_mm(_aligned(a).mT, _aligned(b), offs=offs)
    return product[:, :p, :o]


def _aligned(x: Tensor) -> Tensor:
    unit = _ALIGNMENT_NBYTES // x.itemsize
    missing = -x.shape[1] % unit
    if missing:
        return pad(x, (0, missing))
    return x


@torch.library.custom_op("prac_fx::looped_outer", mutates_args=())
def _looped_outer(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    product = a.new_zeros(offs.shape[0], a.shape[1], b.shape[1])
    start = 0
    # as transformers does: one synchronisation with the device, for all groups
    for group, end in enumerate(offs.tolist()):
        if start < end:
            torch.mm(a[start:end].mT, b[start:end], out=product[group])
        start = max(start, end)
    return product


@_looped_outer.register_fake
def _(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    return a.new_empty(offs.shape[0], a.shape[1], b.shape[1])


def looped_outer(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
    """The product of each group, one after the other, for dtypes that torch does not group.

    Args:
        a: (m, p), floating point.
        b: (m, o), likewise.
        offs: (E,), int32 or int64, the ends of the groups.

    Returns:
        (E, p, o), dtype of `a`.
    """
    product: Tensor = torch.ops.prac_fx.looped_outer(a, b, offs)
    return product
