"""Part of `rewrite`: backward reads decoded values, and clones of what it computes from them."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch.fx as fx

from prac_fx.graph.graph_edit import fake_result
from prac_fx.torch_compat import rename_node

_BACKWARD = "must_be_in_backward"


class Redirection:
    """Replaces what backward reads of forward.

    Args:
        decoded: nodes that allocate encoded values.
        clones: forward nodes that backward computes again from what stands for those.
        decode: adds the decoded value of such a node, before another node of the graph.
    """

    def __init__(
        self,
        decoded: Collection[fx.Node],
        clones: Collection[fx.Node],
        decode: Callable[[fx.Node, fx.Node], fx.Node],
    ) -> None:
        self._decoded, self._clones, self._decode = decoded, clones, decode
        self._replacements: dict[fx.Node, fx.Node] = {}

    def redirect(self, graph: fx.Graph, backward: Collection[fx.Node]) -> None:
        """Edit every backward node that reads an encoded value or something computed from it."""
        for node in list(graph.nodes):
            if node not in backward or node.op != "call_function":
                continue
            for arg in list(node.all_input_nodes):
                if self._is_replaced(arg):
                    node.replace_input_with(arg, self._replacement(arg, node))

    def _is_replaced(self, node: fx.Node) -> bool:
        return node in self._decoded or node in self._clones

    def _replacement(self, wanted: fx.Node, before: fx.Node) -> fx.Node:
        """What stands for a forward node in backward; made right before its first reader."""
        pending = [wanted]
        while pending:
            node = pending[-1]
            args = node.all_input_nodes if node in self._clones else []
            missing = [
                arg for arg in args if self._is_replaced(arg) and arg not in self._replacements
            ]
            if missing:
                pending += missing
                continue
            pending.pop()
            if node not in self._replacements:
                make = self._clone if node in self._clones else self._decode
                self._replacements[node] = make(node, before)
        return self._replacements[wanted]

    def _clone(self, node: fx.Node, before: fx.Node) -> fx.Node:
        with node.graph.inserting_before(before):
            clone = node.graph.node_copy(node, lambda arg: self._replacements.get(arg, arg))
        clone.meta = {**node.meta, "partitioner_tag": _BACKWARD, "val": fake_result(clone)}
        clone.meta.pop("recompute", None)
        rename_node(clone, f"{node.name}_again")
        return clone
