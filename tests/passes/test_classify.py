"""The pass `classify`: forward values, backward values, crossing values, activations."""

from __future__ import annotations

import torch
from torch.fx import Graph

from prac_fx.passes.classify import classify


def test_a_node_is_backward_when_it_depends_on_a_tangent() -> None:
    graph = Graph()
    primal, tangent = graph.placeholder("primals_1"), graph.placeholder("tangents_1")
    forward = graph.call_function(abs, (primal,))
    constant = graph.call_function(max, (1, 2))
    product = graph.call_function(pow, (tangent, forward))
    last = graph.call_function(divmod, (product, constant))
    graph.output((forward, last))
    found = classify(graph)
    assert found.backward == {tangent, product, last}
    assert found.crossing == (forward, constant)
    assert classify(graph) == found  # looks, and changes nothing


def test_activations_depend_on_data_and_not_on_parameters_alone() -> None:
    graph = Graph()
    weight, x = graph.placeholder("primals_1"), graph.placeholder("primals_2")
    for index, node in enumerate((weight, x)):
        node.meta["desc"] = type("PlainAOTInput", (), {"idx": index})()
    cast = graph.call_function(abs, (weight,))
    product = graph.call_function(pow, (x, cast))
    graph.output((product,))
    assert classify(graph, static_arguments=(0,)).activations == {x, product}


def test_a_graph_without_tangents_has_no_backward() -> None:
    graph = Graph()
    graph.output((graph.call_function(abs, (graph.placeholder("primals_1"),)),))
    found = classify(graph)
    assert not found.backward
    assert found.crossing == ()


def test_a_bias_that_is_added_to_logits_is_no_parameter_behind_them() -> None:
    graph = Graph()
    x, weight, bias = (graph.placeholder(name) for name in ("x", "weight", "bias"))
    for index, node in enumerate((x, weight, bias)):
        node.meta["desc"] = type("PlainAOTInput", (), {"idx": index})()
    body = graph.call_function(torch.ops.aten.sin.default, (x,))
    logits = graph.call_function(torch.ops.aten.mm.default, (body, weight))
    shifted = graph.call_function(torch.ops.aten.add.Tensor, (logits, bias))
    graph.output((shifted,))
    found = classify(graph, (1, 2), (1, 2))
    assert found.before_parameters == {x, body}
