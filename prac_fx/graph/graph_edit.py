"""Editing joint graphs: tensor code becomes aten nodes, with the metadata that torch needs."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from prac_fx.torch_compat import (
    FakeTensor,
    inductor_decompositions,
    make_fx,
    rename_node,
    storage_key,
)

# What an inlined node takes over from the node it belongs to. "custom" holds annotations of the
# user's that have to cover every node, such as
# torch.autograd.graph.region_activation_memory_budget.
_INHERITED = ("stack_trace", "nn_module_stack", "seq_nr", "custom")

# Operators that hand on the same elements in another shape. Slice, select and expand are left out
# on purpose: they hand on fewer elements, or repeated ones.
_aten = torch.ops.aten
RESHAPING_VIEWS = frozenset(
    {
        _aten.view.default,
        _aten._unsafe_view.default,
        _aten.reshape.default,
        _aten.permute.default,
        _aten.transpose.int,
        _aten.t.default,
        _aten.unsqueeze.default,
        _aten.squeeze.default,
        _aten.squeeze.dim,
        _aten.squeeze.dims,
        _aten.alias.default,
        _aten.detach.default,
    }
)


def tensor_value(node: fx.Node) -> Tensor | None:
    """The fake tensor that a node stands for; None when it is not a single tensor."""
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) else None


def without_views(node: fx.Node) -> fx.Node:
    """The node that `node` is a reshaping view of, or itself."""
    while node.target in RESHAPING_VIEWS:
        node = node.all_input_nodes[0]
    return node


def allocating_node(node: fx.Node) -> fx.Node:
    """The node whose storage `node` is a view of, by any kind of view; or itself."""
    while (source := _viewed(node)) is not None:
        node = source
    return node


def _viewed(node: fx.Node) -> fx.Node | None:
    """The argument that a node is a view of.

    The parts of a split are views of the split, and the split is a view of its argument.
    """
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        split = node.all_input_nodes[0]
        return split if _viewed(split) is not None else None
    value = node.meta.get("val")
    parts = value if isinstance(value, list | tuple) else [value]
    storages = {_storage(part) for part in parts if isinstance(part, Tensor)} - {None}
    return next((arg for arg in node.all_input_nodes if storage_of(arg) in storages), None)


def storage_of(node: object) -> int | None:
    """Identity of the storage of the tensor that a node stands for; None without storage."""
    value = tensor_value(node) if isinstance(node, fx.Node) else None
    return None if value is None else _storage(value)


def _storage(value: Tensor) -> int | None:
    try:
        return storage_key(value)
    except NotImplementedError:
        return None


@dataclass(frozen=True)
class Inlined:
    """What a call of an `Inliner` added.

    Attributes:
        nodes: all new nodes, in order.
        results: the nodes that stand for the function's results.
    """

    nodes: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]

    @property
    def result(self) -> fx.Node:
        """The only result."""
        (result,) = self.results
        return result


# in the metadata of a node: what it is part of, as text, and the first node of that part
LABEL = "prac_fx_part_of"


class Inliner:
    """Copies traced tensor code into a graph, and traces each distinct shape only once.

    Example: `inline(codec.encode, [x, basis], before=output)` adds what `codec.encode` does as aten
    nodes.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._traced: dict[object, fx.GraphModule] = {}

    def __call__(
        self,
        function: Callable[..., Tensor | tuple[Tensor, ...]],
        args: Sequence[fx.Node],
        *,
        before: fx.Node,
        tag: str,
        like: fx.Node,
        key: object,
        name: str,
        label: str = "",
    ) -> Inlined:
        """Inline `function(*args)`.

        Args:
            function: code on tensors without data-dependent control flow.
            args: the nodes to call it with.
            before: the new nodes go in front of this node.
            tag: `partitioner_tag` of the new nodes (torch._functorch.partitioners).
            like: node whose source location the new nodes carry.
            key: identifies the function in the trace cache, together with the arguments' shapes.
            name: of the results; further ones are numbered.
            label: what all of the new nodes are together, for whoever prints the graph.
        """
        values = [arg.meta["val"] for arg in args]
        cache_key = (key, tuple(map(_signature, values)))
        traced = self._traced.get(cache_key)
        if traced is None:
            # the lambda is there because make_fx counts the `self` of a bound method as an argument
            trace = make_fx(
                lambda *tensors: function(*tensors), decomposition_table=inductor_decompositions()
            )
            traced = trace(*values)
            self._traced[cache_key] = traced
        inlined = self._copy(traced, args, before, tag, like)
        for node in inlined.nodes if label else ():
            node.meta[LABEL] = (label, inlined.nodes[0].name)
        for result in inlined.results:
            if result in inlined.nodes:
                rename_node(result, name)
        return inlined

    def _copy(
        self,
        traced: fx.GraphModule,
        args: Sequence[fx.Node],
        before: fx.Node,
        tag: str,
        like: fx.Node,
    ) -> Inlined:
        env = dict(zip(traced.graph.find_nodes(op="placeholder"), args, strict=True))
        added: list[fx.Node] = []
        with self.graph.inserting_before(before):
            for node in traced.graph.nodes:
                if node.op == "placeholder" or node.op == "output":
                    continue
                if node.op != "call_function":
                    raise AssertionError(f"traced code has a {node.op} node: {node.format_node()}")
                copied = self.graph.node_copy(node, env.__getitem__)
                copied.meta = {"val": fake_result(copied), "partitioner_tag": tag}
                for field in _INHERITED:
                    if field in like.meta:
                        copied.meta[field] = like.meta[field]
                env[node] = copied
                added.append(copied)
        returned: Any = next(iter(traced.graph.find_nodes(op="output"))).args[0]
        results = returned if isinstance(returned, list | tuple) else (returned,)
        return Inlined(tuple(added), tuple(env[result] for result in results))


