"""The pass `survey`: run torch's partitioner to see what plain Inductor saves for backward.

The partitioner copies nodes into its two graphs and keeps their names. So the joint graph stays
whole, and the name of a saved value finds its node there. Source: torch._functorch.partitioners,
`min_cut_rematerialization_partition`. It also honours checkpoint tags, `activation_memory_budget`
and `enable_activation_offloading`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.fx as fx

from prac_fx.graph.graph_edit import storage_of, tensor_value
from prac_fx.graph.nbytes import Symbols, storage_nbytes
from prac_fx.passes.draws import partition_drawing_once
from prac_fx.torch_compat import (
    has_memory_budget,
    has_tag_must_recompute,
    is_random_state,
    offloaded_node,
    without_memory_budget,
)


@dataclass(frozen=True)
class SavedValue:
    """A tensor that the forward graph hands to the backward graph.

    Attributes:
        node: its node in the joint graph; in the forward graph if the partitioner has made it.
        nbytes: bytes of its storage that the step allocates for it; 0 for inputs, and for the
            second and further values on the same storage.
        is_input: it is an argument of the graph, or a view of an argument.
        is_output: it is a forward output, or shares storage with an output.
        shares_with: name of the earlier saved value on the same storage.
        is_offloaded: torch moves it to the host until backward, so it takes no memory of its
            device.
    """

    node: fx.Node
    nbytes: int
    is_input: bool
    is_output: bool
    shares_with: str | None
    is_offloaded: bool = False

    def at(self, symbols: Symbols) -> SavedValue:
        """The same in a run of the graph in which symbolic sizes have these values."""
        value = tensor_value(self.node)
        if value is None or not self.nbytes:
            return self
        return replace(self, nbytes=storage_nbytes(value, symbols))


@dataclass(frozen=True)
class Survey:
    """What a partition of the joint graph saves.

    Attributes:
        saved: the saved tensors in the order of the forward graph's outputs.
        recomputed: names of forward nodes that the backward graph computes again.
        budgeted: names of values that are not saved because of `activation_memory_budget`.
    """

    saved: tuple[SavedValue, ...]
    recomputed: frozenset[str]
    budgeted: frozenset[str]

    @property
    def nbytes(self) -> int:
        """Bytes held between forward and backward beyond the graph's own inputs."""
        return sum(value.nbytes for value in self.saved)


def survey(
    gm: fx.GraphModule, joint_inputs: Sequence[object], partition_options: Mapping[str, Any]
) -> Survey:
    """Partition, and say what is saved; `gm` must be free of common subexpressions already."""
    unbudgeted: frozenset[str] = frozenset()
    if has_memory_budget(gm):
        with without_memory_budget(gm):
            saved, _ = _partition(gm, joint_inputs, partition_options)
        unbudgeted = frozenset(value.node.name for value in saved)
    saved, recomputed = _partition(gm, joint_inputs, partition_options)
    names = {value.node.name for value in saved}
    return Survey(saved, recomputed, unbudgeted - names)


def _partition(
    gm: fx.GraphModule, joint_inputs: Sequence[object], partition_options: Mapping[str, Any]
) -> tuple[tuple[SavedValue, ...], frozenset[str]]:
    """What is saved, and the names of what is computed again."""
    fw, bw = partition_drawing_once(gm, joint_inputs, **partition_options)
    recomputed = {node.name for node in bw.graph.nodes if node.op == "call_function"}
    forward = {node.name for node in fw.graph.nodes}
    # the partitioner replaces a node in both graphs where a checkpointed region draws numbers
    recomputed |= {
        node.name
        for node in gm.graph.nodes
        if has_tag_must_recompute(node) and node.name not in forward
    }
    return (
        saved_values(gm.graph, fw, partition_options["num_fwd_outputs"]),
        frozenset(recomputed),
    )


def saved_values(
    joint: fx.Graph, fw: fx.GraphModule, num_fwd_outputs: int
) -> tuple[SavedValue, ...]:
    """The tensors that a partitioned forward graph saves, seen in the joint graph."""
    by_name = {node.name: node for node in joint.nodes}
    outputs = next(iter(fw.graph.find_nodes(op="output"))).args[0]
    user_outputs = {
        storage for node in outputs[:num_fwd_outputs] if (storage := storage_of(node)) is not None
    }
    inputs = {
        storage
        for node in joint.find_nodes(op="placeholder")
        if (storage := storage_of(node)) is not None
    }
    first_on_storage: dict[int, str] = {}
    saved = []
    for output in outputs[num_fwd_outputs:]:
        offloaded = offloaded_node(output)
        name = (offloaded or output).name
        # the partitioner adds such a node where a checkpointed region draws random numbers
        node = output if is_random_state(output) else by_name.get(name, output)
        value = tensor_value(node)
        if value is None:  # a symbolic size, an opaque object
            continue
        storage = storage_of(node)
        is_input = node.op == "placeholder" or storage in inputs
        shares_with = first_on_storage.get(storage) if storage is not None else None
        if storage is not None:
            first_on_storage.setdefault(storage, node.name)
        saved.append(
            SavedValue(
                node=node,
                nbytes=0 if is_input or shares_with or offloaded else storage_nbytes(value),
                is_input=is_input,
                is_output=storage in user_outputs,
                shares_with=shares_with,
                is_offloaded=offloaded is not None,
            )
        )
    return tuple(saved)
