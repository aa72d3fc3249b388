"""Pass 2, survey: run torch's own partitioner to see what plain Inductor would save for backward.

The partitioner copies nodes into its two graphs and keeps their names, so the joint graph stays whole
and a saved value is found in it again by name. Source: torch._functorch.partitioners,
`min_cut_rematerialization_partition`, which also honours checkpoint tags and `activation_memory_budget`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.fx as fx

from prac_fx.graph_edit import storage_of, tensor_value
from prac_fx.memory import storage_nbytes
from prac_fx.torch_compat import min_cut_rematerialization_partition


@dataclass(frozen=True)
class SavedValue:
    """One tensor that the forward graph hands to the backward graph.

    Attributes:
        node: its node in the joint graph; in the forward graph if the partitioner has made it.
        nbytes: bytes of its storage that the step allocates for it; 0 for inputs, and for the second and
            further values on one storage.
        is_input: it is an argument of the graph or a view of one.
        is_output: it is a forward output or shares storage with one.
        shares_with: name of the earlier saved value on the same storage.
    """

    node: fx.Node
    nbytes: int
    is_input: bool
    is_output: bool
    shares_with: str | None


@dataclass(frozen=True)
class Survey:
    """What a partition of the joint graph saves.

    Attributes:
        saved: the saved tensors in the order of the forward graph's outputs.
        recomputed: names of forward nodes that the backward graph computes again.
    """

    saved: tuple[SavedValue, ...]
    recomputed: frozenset[str]

    @property
    def nbytes(self) -> int:
        """Bytes held between forward and backward beyond the graph's own inputs."""
        return sum(value.nbytes for value in self.saved)


def survey(
    gm: fx.GraphModule, joint_inputs: Sequence[object], partition_options: Mapping[str, Any]
) -> Survey:
    """Partition and report what is saved; `gm` must already be free of common subexpressions."""
    fw, bw = min_cut_rematerialization_partition(gm, joint_inputs, **partition_options)
    recomputed = frozenset(node.name for node in bw.graph.nodes if node.op == "call_function")
    saved = saved_values(gm.graph, fw, partition_options["num_fwd_outputs"])
    return Survey(saved, recomputed)


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
        # the partitioner adds nodes of its own where a checkpointed region draws random numbers
        node = by_name.get(output.name, output)
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
                nbytes=0 if is_input or shares_with else storage_nbytes(value),
                is_input=is_input,
                is_output=storage in user_outputs,
                shares_with=shares_with,
            )
        )
    return tuple(saved)
