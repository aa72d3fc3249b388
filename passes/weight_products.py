"""Data of `roles`, `rewrite` and `factor`: the operators that weight gradients are computed with.

    operator                                    what it computes       where the value x stands
    mm, addmm, bmm, baddbmm                     x^T dy, or dy^T x      left (transposed), or right
    _grouped_mm (2-D, 2-D, offs)                the same per expert    likewise
    transformers.grouped_mm_fallback_backward   x^T dy per expert      first, and not transposed

Grouped: the rows of x and dy are sorted by expert, and expert e has the rows from offs[e - 1] up to
offs[e]. The result is a batch (E, n, o), or (E, o, n). Source: derivative of `_grouped_mm` in
torch/csrc/autograd/FunctionsManual.cpp; transformers/integrations/moe.py.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from prac_fx.graph.graph_edit import tensor_value
from prac_fx.passes.operators import operator_name

_aten = torch.ops.aten

EXPERTS_BACKWARD = "transformers.grouped_mm_fallback_backward"
# where grouped matmuls of forward have the ends of the groups
FORWARD_OFFSETS = {
    "aten._grouped_mm": 2,
    "aten._scaled_grouped_mm": 4,
    "transformers.grouped_mm_fallback": 2,
}


@dataclass(frozen=True)
class Product:
    """Where the parts of a weight gradient stand among the arguments of its operator.

    Attributes:
        positions: of the left and the right matrix.
        is_transposed: whether a value on the left stands there transposed.
        summand: position of what is added to the product; None for nothing.
        offsets: position of the ends of the groups; None for a single group.
        result: number of the gradient among several results; None for the only result.
    """

    positions: tuple[int, int]
    is_transposed: bool = True
    summand: int | None = None
    offsets: int | None = None
    result: int | None = None

    def operand(self, node: fx.Node, side: int) -> Any:
        """The matrix on a side: 0 for left, 1 for right."""
        return node.args[self.positions[side]]

    def transposes(self, side: int) -> bool:
        """Does a value, (m, n), stand transposed on this side?"""
        return side == 0 and self.is_transposed

    def gradient(self, node: fx.Node) -> fx.Node | None:
        """The node of the weight gradient; None when nothing reads it."""
        if self.result is None:
            return node
        found = (user for user in node.users if user.target is operator.getitem)
        return next((user for user in found if user.args[1] == self.result), None)

    def groups(self, node: fx.Node) -> fx.Node | None:
        """The node of the ends of the groups; None for a single group."""
        found = None if self.offsets is None else node.args[self.offsets]
        return found if isinstance(found, fx.Node) else None


_PRODUCTS: dict[object, Product] = {
    _aten.mm.default: Product((0, 1)),
    _aten.bmm.default: Product((0, 1)),
    _aten.addmm.default: Product((1, 2), summand=0),
    _aten.baddbmm.default: Product((1, 2), summand=0),
}
_GROUPED = Product((0, 1), offsets=2)
_EXPERTS_BACKWARD = Product((0, 3), is_transposed=False, offsets=2, result=1)


def product_of(node: fx.Node) -> Product | None:
    """How a node computes a weight gradient; None when its operator computes none."""
    if node.target in _PRODUCTS:
        return _PRODUCTS[node.target]
    name = operator_name(node)
    if name == EXPERTS_BACKWARD and len(node.args) == 4:
        return _EXPERTS_BACKWARD
    if name == "aten._grouped_mm" and _contracts_over_groups(node):
        return _GROUPED
    return None


def _contracts_over_groups(node: fx.Node) -> bool:
    """Is it the form of which each group of rows gives a matrix, with nothing but its offsets?"""
    if len(node.args) != 3 or node.kwargs:
        return False
    sides = [tensor_value(arg) if isinstance(arg, fx.Node) else None for arg in node.args[:2]]
    return all(value is not None and value.dim() == 2 for value in sides)
