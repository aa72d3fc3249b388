"""Pass 8, partition: min-cut on the rewritten joint graph, and the invariants that must hold afterwards.

* every site's coordinates are saved, and neither its value nor a view of it is;
* no forward output changed;
* no more bytes are saved than plain Inductor would save.

If one fails the graph is not used: `CannotRewriteError`, and the backend compiles plain Inductor's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.fx as fx

from prac_fx.errors import CannotRewriteError
from prac_fx.passes.rewrite import EncodedSite
from prac_fx.passes.sample import sample
from prac_fx.passes.survey import SavedValue, saved_values, storage_of
from prac_fx.torch_compat import min_cut_rematerialization_partition


@dataclass(frozen=True)
class PartitionedGraph:
    """A rewritten joint graph, split.

    Attributes:
        fw: the forward module, with the sampling of rows in it.
        bw: the backward module.
        saved: what the forward hands to the backward.
        coordinates: name of each encoded value -> name of the saved value that holds its coordinates.
    """

    fw: fx.GraphModule
    bw: fx.GraphModule
    saved: tuple[SavedValue, ...]
    coordinates: Mapping[str, str]


def partition(
    gm: fx.GraphModule,
    joint_inputs: Sequence[object],
    partition_options: Mapping[str, Any],
    encoded: Sequence[EncodedSite],
    nbytes_before: int,
) -> PartitionedGraph:
    """Split a rewritten joint graph into forward and backward.

    Args:
        gm: the rewritten joint graph.
        joint_inputs: as the partitioner received them.
        partition_options: keyword arguments of torch's partitioner.
        encoded: the sites in it.
        nbytes_before: bytes that plain Inductor saves.

    Raises:
        CannotRewriteError: an invariant does not hold.
    """
    num_fwd_outputs = partition_options["num_fwd_outputs"]
    outputs = _output_names(gm, num_fwd_outputs)
    fw, bw = min_cut_rematerialization_partition(gm, joint_inputs, **partition_options)
    saved = saved_values(gm.graph, fw, num_fwd_outputs)
    by_storage = {storage_of(value.node): value.node.name for value in saved}
    _check(fw, saved, encoded, outputs, num_fwd_outputs, nbytes_before)
    sample(fw, encoded)
    coordinates = {one.value.name: by_storage[storage_of(one.coordinates)] for one in encoded}
    return PartitionedGraph(fw, bw, saved, coordinates)


def _output_names(gm: fx.GraphModule, count: int) -> list[str]:
    outputs: Any = next(iter(gm.graph.find_nodes(op="output"))).args[0]
    return [str(output) for output in outputs[:count]]


def _check(
    fw: fx.GraphModule,
    saved: Sequence[SavedValue],
    encoded: Sequence[EncodedSite],
    outputs: list[str],
    num_fwd_outputs: int,
    nbytes_before: int,
) -> None:
    storages = {storage_of(value.node) for value in saved}
    for one in encoded:
        # min-cut may save the coordinates or a view of them, which is the same memory
        if storage_of(one.coordinates) not in storages:
            raise CannotRewriteError(
                f"the partitioner does not save the coordinates of {one.value}"
            )
        if storage_of(one.value) in storages:
            raise CannotRewriteError(f"the partitioner saves {one.value} although it is encoded")
    if _output_names(fw, num_fwd_outputs) != outputs:
        raise CannotRewriteError("the partitioner changed the forward outputs")
    nbytes_after = sum(value.nbytes for value in saved)
    if nbytes_after > nbytes_before:
        raise CannotRewriteError(
            f"the rewritten graph would save {nbytes_after} bytes, plain Inductor saves {nbytes_before}"
        )
