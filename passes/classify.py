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
from typing import Any

import torch.fx as fx

from prac_fx.graph_edit import tensor_value
from prac_fx.torch_compat import argument_index


@dataclass(frozen=True)
class Classification:
    """Nodes of one joint graph.

    Attributes:
        backward: nodes that depend on a tangent, the tangents included.
        crossing: forward nodes that a backward node reads, in graph order.
        activations: forward nodes that depend on the step's data, not on parameters and buffers alone.
        before_parameters: forward nodes that meet a parameter later on, in this graph or, for all we know, behind
            an output that is not a loss (one number, or one for each sample). The others are the loss.
    """

    backward: frozenset[fx.Node]
    crossing: tuple[fx.Node, ...]
    activations: frozenset[fx.Node]
    before_parameters: frozenset[fx.Node]


def classify(
    graph: fx.Graph,
    static_arguments: Collection[int] = (),
    parameters: Collection[int] = (),
    num_fwd_outputs: int = 0,
) -> Classification:
    """Classify every node of a joint graph; reads only.

    Args:
        graph: the joint graph.
        static_arguments: argument indices of parameters and buffers.
        parameters: argument indices of parameters, frozen ones included.
        num_fwd_outputs: how many of the graph's outputs are forward outputs.
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
    activations = _activations(graph, backward, static_arguments)
    outputs: Any = next(iter(graph.find_nodes(op="output"))).args[0]
    results = {node for node in outputs[:num_fwd_outputs] if not _is_loss(node)}
    before = _before_parameters(graph, backward, activations, parameters, results)
    return Classification(frozenset(backward), crossing, activations, before)


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


def _is_loss(node: object) -> bool:
    value = tensor_value(node) if isinstance(node, fx.Node) else None
    return value is None or value.dim() <= 1


def _before_parameters(
    graph: fx.Graph,
    backward: Collection[fx.Node],
    activations: Collection[fx.Node],
    parameters: Collection[int],
    results: Collection[fx.Node],
) -> frozenset[fx.Node]:
    # what is computed from parameters alone counts as a parameter: a cast or a transposed weight
    weights: set[fx.Node] = set()
    for node in graph.nodes:
        is_parameter = node.op == "placeholder" and argument_index(node) in parameters
        from_weights = any(arg in weights for arg in node.all_input_nodes)
        if is_parameter or (from_weights and node not in activations and node not in backward):
            weights.add(node)
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node in backward or node in weights:
            continue
        forward_users = [user for user in node.users if user not in backward]
        if node in results or any(
            user in found or any(arg in weights for arg in user.all_input_nodes)
            for user in forward_users
            if user.op != "output"
        ):
            found.add(node)
    return frozenset(found)
