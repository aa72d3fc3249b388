"""An operator that has Inductor write a value to memory as plain Inductor writes what it saves.

The operator leaves the value as it is. Where a graph has convolutions, Inductor lets tensors of
four dimensions lie channels last, whatever their strides were while tracing. That goes for what it
saves, too, but never for what `as_strided` reads. A forward pass whose values lie in another way
sums them in another order, and its result is not the same to the bit.
"""

from __future__ import annotations

from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from prac_fx.graph.graph_edit import tensor_value
from prac_fx.graph.inliner import Inliner
from prac_fx.torch_compat import GraphLowering, V, inductor_ir, register_lowering

_aten = torch.ops.aten
_LIBRARY: Any = torch.library.Library("prac_fx", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define("written(Tensor(a) x) -> Tensor(a)")


@torch.library.impl(_LIBRARY, "written", "CompositeExplicitAutograd")
def _alias(x: Tensor) -> Tensor:
    aliased: Tensor = _aten.alias.default(x)
    return aliased


_written = torch.ops.prac_fx.written.default


@register_lowering(_written, type_promotion_kind=None)
def _write(x: Any) -> Any:
    """Write a value to memory.

    `GraphLowering.run_node` (torch._inductor.graph) does so with those outputs of a graph that
    users do not see.
    """
    value: Any = V.graph.current_node.args[0]
    strides = value.meta["val"].stride()
    if value in V.graph.nodes_prefer_channels_last:
        strides = inductor_ir.FlexibleLayout.stride_ordered_for_memory_format(
            x.get_size(), torch.channels_last
        )
    return inductor_ir.ExternKernel.require_exact_strides(x, strides)


class WrittenChannelsLast:
    """The values of a joint graph that plain Inductor writes channels last.

    Args:
        graph: the joint graph.
        saved: names of what plain Inductor saves. Where that is a view of a value, and no
            convolution makes the value, Inductor leaves the value as it was traced.
    """

    def __init__(self, graph: fx.Graph, saved: Collection[str]) -> None:
        self._values = {
            node
            for node in _prefer_channels_last(graph)
            if (node.name in saved or node.target == _aten.convolution.default)
            and not any(user.op == "output" for user in node.users)
        }
        self._in_memory: dict[fx.Node, fx.Node] = {}

    def __contains__(self, value: fx.Node) -> bool:
        return value in self._values

    def write(self, value: fx.Node, inline: Inliner, *, before: fx.Node, tag: str) -> fx.Node:
        """Add the node of a value in memory, and return a node to read rows from with `as_strided`.

        The returned node is a copy in the strides of the trace. To copy and to pack rows of the
        copy takes less time than to pack rows of what lies channels last.
        """
        nodes = [value]
        for name in ("written", "copied"):
            nodes += [
                inline(
                    _written,
                    nodes[-1:],
                    before=before,
                    tag=tag,
                    like=value,
                    key="written",
                    name=name,
                ).result
            ]
        self._in_memory[value] = nodes[1]
        return nodes[2]

    def redirect(self) -> None:
        """Have the readers of these values read them from memory, as they read what is saved."""
        for value, written in self._in_memory.items():
            for user in set(value.users) - {written}:
                user.replace_input_with(value, written)


def _prefer_channels_last(graph: fx.Graph) -> set[fx.Node]:
    """The images of a graph that Inductor writes channels last if it writes them."""
    module: Any = SimpleNamespace(graph=graph)
    if not GraphLowering.decide_layout_opt(module, is_inference=False):
        return set()
    lowering: Any = SimpleNamespace(module=module)
    nodes = GraphLowering.find_nodes_prefer_channels_last(lowering)
    values = {node: tensor_value(node) for node in nodes}
    return {node for node, value in values.items() if value is not None and value.dim() == 4}
