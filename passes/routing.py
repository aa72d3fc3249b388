"""Part of `plan`: the scores and weights of routers, which stay exact.

    logits = mm(x, router)              the router's matmul, and what is computed of its result up
    scores = softmax(logits)            to the top-k that chooses the experts
    weights, chosen = topk(scores)
    offs = cumsum(histc(chosen))        the choice: it leads to the rows that each expert gets
    out = _grouped_mm(x[order], w, offs)
    out * weights[order]                what is computed of the weights alone

They are a few numbers for each token. Noise in them would scale whole experts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch.fx as fx

from prac_fx.graph.graph_edit import row_gather, tensor_value
from prac_fx.passes.operators import operator_name
from prac_fx.passes.weight_products import FORWARD_OFFSETS

_TOP_K = "aten.topk"
_MATMULS = frozenset(
    """aten.mm aten.addmm aten.bmm aten.baddbmm aten.mv aten.addmv aten.convolution aten._grouped_mm
    transformers.grouped_mm_fallback""".split()
)


def routing(graph: fx.Graph, activations: Collection[fx.Node]) -> frozenset[fx.Node]:
    """The floating-point forward nodes that choose or scale experts; reads only.

    Args:
        graph: the joint graph.
        activations: its forward nodes that depend on the step's data.
    """
    choices = _choices(graph, activations)
    scores = _before(choices, activations)
    found = {node for node in scores if _is_float(node)}
    if not found:
        return frozenset()
    for node in graph.nodes:
        if node not in activations or not _is_float(node) or operator_name(node) in _MATMULS:
            continue
        inputs = [arg for arg in node.all_input_nodes if arg in activations]
        is_scaled = any(arg in found or arg in choices for arg in inputs)
        if is_scaled and all(arg in found or arg in choices or _is_choice(arg) for arg in inputs):
            found.add(node)
    return frozenset(found)


def _choices(graph: fx.Graph, activations: Collection[fx.Node]) -> set[fx.Node]:
    """The top-k operators whose result tells the experts their rows."""
    pending = [node for node in _rows_of_experts(graph, activations) if node in activations]
    seen, choices = set(pending), set()
    while pending:
        node = pending.pop()
        if operator_name(node) == _TOP_K:
            choices.add(node)
            continue
        if operator_name(node) in _MATMULS:
            continue
        fresh = [arg for arg in node.all_input_nodes if arg in activations and arg not in seen]
        seen.update(fresh)
        pending += fresh
    return choices


def _rows_of_experts(graph: fx.Graph, activations: Collection[fx.Node]) -> Iterator[fx.Node]:
    """The ends of the experts' rows, or the numbers of the experts whose weights are taken."""
    for node in graph.nodes:
        position = FORWARD_OFFSETS.get(operator_name(node))
        gathered = row_gather(node)
        if position is not None and len(node.args) > position:
            if isinstance(node.args[position], fx.Node):
                yield node.args[position]
        elif gathered is not None and gathered[0] not in activations:
            yield gathered[1]


def _before(choices: Collection[fx.Node], activations: Collection[fx.Node]) -> set[fx.Node]:
    """What the choices are made from, back to a matmul and its result."""
    pending, found = list(choices), set(choices)
    while pending:
        node = pending.pop()
        if operator_name(node) in _MATMULS or node.op != "call_function":
            continue
        fresh = [arg for arg in node.all_input_nodes if arg in activations and arg not in found]
        found.update(fresh)
        pending += fresh
    return found


def _is_float(node: fx.Node) -> bool:
    value = tensor_value(node)
    return node.op == "call_function" and value is not None and value.dtype.is_floating_point


def _is_choice(node: fx.Node) -> bool:
    """Is it of whole numbers or bools, such as an order?"""
    value = tensor_value(node)
    return value is None or not (value.dtype.is_floating_point or value.dtype.is_complex)
