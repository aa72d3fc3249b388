"""Counting bytes of fake tensors, symbolic sizes included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import Tensor

# Values of the symbols in symbolic sizes, by name, in one run of a graph.
Symbols = Mapping[str, int]

AS_TRACED: Symbols = {}


def size_hint(size: int | torch.SymInt, symbols: Symbols = AS_TRACED) -> int:
    """A whole number for a size: a symbolic size gives the value that it had while tracing.

    Args:
        size: may be symbolic.
        symbols: their values in another run.
    """
    if isinstance(size, int):
        return size
    found = evaluated(size.node.expr, symbols) if symbols else None
    hint: Any = size.node.hint if found is None else found
    return int(hint) if hint is not None else 0


def expression_of(size: int | torch.SymInt) -> sympy.Expr:
    """A size as an expression."""
    expression: sympy.Expr = sympy.Integer(size) if isinstance(size, int) else size.node.expr
    return expression


def evaluated(expression: sympy.Expr, symbols: Symbols) -> int | None:
    """The value of a size as an expression; None if it has other symbols."""
    names = {one: str(one) for one in expression.free_symbols}
    known = {one: sympy.Integer(symbols[name]) for one, name in names.items() if name in symbols}
    value = expression.xreplace(known)
    return int(value) if value.is_number else None


def is_symbolic(value: Tensor) -> bool:
    """Does the tensor have a dimension that is not a plain number?"""
    return not all(isinstance(size, int) for size in value.shape)


def value_nbytes(value: Tensor) -> int:
    """Bytes of the elements of a tensor."""
    return size_hint(value.numel()) * value.itemsize


def storage_size(value: Tensor) -> int | torch.SymInt:
    """Bytes of the storage behind a tensor: what stays allocated while a view of it is held."""
    try:
        return value.untyped_storage().nbytes()
    except NotImplementedError:
        return value.numel() * value.itemsize


def storage_nbytes(value: Tensor, symbols: Symbols = AS_TRACED) -> int:
    """The same as a whole number, as by `size_hint`."""
    return size_hint(storage_size(value), symbols)


_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def format_nbytes(nbytes: float) -> str:
    """Binary units, such as `1.5 MiB`."""
    unit = 0
    while abs(nbytes) >= 1024 and unit < len(_UNITS) - 1:
        nbytes /= 1024
        unit += 1
    return f"{nbytes:.0f} {_UNITS[unit]}" if unit == 0 else f"{nbytes:.1f} {_UNITS[unit]}"
