"""Counting bytes of fake tensors, symbolic sizes included."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def size_hint(size: int | torch.SymInt) -> int:
    """A whole number for a size: a symbolic size gives the value that it had while tracing."""
    if isinstance(size, int):
        return size
    hint: Any = size.node.hint
    return int(hint) if hint is not None else 0


def is_symbolic(value: Tensor) -> bool:
    """Does the tensor have a dimension that is not a plain number?"""
    return not all(isinstance(size, int) for size in value.shape)


def value_nbytes(value: Tensor) -> int:
    """Bytes of the elements of a tensor."""
    return size_hint(value.numel()) * value.itemsize


def storage_nbytes(value: Tensor) -> int:
    """Bytes of the storage behind a tensor: what stays allocated while a view of it is held."""
    try:
        return size_hint(value.untyped_storage().nbytes())
    except NotImplementedError:
        return value_nbytes(value)


_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def format_nbytes(nbytes: float) -> str:
    """Binary units, such as `1.5 MiB`."""
    unit = 0
    while abs(nbytes) >= 1024 and unit < len(_UNITS) - 1:
        nbytes /= 1024
        unit += 1
    return f"{nbytes:.0f} {_UNITS[unit]}" if unit == 0 else f"{nbytes:.1f} {_UNITS[unit]}"
