"""Part of `soundness`: between which numbers a forward value must lie, whatever its inputs are.

x2 = mul(x, x)      [0, inf)
y = add(x2, 1)      [1, inf)        so backward may divide by y, even if x is a decoded value
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.fx as fx

from prac_fx.passes.operators import operator_name

Range = tuple[float, float]
ANYTHING: Range = (-math.inf, math.inf)
_NOT_NEGATIVE: Range = (0.0, math.inf)

# Results that lie in a fixed range.
_FIXED: dict[str, Range] = {
    **dict.fromkeys(("aten.sigmoid", "aten._softmax", "aten.softmax"), (0.0, 1.0)),
    **dict.fromkeys(("aten.tanh", "aten.erf", "aten.sin", "aten.cos"), (-1.0, 1.0)),
    **dict.fromkeys(("aten.square", "aten.sqrt", "aten.rsqrt", "aten.var"), _NOT_NEGATIVE),
    **dict.fromkeys(("aten.softplus", "aten.linalg_vector_norm"), _NOT_NEGATIVE),
    "aten.cosh": (1.0, math.inf),
}
# Results that lie where the first argument lies.
_SAME = frozenset(
    """aten.view aten._unsafe_view aten.reshape aten.permute aten.transpose aten.t aten.unsqueeze
    aten.squeeze aten.expand aten.alias aten.detach aten.clone aten.slice aten.select aten.split
    aten.split_with_sizes aten.unbind aten.index aten.gather aten.index_select aten.flip aten.roll
    aten.repeat aten.as_strided aten.amax aten.amin aten.mean aten.max_pool2d_with_indices
    aten.avg_pool2d aten._to_copy prims.convert_element_type""".split()
)
# Results that are not negative if no argument is.
_SUMS = frozenset(("aten.sum", "aten.cumsum", "aten.cumprod", "aten.prod", "aten.mm", "aten.bmm"))


def ranges(
    graph: fx.Graph, backward: Collection[fx.Node], decoded: Collection[fx.Node]
) -> Mapping[fx.Node, Range]:
    """The range of each forward value that has a range; the others may be anything.

    Args:
        graph: the joint graph.
        backward: its nodes that depend on the tangents.
        decoded: values that backward decodes. An error may take them to zero, so their range
            includes zero.
    """
    known: dict[fx.Node, Range] = {}
    for node in graph.nodes:
        if node.op != "call_function" or node in backward:
            continue
        low, high = _range(node, known)
        if node in decoded:
            low, high = min(low, 0.0), max(high, 0.0)
        if (low, high) != ANYTHING:
            known[node] = low, high
    return known


def number(argument: object) -> float | None:
    """The number that an argument is, or that fills a tensor; None for anything else."""
    if isinstance(argument, bool | int | float):
        return float(argument)
    if not isinstance(argument, fx.Node) or argument.op != "call_function":
        return None
    name = operator_name(argument)
    if name in ("aten.full", "aten.full_like", "aten.scalar_tensor"):
        return number(argument.args[0 if name == "aten.scalar_tensor" else 1])
    return number(argument.args[0]) if name in _SAME else None


def _range(node: fx.Node, known: Mapping[fx.Node, Range]) -> Range:
    constant = number(node)
    if constant is not None:
        return constant, constant
    if node.target is operator.getitem:
        return known.get(node.all_input_nodes[0], ANYTHING)
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and value.dtype == torch.bool:
        return 0.0, 1.0
    name = operator_name(node)
    if name in _FIXED:
        return _FIXED[name]
    arguments = [_range_of(argument, known) for argument in node.args]
    if name in _SAME:
        return arguments[0]
    if name in _SUMS:
        return _NOT_NEGATIVE if all(low >= 0 for low, _ in _tensors(node, known)) else ANYTHING
    if name == "aten.where":
        return _union(arguments[1:3])
    if name == "aten.cat":
        return _union([_range_of(part, known) for part in node.args[0]])  # type: ignore[union-attr]
    rule = _RULES.get(name)
    return ANYTHING if rule is None else rule(node, *arguments)


def _range_of(argument: object, known: Mapping[fx.Node, Range]) -> Range:
    constant = number(argument)
    if constant is not None:
        return constant, constant
    return known.get(argument, ANYTHING) if isinstance(argument, fx.Node) else ANYTHING


def _tensors(node: fx.Node, known: Mapping[fx.Node, Range]) -> list[Range]:
    return [known.get(argument, ANYTHING) for argument in node.all_input_nodes]


def _union(parts: list[Range]) -> Range:
    return min(low for low, _ in parts), max(high for _, high in parts)


def _times(a: Range, b: Range) -> Range:
    products = [x * y if x and y else 0.0 for x in a for y in b]
    return min(products), max(products)


def _add(node: fx.Node, a: Range, b: Range, *_: Range) -> Range:
    alpha = number(node.kwargs.get("alpha", 1))
    if alpha is None:
        return ANYTHING
    low, high = _times(b, (alpha, alpha))
    return a[0] + low, a[1] + high


def _subtract(node: fx.Node, a: Range, b: Range, *_: Range) -> Range:
    return _add(node, a, (-b[1], -b[0]))


def _multiply(node: fx.Node, a: Range, b: Range, *_: Range) -> Range:
    return _square(a) if node.args[0] is node.args[1] else _times(a, b)


def _square(a: Range) -> Range:
    low, high = sorted(abs(end) for end in a)
    return (0.0 if a[0] <= 0 <= a[1] else low**2), high**2


def _divide(node: fx.Node, a: Range, b: Range, *_: Range) -> Range:
    return _times(a, (1 / b[1], 1 / b[0])) if b[0] > 0 else ANYTHING


def _power(node: fx.Node, a: Range, *_: Range) -> Range:
    exponent = number(node.args[1])
    even = exponent is not None and exponent >= 0 and exponent % 2 == 0
    return _NOT_NEGATIVE if even or a[0] >= 0 else ANYTHING


def _exp(node: fx.Node, a: Range, *_: Range) -> Range:
    return math.exp(min(a[0], 700.0)), math.exp(a[1]) if a[1] < 700 else math.inf


def _clamp(node: fx.Node, a: Range, *_: Range) -> Range:
    bounds: list[Any] = [*node.args[1:3], *[None] * (3 - len(node.args))]
    low, high = (None if bound is None else number(bound) for bound in bounds)
    return max(a[0], -math.inf if low is None else low), min(
        a[1], math.inf if high is None else high
    )


_RULES: dict[str, Callable[..., Range]] = {
    "aten.add": _add,
    "aten.sub": _subtract,
    "aten.mul": _multiply,
    "aten.div": _divide,
    "aten.pow": _power,
    "aten.exp": _exp,
    "aten.neg": lambda node, a: (-a[1], -a[0]),
    "aten.abs": lambda node, a: (
        (0.0, max(-a[0], a[1])) if a[0] <= 0 <= a[1] else tuple(sorted((abs(a[0]), abs(a[1]))))
    ),
    "aten.relu": lambda node, a: (max(a[0], 0.0), max(a[1], 0.0)),
    "aten.log1p": lambda node, a: _NOT_NEGATIVE if a[0] >= 0 else ANYTHING,
    "aten.reciprocal": lambda node, a: (1 / a[1], 1 / a[0]) if a[0] > 0 else ANYTHING,
    "aten.clamp": _clamp,
    "aten.clamp_min": lambda node, a, b: (max(a[0], b[0]), max(a[1], b[1])),
    "aten.clamp_max": lambda node, a, b: (min(a[0], b[0]), min(a[1], b[1])),
    "aten.maximum": lambda node, a, b: (max(a[0], b[0]), max(a[1], b[1])),
    "aten.minimum": lambda node, a, b: (min(a[0], b[0]), min(a[1], b[1])),
    "prims.fma": lambda node, a, b, c: _add(node, _multiply(node, a, b), c),
}
