"""The pass `find_sentinels`: which values hold numbers that stand for "nothing here".

    scores = where(mask, -1e9, scores)      a single such number sets the scale of its group,
                                            and every real score beside it decodes to zero

Sources of sentinels are constants of large magnitude. `where` or padding writes them, or they are
multiplied with something that depends only on the step's data, as in `(1 - mask) * -10000`. A mask
that is an input of the graph counts, too, if it is of floating point and is added to scores, which
are products of activations. The trail of a sentinel goes through elementwise operators and views.
It ends where large numbers become bounded ones.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from typing import Literal

import torch.fx as fx

from prac_fx.graph.graph_edit import tensor_value
from prac_fx.passes.chains import is_cheap
from prac_fx.passes.operators import operator_name, operator_of
from prac_fx.passes.ranges import number
from prac_fx.torch_compat import argument_index

Sign = Literal["negative", "positive"]
_NOTHING: frozenset[Sign] = frozenset()
_BOTH: frozenset[Sign] = frozenset(("negative", "positive"))

# An activation is smaller than this in magnitude; a constant beyond it is no scale factor.
_LARGE = 1000.0
_BOUNDED = frozenset(
    """aten.sigmoid aten.tanh aten.erf aten.erfc aten.sin aten.cos aten.atan aten._softmax
    aten.softmax aten.sign aten.sgn aten.rsqrt aten.reciprocal aten.eq aten.ne aten.lt aten.le
    aten.gt aten.ge aten.argmax aten.argmin""".split()
)
_WITHOUT_NEGATIVE = frozenset(
    """aten.exp aten.exp2 aten.relu aten.silu aten.gelu aten.softplus aten.amax aten.max
    aten.clamp_min""".split()
)
_EXTREMES = frozenset("aten.amax aten.max aten.amin aten.min".split())
_WITHOUT_POSITIVE = frozenset("aten.amin aten.min aten.clamp_max".split())
# These write an argument into another one, or add it.
_WRITES = frozenset(
    "aten.where aten.masked_fill aten.index_put aten.scatter aten.constant_pad_nd aten.fill".split()
)


def sentinels(
    graph: fx.Graph, backward: Collection[fx.Node], parameters: Collection[int]
) -> Mapping[fx.Node, fx.Node]:
    """The forward values that may hold sentinels, each with the operator that brought them in.

    Args:
        graph: the joint graph.
        backward: its nodes that depend on the tangents.
        parameters: argument indices of parameters.
    """
    signs: dict[fx.Node, frozenset[Sign]] = {}
    origin: dict[fx.Node, fx.Node] = {}
    placeholders = graph.find_nodes(op="placeholder")
    learned = _depending(graph, [p for p in placeholders if argument_index(p) in parameters])
    data = _depending(graph, [p for p in placeholders if argument_index(p) not in parameters])
    for node in graph.nodes:
        if node.op != "call_function" or node in backward:
            continue
        held = _written(node, learned, data)
        source = node
        for arg in node.all_input_nodes:
            more = _handed_on(node, arg, signs.get(arg, _NOTHING))
            if more:
                held, source = held | more, origin[arg]
        if held:
            signs[node], origin[node] = held, source
    return origin


def _depending(graph: fx.Graph, sources: Collection[fx.Node]) -> set[fx.Node]:
    depending = set(sources)
    for node in graph.nodes:
        if any(arg in depending for arg in node.all_input_nodes):
            depending.add(node)
    return depending


def _handed_on(node: fx.Node, arg: fx.Node, signs: frozenset[Sign]) -> frozenset[Sign]:
    """What is left of an argument's sentinels in the result."""
    if not signs or node.target is operator.getitem:
        return signs
    name = operator_name(node)
    value = tensor_value(node)
    if name in _BOUNDED:
        return _NOTHING
    if value is not None and not value.dtype.is_floating_point:
        return _NOTHING
    if name not in _EXTREMES and not is_cheap(node):
        return _NOTHING
    if name in _WITHOUT_NEGATIVE:
        return signs - {"negative"}
    if name in _WITHOUT_POSITIVE:
        return signs - {"positive"}
    if name == "aten.neg" or (name == "aten.sub" and arg is node.args[1]):
        return _flipped(signs)
    if name in ("aten.mul", "aten.div"):
        factor = number(node.args[1])
        if factor is not None:
            return signs if factor > 0 else _flipped(signs)
    is_sum = operator_of(node).response(0) in ("linear", "discontinuous")
    return signs if is_sum and name != "aten.rsub" else _BOTH


def _flipped(signs: frozenset[Sign]) -> frozenset[Sign]:
    return frozenset("positive" if sign == "negative" else "negative" for sign in signs)


def _written(
    node: fx.Node, learned: Collection[fx.Node], data: Collection[fx.Node]
) -> frozenset[Sign]:
    """Sentinels that the node itself brings in."""
    name = operator_name(node)
    if name in _WRITES:
        given = [number(arg) for arg in (*node.args, *node.kwargs.values())]
        return _signs(*given)
    if name == "aten.mul" and node not in learned:
        return _BOTH if _signs(*map(number, node.args)) else _NOTHING
    if name in ("aten.add", "aten.sub"):
        numbers = _signs(*map(number, node.args[:2]))
        return numbers or (_BOTH if _adds_a_mask(node, learned, data) else _NOTHING)
    return _NOTHING


def _signs(*numbers: float | None) -> frozenset[Sign]:
    signs: set[Sign] = set()
    for value in numbers:
        if value is not None and abs(value) >= _LARGE:
            signs.add("positive" if value > 0 else "negative")
    return frozenset(signs)


def _adds_a_mask(node: fx.Node, learned: Collection[fx.Node], data: Collection[fx.Node]) -> bool:
    """Is an input that is not learned added to scores, that is to a product of two activations?"""
    summands = [_behind(arg) for arg in node.args[:2] if isinstance(arg, fx.Node)]
    if len(summands) != 2:
        return False
    for mask, scores in (summands, summands[::-1]):
        value = tensor_value(mask)
        if mask.op != "placeholder" or mask in learned or value is None:
            continue
        factors = [arg for arg in scores.all_input_nodes if arg in learned and arg in data]
        is_product = operator_name(scores) in _MATMULS and len(set(factors)) > 1
        if value.dtype.is_floating_point and is_product:
            return True
    return False


def _behind(node: fx.Node) -> fx.Node:
    """The node behind views, casts and constant factors."""
    while node.op == "call_function":
        name = operator_name(node)
        is_scaled = name in ("aten.mul", "aten.div") and len(node.all_input_nodes) == 1
        if not is_scaled and name not in _UNCHANGED:
            break
        node = node.all_input_nodes[0]
    return node


_MATMULS = ("aten.mm", "aten.bmm", "aten.baddbmm")
_UNCHANGED = frozenset(
    """aten.view aten._unsafe_view aten.expand aten.unsqueeze aten.squeeze aten.permute aten.slice
    aten.select aten.clone aten._to_copy prims.convert_element_type""".split()
)
