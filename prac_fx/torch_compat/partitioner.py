"""AOTAutograd's partitioner: its tags, its memory budgets, and its cuts."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.fx as fx
from torch._functorch import config as functorch_config
from torch._functorch.partitioners import MinCutOptions, solve_min_cut
from torch.utils._ordered_set import OrderedSet
from torch.utils.checkpoint import CheckpointPolicy


def without_autograd_cache() -> Any:
    """Context in which AOTAutograd neither reads nor writes its cache.

    On a warm cache the partitioner is not called, so a phase that exists to look at the joint graph
    must not meet one.
    """
    return functorch_config.patch(enable_autograd_cache=False)


def has_tag_must_recompute(node: fx.Node) -> bool:
    """True for nodes that `torch.utils.checkpoint` (or a selective policy) recomputes in backward."""
    return node.meta.get("recompute") in (
        CheckpointPolicy.MUST_RECOMPUTE,
        CheckpointPolicy.PREFER_RECOMPUTE,
    )


def is_random_state(saved: fx.Node) -> bool:
    """Is a forward output the state of the random stream that a checkpointed region starts again from?

    Source: `functionalize_rng_ops` (torch._functorch.partitioners). The name of such a node says nothing: the joint
    graph may have another node of that name.
    """
    sources = (str(arg.target) for arg in saved.all_input_nodes)
    return saved.target is operator.getitem and "run_and_save_rng_state" in sources


def offloaded_node(saved: fx.Node) -> fx.Node | None:
    """The node whose value a forward output is a copy of on the host; None for any other output.

    Source: torch._functorch._activation_offloading, which `functorch_config.enable_activation_offloading` runs in
    the partitioner. Its asynchronous form passes the value on to the node that waits for the copy.
    """
    sources = (arg for arg in saved.all_input_nodes if arg.meta.get("saved_for_offloading"))
    return next(sources, None) if saved.name.startswith("cpu_offload_") else None


def has_memory_budget(gm: fx.GraphModule) -> bool:
    """Does torch's partitioner meet an activation memory budget in this graph?

    Source: `min_cut_rematerialization_partition`. The budget is `functorch_config.activation_memory_budget`, or, in
    torch 2.13, an annotation of every node (`torch.autograd.graph.region_activation_memory_budget`).
    """
    return bool(_annotated_with_budget(gm)) or functorch_config.activation_memory_budget != 1


@contextmanager
def without_memory_budget(gm: fx.GraphModule) -> Iterator[None]:
    """Context in which the partitioner knows no activation memory budget."""
    annotated = _annotated_with_budget(gm)
    for node, custom in annotated.items():
        node.meta["custom"] = {key: v for key, v in custom.items() if key != _REGION_BUDGET}
    try:
        # without cse the partitioner leaves these very nodes in place
        with functorch_config.patch(activation_memory_budget=1.0, cse=False):
            yield
    finally:
        for node, custom in annotated.items():
            node.meta["custom"] = custom


@contextmanager
def saving_what_must_be_saved() -> Iterator[None]:
    """Context in which the partitioner may compute everything again but nodes tagged MUST_SAVE, whatever the budget.

    Source: `choose_saved_values_set` (torch._functorch.partitioners), which ends in these two cuts. In between, it
    chooses what to compute again so that a share of the memory is saved; here the tags have chosen.
    """

    def choose(graph: fx.Graph, node_info: Any, memory_budget: float = 1) -> list[fx.Node]:
        reductions = functorch_config.ban_recompute_reductions
        options = MinCutOptions(False, False, False, False, ban_if_reduction=reductions)
        _, banned = solve_min_cut(graph, node_info, options)
        again = [
            node
            for node in banned
            if node.op == "call_function"
            and node.meta.get("recompute") is not CheckpointPolicy.MUST_SAVE
        ]
        saved, _ = solve_min_cut(graph, node_info, options, OrderedSet(again))
        return saved

    with patch("torch._functorch.partitioners.choose_saved_values_set", choose):
        yield


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
