"""Pass 1, classify: split a joint graph into forward values and values that depend on the tangents.

    primals_1, tangents_1                          forward: primals_1, relu
    relu = relu(primals_1)                         backward: tangents_1, mul
    mul = mul(tangents_1, relu)                    crossing: relu
    return relu, mul

Backward is linear in the tangents, so a crossing value enters it as a coefficient.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch.fx as fx

from prac_fx.torch_compat import argument_index


@dataclass(frozen=True)
class Classification:
    """Nodes of one joint graph.

    Attributes:
        backward: nodes that depend on a tangent, the tangents included.
        crossing: forward nodes that a backward node reads, in graph order.
        activations: forward nodes that depend on the step's data, not on parameters and buffers alone.
    """

    backward: frozenset[fx.Node]
    crossing: tuple[fx.Node, ...]
    activations: frozenset[fx.Node]


def classify(graph: fx.Graph, static_arguments: Collection[int] = ()) -> Classification:
    """Classify every node of a joint graph; reads only.

    Args:
        graph: the joint graph.
        static_arguments: argument indices of parameters and buffers.
    """
    backward: set[fx.Node] = set()
    for node in graph.nodes:
        is_tangent = node.op == "placeholder" and "tangents" in str(node.target)
        if is_tangent or (
            node.op != "output" and any(arg in backward for arg in node.all_input_nodes)
        ):
            backward.add(node)
    crossing = tuple(
        node
        for node in graph.nodes
        if node not in backward and any(user in backward for user in node.users)
    )
    return Classification(
        frozenset(backward), crossing, _activations(graph, backward, static_arguments)
    )


def _activations(
    graph: fx.Graph, backward: Collection[fx.Node], static_arguments: Collection[int]
) -> frozenset[fx.Node]:
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node in backward or node.op == "output":
            continue
        is_data = node.op == "placeholder" and argument_index(node) not in static_arguments
        if is_data or any(arg in found for arg in node.all_input_nodes):
            found.add(node)
    return frozenset(found)
