"""The fingerprint of a joint graph: what the second phase must meet again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx

from prac_fx.passes.joint_graph import fingerprint

_aten = torch.ops.aten


def _graph(edit: Callable[[fx.Graph, list[fx.Node]], None] = lambda graph, nodes: None) -> str:
    """Fingerprint of a small graph after an edit."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    sine = graph.call_function(_aten.sin.default, (x,))
    cosine = graph.call_function(_aten.cos.default, (sine,))
    scaled = graph.call_function(_aten.mul.Tensor, (cosine, 2.0))
    summed = graph.call_function(_aten.sum.dim_IntList, (scaled, [0]), {"dtype": torch.float32})
    nodes = [x, sine, cosine, scaled, summed]
    for node in nodes:
        node.meta["val"] = torch.empty(4, 4)
    graph.output((summed, None))
    edit(graph, nodes)
    return fingerprint(graph)


def _set(index: int, position: int, value: Any) -> Callable[[fx.Graph, list[fx.Node]], None]:
    return lambda graph, nodes: nodes[index].update_arg(position, value)


EDITS: dict[str, Callable[[fx.Graph, list[fx.Node]], None]] = {
    "wiring": lambda graph, nodes: nodes[2].update_arg(0, nodes[0]),
    "a number": _set(3, 1, 3.0),
    "the type of a number": _set(3, 1, 2),
    "a number in a list": _set(4, 1, [1]),
    "a keyword": lambda graph, nodes: nodes[4].update_kwarg("dtype", torch.float64),
    "the result": lambda graph, nodes: next(iter(graph.find_nodes(op="output"))).update_arg(
        0, (nodes[3], None)
    ),
    "a shape": lambda graph, nodes: nodes[1].meta.update(val=torch.empty(4, 5)),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_whatever_differs_is_noticed(edit: Callable[[fx.Graph, list[fx.Node]], None]) -> None:
    assert _graph(edit) != _graph()


def test_state_placeholders_do_not_count() -> None:
    """The second phase has them, and no gradients for them; nothing reads them before `rewrite`."""

    def with_state(graph: fx.Graph, nodes: list[fx.Node]) -> None:
        with graph.inserting_after(nodes[0]):
            graph.placeholder("basis")
        next(iter(graph.find_nodes(op="output"))).update_arg(0, (nodes[4], None, None))

    assert _graph(with_state) == _graph()


def test_the_same_graph_has_the_same_fingerprint_in_every_process() -> None:
    """No address of an object is in it."""
    assert _graph() == _graph()

    def called(graph: fx.Graph, nodes: list[fx.Node]) -> None:
        nodes[3].update_arg(1, lambda: None)

    assert _graph(called) == _graph(called)
