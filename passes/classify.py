"""The pass `classify`: split a joint graph into forward values and what depends on the tangents.

    primals_1, tangents_1                          forward: primals_1, relu
    relu = relu(primals_1)                         backward: tangents_1, mul
    mul = mul(tangents_1, relu)                    crossing: relu
    return relu, mul

Backward is linear in the tangents, so a crossing value enters it as a coefficient.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.fx as fx

from prac_fx.torch_compat import argument_index

_ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor)


@dataclass(frozen=True)
class Classification:
    """Nodes of one joint graph.

    Attributes:
        backward: nodes that depend on a tangent, the tangents included.
        crossing: forward nodes that a backward node reads, in graph order.
        activations: forward nodes that depend on the step's data, not on parameters and buffers
            alone.
        before_parameters: forward nodes that meet a parameter later on in this graph. A bias that
            is added does not count: what comes before it belongs to the loss, too. The other nodes
            are the loss, or may be part of it: a graph may return log-probabilities, and code
            outside makes the loss of them.
    """

    backward: frozenset[fx.Node]
    crossing: tuple[fx.Node, ...]
    activations: frozenset[fx.Node]
    before_parameters: frozenset[fx.Node]


def classify(
    graph: fx.Graph,
    static_arguments: Collection[int] = (),
    parameters: Collection[int] = (),
) -> Classification:
    """Classify every node of a joint graph; reads only.

    Args:
        graph: the joint graph.
        static_arguments: argument indices of parameters and buffers.
        parameters: argument indices of parameters, frozen ones included.
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
    before = _before_parameters(graph, backward, activations, parameters)
    return Classification(frozenset(backward), crossing, activations, before)


def _activations(
    graph: fx.Graph, backward: Collection[fx.Node], static_arguments: Collection[int]
) -> frozenset[fx.Node]:
    activations: set[fx.Node] = set()
    for node in graph.nodes:
        if node in backward or node.op == "output":
            continue
        is_data = node.op == "placeholder" and argument_index(node) not in static_arguments
        if is_data or any(arg in activations for arg in node.all_input_nodes):
            activations.add(node)
    return frozenset(activations)


def _before_parameters(
    graph: fx.Graph,
    backward: Collection[fx.Node],
    activations: Collection[fx.Node],
    parameters: Collection[int],
) -> frozenset[fx.Node]:
    # what is computed from parameters alone, such as a cast weight, counts as a parameter
    weights: set[fx.Node] = set()
    for node in graph.nodes:
        is_parameter = node.op == "placeholder" and argument_index(node) in parameters
        from_weights = any(arg in weights for arg in node.all_input_nodes)
        if is_parameter or (from_weights and node not in activations and node not in backward):
            weights.add(node)
    before: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node in backward or node in weights:
            continue
        forward_users = [user for user in node.users if user not in backward]
        if any(
            user in before or (user.target not in _ADDITIONS and weights & {*user.all_input_nodes})
            for user in forward_users
            if user.op != "output"
        ):
            before.add(node)
    return frozenset(before)