def _signature(value: Tensor) -> object:
    return (
        tuple(map(str, value.shape)),
        tuple(map(str, value.stride())),
        value.dtype,
        value.device,
    )


def fake_result(node: fx.Node) -> Any:
    """What a call_function node returns for the fake values of its arguments.

    It is computed anew for each copy of a traced graph. If all shared the value of the first copy,
    they would look like views of the same storage.
    """
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda arg: arg.meta["val"])
    fakes = [arg.meta["val"] for arg in node.all_input_nodes]
    mode = next(
        (value.fake_mode for value in fakes if isinstance(value, FakeTensor)), nullcontext()
    )
    with mode:
        return node.target(*args, **kwargs)  # type: ignore[operator]


_NUMBER = re.compile(r"(_\d+)+$")


def with_names_in_order(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph whose operators of each kind are numbered in order of appearance."""
    renamed = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), copies.__getitem__)
        name = _NUMBER.sub("", node.name) if node.op == "call_function" else node.name
        copy = renamed.create_node(node.op, node.target, args, kwargs, name, node.type)
        copy.meta = dict(node.meta)
        copies[node] = copy
    return renamed


def erase_dead(nodes: Sequence[fx.Node]) -> None:
    """Erase those of `nodes` that nothing reads any more, from the last to the first."""
    for node in reversed(nodes):
        if not node.users:
            node.graph.erase_node(node)


def last_two_swapped(node: fx.Node) -> fx.Node | None:
    """The node whose last two dimensions `node` swaps; None if it does something else."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    value = tensor_value(node)
    rank = value.dim() if value is not None else 0
    if rank < 2:
        return None
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    if node.target is _aten.permute.default:
        dims: Any = node.args[1]
        return node.args[0] if [d % rank for d in dims] == swapped else None
    if node.target is _aten.transpose.int:
        pair = {int(d) % rank for d in node.args[1:3]}  # type: ignore[arg-type]
        return node.args[0] if pair == {rank - 1, rank - 2} else None
    if node.target is _aten.t.default and rank == 2:
        return node.args[0]
    return None
