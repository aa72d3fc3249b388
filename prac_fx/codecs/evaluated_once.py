"""Operators whose loops evaluate an operand once, however often their formula names it.

Inductor inlines what makes an operand at each place where the operand is read. A formula such as
`x ^ (x >> 16)` doubles the code before it. Four of them in a row make a loop of hundreds of
operations, which generating code has to go through again and again, before the C++ or Triton
compiler finds that most of them are the same. An operator with a lowering of its own reads each
operand once.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from prac_fx.torch_compat import inductor_ops, make_pointwise, register_lowering

_LIBRARY: Any = torch.library.Library("prac_fx", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("mixed(Tensor words, int shift, int multiplier, int mask) -> Tensor")
_LIBRARY.define("rotated(Tensor rows, Tensor columns) -> Tensor")
_LIBRARY.define("rounded(Tensor scaled, Tensor rows, Tensor columns, int bias) -> Tensor")

_BITS_OF_WHOLE = 0x4B40_0000  # of 1.5 * 2^23 as a float32


def mixed(words: Tensor, shift: int, multiplier: int, mask: int) -> Tensor:
    """A round of a hash: ((words ^ (words >> shift)) * multiplier) & mask.

    Args:
        words: int64, of any shape, such that no product reaches 2^63.
        shift: to the right.
        multiplier: of each word.
        mask: of the bits to keep.
    """
    result: Tensor = torch.ops.prac_fx.mixed.default(words, shift, multiplier, mask)
    return result


def rotated(rows: Tensor, columns: Tensor) -> Tensor:
    """frac(a + m b), where the fraction of `rows` is a, its whole part m, and `columns` is b.

    Args:
        rows: float32, not negative.
        columns: float32, of a shape that `rows` broadcasts against.
    """
    result: Tensor = torch.ops.prac_fx.rotated.default(rows, columns)
    return result


def rounded(scaled: Tensor, rows: Tensor, columns: Tensor, bias: int) -> Tensor:
    """`scaled` rounded up or down to a whole number, plus `bias`.

    The kernel has no conversion in it, which a GPU does at a fraction of its rate. A float32 near
    1.5 * 2^23 has no places behind the point, so adding that number rounds to the nearest whole
    one, and the lowest bits of the sum are the result.

    Args:
        scaled: float32, at most 2^21 in size.
        rows: `rounding.row_numbers`, in a shape that broadcasts against `scaled`.
        columns: likewise `rounding.column_numbers`.
        bias: a whole number.

    Returns:
        int32: the nearest to `scaled` + u - 1/2, where u is `rotated(rows, columns)`.
    """
    result: Tensor = torch.ops.prac_fx.rounded.default(scaled, rows, columns, bias)
    return result


@torch.library.impl(_LIBRARY, "mixed", "CompositeExplicitAutograd")
def _mixed(words: Tensor, shift: int, multiplier: int, mask: int) -> Tensor:
    return ((words ^ (words >> shift)) * multiplier) & mask


@torch.library.impl(_LIBRARY, "rotated", "CompositeExplicitAutograd")
def _rotated(rows: Tensor, columns: Tensor) -> Tensor:
    multiplier = rows.floor()
    total = (rows - multiplier) + multiplier * columns
    return total - total.floor()


@torch.library.impl(_LIBRARY, "rounded", "CompositeExplicitAutograd")
def _rounded(scaled: Tensor, rows: Tensor, columns: Tensor, bias: int) -> Tensor:
    return (scaled + (_rotated(rows, columns) - 0.5)).round().to(torch.int32) + bias


@register_lowering(torch.ops.prac_fx.mixed.default, type_promotion_kind=None)
def _lower_mixed(words: Any, shift: int, multiplier: int, mask: int) -> Any:
    constant = partial(inductor_ops.constant, dtype=torch.int64)

    def of_a_word(word: Any) -> Any:
        shifted = inductor_ops.bitwise_right_shift(word, constant(shift))
        product = inductor_ops.mul(inductor_ops.bitwise_xor(word, shifted), constant(multiplier))
        return inductor_ops.bitwise_and(product, constant(mask))

    return make_pointwise(of_a_word)(words)


def _turned(row: Any, column: Any, back: Any = None) -> Any:
    """a + m b, of which `rotated` is the fraction; less `back`, if that is given."""
    multiplier = inductor_ops.floor(row)
    offset = inductor_ops.sub(row, multiplier)
    if back is not None:
        offset = inductor_ops.sub(offset, back)
    return inductor_ops.add(offset, inductor_ops.mul(multiplier, column))


@register_lowering(torch.ops.prac_fx.rotated.default, broadcast=True, type_promotion_kind=None)
def _lower_rotated(rows: Any, columns: Any) -> Any:
    def of_an_element(row: Any, column: Any) -> Any:
        total = _turned(row, column)
        return inductor_ops.sub(total, inductor_ops.floor(total))

    return make_pointwise(of_an_element)(rows, columns)


@register_lowering(torch.ops.prac_fx.rounded.default, broadcast=True, type_promotion_kind=None)
def _lower_rounded(scaled: Any, rows: Any, columns: Any, bias: int) -> Any:
    number, whole = inductor_ops.constant, 1.5 * 2.0**23

    def of_an_element(element: Any, row: Any, column: Any) -> Any:
        total = _turned(row, column, back=number(0.5, torch.float32))
        # never half way between two whole numbers, so this is the floor of the total plus 1/2
        nearest = inductor_ops.add(total, number(whole, torch.float32))
        nearest = inductor_ops.sub(nearest, number(whole, torch.float32))
        moved = inductor_ops.add(element, inductor_ops.sub(total, nearest))
        moved = inductor_ops.add(moved, number(whole + bias, torch.float32))
        bits = inductor_ops.to_dtype_bitcast(moved, torch.int32, torch.float32)
        return inductor_ops.sub(bits, number(_BITS_OF_WHOLE, torch.int32))

    return make_pointwise(of_an_element, override_return_dtype=torch.int32)(scaled, rows, columns)
