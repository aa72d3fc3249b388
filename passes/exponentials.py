"""Part of `soundness`: which exponentials end in something bounded.

Decompositions of SiLU, softplus, ELU and their derivatives take such exponentials. Some end in
z / (1 + z) or log(1 + z) with z = exp(x). Others are taken only where their argument is small.
"""

from __future__ import annotations

from typing import Literal

import torch.fx as fx

from prac_fx.passes.chains import is_view
from prac_fx.passes.operators import operator_name
from prac_fx.passes.ranges import number

Form = Literal["plain", "exponential", "one plus exponential"]

# operators whose result is an exponential if their argument is
CARRY = ("aten.expand", "aten.clone", "prims.convert_element_type", "aten._to_copy", "aten.neg")
EXPONENTIALS = ("aten.exp", "aten.exp2", "aten.expm1")
# with z = exp(x): 1 / (1 + z), log(1 + z)
LOGISTIC = {
    ("aten.reciprocal", "one plus exponential"),
    ("aten.log", "one plus exponential"),
    ("aten.log1p", "exponential"),
}


def constant_factor(node: fx.Node) -> float | None:
    """The constant by which a node multiplies its argument; None when it does something else."""
    name = operator_name(node)
    if name not in ("aten.mul", "aten.div") or len(node.args) < 2:
        return None
    left, right = number(node.args[0]), number(node.args[1])
    if name == "aten.div":
        return 1 / right if right else None
    return right if right is not None else left


def is_guarded(where: fx.Node, position: int) -> bool:
    """Does `where` take this branch, an exponential, only where a constant bounds its argument?"""
    mask, branch = where.args[0], where.args[position]
    if not isinstance(mask, fx.Node) or not isinstance(branch, fx.Node) or len(mask.args) < 2:
        return False
    bound, exponent = number(mask.args[1]), _exponent(branch)
    if bound is None or exponent is None or not isinstance(mask.args[0], fx.Node):
        return False
    compared, scale = _base(mask.args[0])
    argument, slope = _base(exponent)
    is_below = {"aten.le": True, "aten.lt": True, "aten.gt": False, "aten.ge": False}
    below = is_below.get(operator_name(mask))
    if below is None or compared is not argument or scale <= 0:
        return False
    return slope > 0 if below is (position == 1) else slope < 0


def _exponent(node: fx.Node) -> fx.Node | None:
    """The argument of an exponential, behind views, constants and gradients that multiply it."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop(0)
        name = operator_name(current)
        if name in EXPONENTIALS:
            return current.all_input_nodes[0]
        if name in (*CARRY, "aten.mul", "aten.view"):
            fresh = [arg for arg in current.all_input_nodes if arg not in seen]
            seen.update(fresh)
            pending += fresh
    return None


def _base(node: fx.Node) -> tuple[fx.Node, float]:
    """A node behind views, casts and constant factors, and the product of the factors."""
    scale = 1.0
    while True:
        factor, name = constant_factor(node), operator_name(node)
        if factor is not None:
            node, scale = node.all_input_nodes[0], scale * factor
        elif name == "aten.neg":
            node, scale = node.all_input_nodes[0], -scale
        elif name in CARRY or is_view(node):
            node = node.all_input_nodes[0]
        else:
            return node, scale
