"""The pass `partition`: min-cut on the rewritten joint graph, and what must hold afterwards.

* what every site stores is saved, and neither its value nor a view of it is;
* nothing that backward is to compute again is saved;
* no forward output changed;
* no more bytes are saved than plain Inductor would save.

If an invariant fails, the pass raises `CannotRewriteError`. The graph is not used, and the backend
compiles plain Inductor's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch.fx as fx

from prac_fx.errors import CannotRewriteError
from prac_fx.graph.graph_edit import allocating_node, storage_of, tag_must_save
from prac_fx.passes.draws import partition_drawing_once
from prac_fx.passes.encoded import EncodedSite
from prac_fx.passes.plan_data import Plan
from prac_fx.passes.survey import SavedValue, saved_values
from prac_fx.torch_compat import (
    CheckpointPolicy,
    functorch_config,
    has_memory_budget,
    saving_what_must_be_saved,
)


@dataclass(frozen=True)
class PartitionedGraph:
    """A rewritten joint graph, split.

    Attributes:
        fw: the forward module; `sample` adds the sampling of rows.
        bw: the backward module.
        saved: what the forward hands to the backward.
        stored: name of each encoded value -> names of the saved values that hold its encoding.
    """

    fw: fx.GraphModule
    bw: fx.GraphModule
    saved: tuple[SavedValue, ...]
    stored: Mapping[str, tuple[str, ...]]


def partition(
    gm: fx.GraphModule,
    joint_inputs: Sequence[object],
    partition_options: Mapping[str, Any],
    encoded: Sequence[EncodedSite],
    plan: Plan,
) -> PartitionedGraph:
    """Split a rewritten joint graph into forward and backward.

    Args:
        gm: the rewritten joint graph.
        joint_inputs: as the partitioner received them.
        partition_options: keyword arguments of torch's partitioner.
        encoded: the sites in it.
        plan: what it was rewritten by.

    Raises:
        CannotRewriteError: an invariant does not hold.
    """
    num_fwd_outputs = partition_options["num_fwd_outputs"]
    outputs = _output_names(gm, num_fwd_outputs)
    stored = [part for site in encoded for part in site.stored]
    if has_memory_budget(gm):
        stored += _keep_what_budget_keeps(gm.graph, plan)
        deciding: AbstractContextManager[None] = saving_what_must_be_saved()
    else:
        deciding = nullcontext()
    with deciding:
        fw, bw = _partition_with_outputs(gm, joint_inputs, partition_options, stored)
    saved = saved_values(gm.graph, fw, num_fwd_outputs)
    by_storage = {storage_of(value.node): value.node.name for value in saved}
    _check_encodings(saved, encoded)
    if _output_names(fw, num_fwd_outputs) != outputs:
        raise CannotRewriteError("the partitioner changed the forward outputs")
    _check_totals(gm.graph, saved, stored, plan)
    stored_by = {
        site.value.name: tuple(by_storage[storage_of(part)] for part in site.stored)
        for site in encoded
    }
    return PartitionedGraph(fw, bw, saved, stored_by)


def _keep_what_budget_keeps(graph: fx.Graph, plan: Plan) -> list[fx.Node]:
    """Tag what the survey saved and the plan keeps, to spend an activation memory budget only once.

    The budget is a share of what would be saved, and what the survey computes again has met it. In
    the rewritten graph the encodings are fixed, so the same share would be taken from the little
    that is left. All matmuls of an attention block would be computed again for its logsumexp.

    Returns:
        The tagged nodes. Those that backward does not read any more are not saved.
    """
    kept = {value.name for value in plan.values if value.decision == "keep"}
    nodes = [node for node in graph.nodes if node.name in kept and node.op == "call_function"]
    for node in nodes:
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        tag_must_save(allocating_node(node))
    return nodes


def _partition_with_outputs(
    gm: fx.GraphModule,
    joint_inputs: Sequence[object],
    partition_options: Mapping[str, Any],
    stored: Sequence[fx.Node],
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Run torch's partitioner with some nodes as forward outputs while it runs.

    It ignores MUST_SAVE on a node that no forward output needs. It would then be free to save the
    value instead, and to encode it in backward.
    """
    start = partition_options["num_fwd_outputs"]
    end = start + len(stored)
    with_stored = {**partition_options, "num_fwd_outputs": end}
    _replace_outputs(gm.graph, slice(start, start), stored)
    # without cse: duplicates are merged already, and it would undo a clone that reads nothing
    # decoded
    with functorch_config.patch(cse=False):
        fw, bw = partition_drawing_once(gm, joint_inputs, **with_stored)
    for graph in (gm.graph, fw.graph):
        _replace_outputs(graph, slice(start, end), [])
    gm.recompile()
    return fw, bw


