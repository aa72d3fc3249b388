"""Regions that users mark with `torch.compiler.nested_compile_region`, put in place of their calls.

torch traces and partitions such a region once, by itself, and each call of it runs the same two
graphs. Nothing in it could be encoded: a basis belongs to a parameter, a rounding number to a
value, and the region's own joint graph knows neither. So a graph that is planned has the operators
of a region at each of its calls, each with the parameters of that call.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from prac_fx.torch_compat import copy_dynamo_graph

_INVOKE = torch.ops.higher_order.invoke_subgraph


def without_regions(gm: fx.GraphModule) -> fx.GraphModule:
    """Dynamo's graph with the operators of its regions in it; the graph itself if it has none.

    Args:
        gm: Dynamo's graph. It is not changed.
    """
    if not _calls(gm):
        return gm
    gm = copy_dynamo_graph(gm)
    paths: dict[str, str] = {}  # of the module that each region was traced for
    while calls := _calls(gm):  # a region may call others
        for call in calls:
            body = gm.get_submodule(str(call.args[0].target))  # type: ignore[union-attr]
            assert isinstance(body, fx.GraphModule)
            path = _path(call)
            first = paths.setdefault(str(call.args[0].target), path)  # type: ignore[union-attr]
            _put_in_place(gm, call, body, (first, path))
    gm.delete_all_unused_submodules()
    gm.recompile()
    return gm


def _calls(gm: fx.GraphModule) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="call_function", target=_INVOKE))


def _put_in_place(
    gm: fx.GraphModule, call: fx.Node, body: fx.GraphModule, paths: tuple[str, str]
) -> None:
    """Replace one call by the operators of its region, which is `body`."""
    region, _, *operands = call.args
    values: dict[fx.Node, Any] = dict(
        zip(body.graph.find_nodes(op="placeholder"), operands, strict=True)
    )
    (output,) = body.graph.find_nodes(op="output")
    for node in body.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        with gm.graph.inserting_before(call):
            copied = gm.graph.node_copy(node, values.__getitem__)
        copied.meta = _moved(node.meta, *paths)
        if node.op in ("get_attr", "call_module"):
            copied.target = _adopt(gm, body, str(node.target))
        values[node] = copied
    results = fx.map_arg(output.args[0], values.__getitem__)
    for reader in list(call.users):
        assert reader.target is operator.getitem, reader
        result = results[reader.args[1]]
        if isinstance(result, fx.Node):
            result.meta.setdefault("example_value", reader.meta.get("example_value"))
        reader.replace_all_uses_with(result)
        gm.graph.erase_node(reader)
    gm.graph.erase_node(call)
    # alone: other nodes without readers may write in place
    if isinstance(region, fx.Node) and not region.users:
        gm.graph.erase_node(region)


def _adopt(gm: fx.GraphModule, body: fx.GraphModule, name: str) -> str:
    """Have `gm` hold what `body` does under a name, and return its name there."""
    value: Any = body
    for part in name.split("."):
        value = getattr(value, part)
    own, number = name.replace(".", "_"), 0
    while hasattr(gm, own) and getattr(gm, own) is not value:
        own, number = f"{name.replace('.', '_')}_{number}", number + 1
    if not hasattr(gm, own):
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
            gm.register_buffer(own, value)
        else:
            setattr(gm, own, value)
    return own


def _path(node: fx.Node) -> str:
    """The path of the innermost module that a node belongs to; empty if it is not known."""
    stack: Mapping[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    return list(stack.values())[-1][0] if stack else ""


def _moved(meta: Mapping[str, Any], traced: str, called: str) -> dict[str, Any]:
    """Metadata in which a module that the region was traced for is the one it is called for."""
    stack = meta.get("nn_module_stack")
    if not stack or not traced or traced == called:
        return dict(meta)

    def moved(path: str) -> str:
        is_inside = path == traced or path.startswith(traced + ".")
        return called + path[len(traced) :] if is_inside else path

    of_call = {key: (moved(path), kind) for key, (path, kind) in stack.items()}
    return {**meta, "nn_module_stack": of_call}
