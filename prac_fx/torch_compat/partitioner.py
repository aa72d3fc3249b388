"""AOTAutograd's partitioner: its tags and its memory budgets."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx as fx
from torch._functorch import config as functorch_config
from torch._functorch.compile_utils import fx_graph_cse
from torch.utils.checkpoint import CheckpointPolicy


def without_autograd_cache() -> Any:
    """Context in which AOTAutograd neither reads nor writes its cache.

    A warm cache spares the call of the partitioner. A phase that only looks at the joint graph
    needs that call.
    """
    return functorch_config.patch(enable_autograd_cache=False)


def without_duplicates(graph: fx.Graph, kind: Callable[[fx.Node], Hashable]) -> fx.Graph:
    """A graph in which equal nodes are one, as torch's partitioner merges them.

    Source: `min_cut_rematerialization_partition`. From torch 2.14 on it merges nodes of one kind.

    Args:
        graph: the joint graph.
        kind: of a node: does backward need it?
    """
    knows_kinds = "extra_node_key" in inspect.signature(fx_graph_cse).parameters
    given: dict[str, Any] = {"extra_node_key": kind} if knows_kinds else {}
    return fx_graph_cse(graph, **given)


def has_tag_must_recompute(node: fx.Node) -> bool:
    """Does `torch.utils.checkpoint`, or a selective policy, compute the node again in backward?"""
    return node.meta.get("recompute") in (
        CheckpointPolicy.MUST_RECOMPUTE,
        CheckpointPolicy.PREFER_RECOMPUTE,
    )


def is_random_state(saved: fx.Node) -> bool:
    """Is a forward output the random state that a checkpointed region starts again from?

    Source: `functionalize_rng_ops` (torch._functorch.partitioners). The name of such a node says
    nothing, because the joint graph may have another node of that name.
    """
    sources = (str(arg.target) for arg in saved.all_input_nodes)
    return saved.target is operator.getitem and "run_and_save_rng_state" in sources


def offloaded_node(saved: fx.Node) -> fx.Node | None:
    """The node whose value a forward output copies to the host; None for any other output.

    Source: torch._functorch._activation_offloading. The partitioner runs it where
    `functorch_config.enable_activation_offloading` says so. Its asynchronous form passes the value
    on to the node that waits for the copy.
    """
    sources = (arg for arg in saved.all_input_nodes if arg.meta.get("saved_for_offloading"))
    return next(sources, None) if saved.name.startswith("cpu_offload_") else None


def has_memory_budget(gm: fx.GraphModule) -> bool:
    """Does torch's partitioner meet an activation memory budget in this graph?

    Source: `min_cut_rematerialization_partition`. The budget is
    `functorch_config.activation_memory_budget`. In torch 2.13 it may also be an annotation of every
    node (`torch.autograd.graph.region_activation_memory_budget`).
    """
    return bool(_annotated_with_budget(gm)) or functorch_config.activation_memory_budget != 1


@contextmanager
def without_memory_budget(gm: fx.GraphModule) -> Iterator[None]:
    """Context in which the partitioner knows no activation memory budget."""
    annotated = _annotated_with_budget(gm)
    for node, custom in annotated.items():
        node.meta["custom"] = {key: v for key, v in custom.items() if key != _REGION_BUDGET}
    try:
        # without cse, because that would put copies in the place of these nodes
        with functorch_config.patch(activation_memory_budget=1.0, cse=False):
            yield
    finally:
        for node, custom in annotated.items():
            node.meta["custom"] = custom


def _annotated_with_budget(gm: fx.GraphModule) -> dict[fx.Node, Any]:
    nodes = [node for module in gm.modules() for node in _nodes_of(module)]
    return {node: node.meta["custom"] for node in nodes if _region_budget(node) is not None}


def _nodes_of(module: torch.nn.Module) -> Iterable[fx.Node]:
    return module.graph.nodes if isinstance(module, fx.GraphModule) else ()


_REGION_BUDGET = (
    "_region_activation_memory_budget"  # torch.fx.traceback.MEMORY_BUDGET_ANNOTATION_KEY
)


def _region_budget(node: fx.Node) -> object:
    custom = node.meta.get("custom")
    return custom.get(_REGION_BUDGET) if isinstance(custom, dict) else None


def rename_node(node: fx.Node, name: str) -> None:
    """Give a node this name, or the nearest free one (fx.Node has only a private way to do it)."""
    node._rename(name)


def replace_node(node: fx.Node, by: fx.Node) -> None:
    """Put another node in a node's place: with its readers and its very name; erases it."""
    name, graph = node.name, node.graph
    node.replace_all_uses_with(by)
    graph.erase_node(node)
    by.name = name  # `fx.Node._rename` takes a name only once, even if its first node is gone
    graph._graph_namespace._rename_object(by, name)