def _replace_outputs(graph: fx.Graph, where: slice, nodes: Sequence[fx.Node]) -> None:
    output = next(iter(graph.find_nodes(op="output")))
    outputs: list[Any] = list(output.args[0])
    outputs[where] = nodes
    output.args = (tuple(outputs),)
    if "desc" in output.meta:
        descriptions = list(output.meta["desc"])
        descriptions[where] = [None] * len(nodes)
        output.meta["desc"] = descriptions


def _output_names(gm: fx.GraphModule, count: int) -> list[str]:
    outputs: Any = next(iter(gm.graph.find_nodes(op="output"))).args[0]
    return [str(output) for output in outputs[:count]]


def _check_encodings(saved: Sequence[SavedValue], encoded: Sequence[EncodedSite]) -> None:
    storages = {storage_of(value.node) for value in saved}
    for site in encoded:
        # min-cut may save the encoding or a view of it, which is the same memory
        if not {storage_of(part) for part in site.stored} <= storages:
            raise CannotRewriteError(
                f"the partitioner does not save the encoding of {site.value}", site.value.name
            )
        if storage_of(site.value) in storages:
            raise CannotRewriteError(
                f"the partitioner saves {site.value} although it is encoded", site.value.name
            )


def _check_totals(
    graph: fx.Graph, saved: Sequence[SavedValue], stored: Collection[fx.Node], plan: Plan
) -> None:
    derived = {
        value.allocated_by for value in plan.values if value.reason in ("derived", "replaced")
    }
    kept = [name for value in saved if (name := allocating_node(value.node).name) in derived]
    if kept:
        name = kept[0]
        raise CannotRewriteError(
            f"the partitioner saves {name} although backward computes it again", name
        )
    nbytes_after = sum(value.nbytes for value in saved)
    if nbytes_after > plan.nbytes_before:
        raise CannotRewriteError(
            f"the rewritten graph would save {nbytes_after} bytes, plain Inductor saves "
            f"{plan.nbytes_before}",
            _least_worthwhile(plan, _blamed(graph, _unplanned(saved, stored, plan), plan)),
        )


def _unplanned(
    saved: Sequence[SavedValue], stored: Collection[fx.Node], plan: Plan
) -> list[fx.Node]:
    """What is saved although plain Inductor does not save it, and that is not an encoding."""
    planned = {value.allocated_by for value in plan.values} | {*plan.statistics}
    encodings = {storage_of(part) for part in stored}
    return [
        value.node
        for value in saved
        if value.nbytes
        and storage_of(value.node) not in encodings
        and allocating_node(value.node).name not in planned
    ]


def _blamed(graph: fx.Graph, unplanned: Collection[fx.Node], plan: Plan) -> set[str]:
    """The encoded and derived values to blame for what is saved beyond the plan.

    Backward computes something for them from what is saved so.
    """
    names, clones = {site.value for site in plan.sites}, {*plan.clones}
    reading, sources = set(map(allocating_node, unplanned)), dict[fx.Node, set[str]]()
    blamed: set[str] = set()
    for node in graph.nodes:
        if node.name in names:
            sources[node] = {node.name}
        if node.name not in clones:
            continue
        args = node.all_input_nodes
        sources[node] = {name for arg in args for name in sources.get(arg, ())}
        sources[node] |= {allocating_node(node).name}
        if any(arg in reading or allocating_node(arg) in reading for arg in args):
            reading.add(node)
            blamed |= sources[node]
    return blamed


def _least_worthwhile(plan: Plan, blamed: Collection[str]) -> str:
    """The value that saves least, of those at fault, or of all when none is known to be.

    Masks count only if plain Inductor saves them: others save nothing themselves.
    """
    changed = [row for row in plan.values if row.decision != "keep" and row.nbytes_before]
    among = [row for row in changed if row.allocated_by in blamed] or changed
    least = min(among, key=lambda row: row.nbytes_before - row.nbytes_after, default=None)
    return least.allocated_by if least is not None else ""
