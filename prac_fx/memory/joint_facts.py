"""What a joint graph tells of a step: what is the loss, whose gradient is what."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from prac_fx.graph.graph_edit import tensor_value
from prac_fx.graph.nbytes import size_hint, storage_size
from prac_fx.passes.classify import Classification, classify
from prac_fx.torch_compat import argument_index, gradient_argument_index, result_index


@dataclass(frozen=True)
class JointFacts:
    """Facts of one joint graph, by node name, argument index and position.

    Attributes:
        num_results: how many forward outputs there are.
        loss_result: position of the loss among them; -1 when none is a single floating-point
            number.
        loss: the nodes that belong to the loss: forward what no parameter meets any more, and
            backward the gradients of that. The logits are the first of them.
        logits: those that are computed from what comes before the loss.
        arguments: argument index of each placeholder.
        results: for each forward output its position among the results of Dynamo's graph, or None.
        gradients: for each backward output the argument whose gradient it is, or None.
        symbolic_nbytes: of the storage of each node that has a symbolic size.
    """

    num_results: int
    loss_result: int
    loss: frozenset[str]
    logits: frozenset[str]
    arguments: Mapping[str, int]
    results: tuple[int | None, ...]
    gradients: tuple[int | None, ...]
    symbolic_nbytes: Mapping[str, torch.SymInt]


def joint_facts(graph: fx.Graph, num_results: int, parameters: Collection[int]) -> JointFacts:
    """Look at a joint graph; reads only.

    Args:
        graph: the joint graph.
        num_results: how many of its outputs are forward outputs.
        parameters: argument indices of parameters.
    """
    output = next(iter(graph.find_nodes(op="output")))
    outputs: Any = output.args[0]
    descriptions = list(output.meta.get("desc") or [None] * len(outputs))
    loss_result = next((i for i, one in enumerate(outputs[:num_results]) if _is_number(one)), -1)
    loss: set[fx.Node] = set()
    logits: set[fx.Node] = set()
    if loss_result >= 0:
        found = classify(graph, parameters, parameters)
        loss, logits = _forward_loss(outputs[loss_result], found)
        loss |= _backward_loss(graph, found, loss, parameters)
    return JointFacts(
        num_results,
        loss_result,
        _names(loss),
        _names(logits),
        {
            node.name: index
            for node in graph.find_nodes(op="placeholder")
            if (index := argument_index(node)) is not None
        },
        tuple(map(result_index, descriptions[:num_results])),
        tuple(map(gradient_argument_index, descriptions[num_results:])),
        dict(_symbolic_nbytes(graph)),
    )


def _symbolic_nbytes(graph: fx.Graph) -> Iterator[tuple[str, torch.SymInt]]:
    for node in graph.nodes:
        value = tensor_value(node)
        size = 0 if value is None else storage_size(value)
        if not isinstance(size, int):
            yield node.name, size


def _names(nodes: Collection[fx.Node]) -> frozenset[str]:
    return frozenset(node.name for node in nodes)


def _is_number(output: object) -> bool:
    value = tensor_value(output) if isinstance(output, fx.Node) else None
    return value is not None and value.dtype.is_floating_point and size_hint(value.numel()) == 1


def _forward_loss(
    loss: fx.Node, classification: Classification
) -> tuple[set[fx.Node], set[fx.Node]]:
    """What computes the loss after the last parameter, and what of it reads something before."""
    found: set[fx.Node] = set()
    logits: set[fx.Node] = set()
    pending = [loss]
    while pending:
        node = pending.pop()
        if node in found or node.op != "call_function":
            continue
        found.add(node)
        for argument in node.all_input_nodes:
            if argument not in classification.activations:
                continue
            if argument in classification.before_parameters:
                logits.add(node)
            else:
                pending.append(argument)
    return found, logits


def _backward_loss(
    graph: fx.Graph,
    classification: Classification,
    loss: Collection[fx.Node],
    parameters: Collection[int],
) -> set[fx.Node]:
    """Nodes of backward that depend on nothing but the loss, the tangents and the step's inputs."""
    found: set[fx.Node] = set()
    neutral: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if node in classification.backward:
                found.add(node)
            elif argument_index(node) not in parameters:
                neutral.add(node)
        elif node.op == "call_function":
            arguments: Sequence[fx.Node] = node.all_input_nodes
            if all(one in found or one in neutral or one in loss for one in arguments):
                (found if node in classification.backward else neutral).add(node)
    return found
