"""Joint graphs: views and storages in them, names, copies, dead nodes."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from prac_fx.torch_compat import (
    CheckpointPolicy,
    FakeTensor,
    storage_key,
)

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


def tag_must_save(allocated: fx.Node) -> None:
    """Have torch's partitioner save what a node allocates.

    Under a memory budget torch ignores the tag on one of several results, so their source has it,
    too. It also ignores the tag on a view.
    """
    several = allocated.all_input_nodes[:1] if allocated.target is operator.getitem else []
    for node in (allocated, *several):
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def storage_of(node: object) -> int | None:
    """Identity of the storage of the tensor that a node stands for; None without storage."""
    value = tensor_value(node) if isinstance(node, fx.Node) else None
    return None if value is None else _storage(value)


def _storage(value: Tensor) -> int | None:
    try:
        return storage_key(value)
    except NotImplementedError:
        return None


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


def row_gather(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """A tensor and the numbers of those of its rows that `node` consists of.

    None if it does something else. Experts read such rows: those of their tokens. A row is what one
    number chooses, such as the weight of an expert.
    """
    if node.op != "call_function" or node.target is not _aten.index.Tensor:
        return None
    source, indices = node.args
    if not isinstance(source, fx.Node) or not isinstance(indices, list | tuple):
        return None
    rows = indices[0]
    if len(indices) != 1 or not isinstance(rows, fx.Node):
        return None
    matrix, numbers = tensor_value(source), tensor_value(rows)
    if matrix is None or numbers is None or matrix.dim() < 2 or numbers.dim() != 1:
        return None
    return (source, rows) if numbers.dtype in (torch.int64, torch.int32) else None
