"""Inductor keeps only those free buffers for later that do not raise the peak.

Inductor keeps a free buffer until one of the same size is wanted, however much later that is,
unless its estimate of the graph's peak says that there is no room. The estimate counts as memory
what stays inside fused kernels, views, and every read of a scale for a group as a value of its own.
Encoding and decoding consist of these, so that there always seems to be room: the peak of a step of
a small LLaMA was a third higher for it.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from typing import Any, TypeVar

from prac_fx.compiler.code_generation import within
from prac_fx.torch_compat import (
    EfficientPeakEstimate,
    OrderedSet,
    SegmentedTree,
    V,
    assign_memory_planning_info_for_scheduler_buffers,
    estimate_peak_memory,
    get_freeable_input_buf,
    inductor_ir,
    peak_estimate,
    results_of,
)

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")


def without_higher_peak(inner_compile: Callable[..., _Result]) -> Callable[..., _Result]:
    """Inductor's compilation, with reuse of buffers only where it does not raise the peak.

    Args:
        inner_compile: `compile_fx_inner` or what stands for it.
    """
    return within(inner_compile, lambda: peak_estimate(_PeakOfAllocations))


class _PeakOfAllocations(EfficientPeakEstimate):
    """Inductor's estimate, made once kernels are written, of what they turned out to allocate."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        try:
            self._estimate()
        except Exception as error:
            # a kind of buffer that we do not know: backward may be compiled in the middle of a step
            log.warning(
                "the peak of a graph is torch's estimate: %s: %s", type(error).__name__, error
            )

    def _estimate(self) -> None:
        graph = V.graph
        nodes, buffers = graph.scheduler.nodes, graph.scheduler.name_to_buf
        # anew: a graph in several partitions is estimated for each
        assign_memory_planning_info_for_scheduler_buffers(nodes, buffers)
        _count_allocations(graph)
        inputs = get_freeable_input_buf(nodes, OrderedSet(graph.graph_inputs))
        for name, freeable in inputs.items():
            value: Any = graph.graph_inputs[name]
            if isinstance(value, inductor_ir.TensorBox):
                # not what is read of it, which broadcasting may multiply
                freeable.mpi_buffer.size_free = self._get_size(value)  # type: ignore[arg-type]
        self.overall_peak_memory, by_node = estimate_peak_memory(
            nodes, inputs, OrderedSet(graph.get_output_names())
        )
        self.segmented_tree = SegmentedTree(by_node, operator.add, max, 0)


def _count_allocations(graph: Any) -> None:
    """Set the bytes that each buffer of the schedule takes, and gives back."""
    buffers = graph.scheduler.name_to_buf
    for name, buffer in buffers.items():
        if name in graph.removed_buffers or buffer.node.get_inputs_that_alias_output():
            # stays in registers, or is a view
            buffer.mpi_buffer.size_alloc = buffer.mpi_buffer.size_free = 0
    for buffer in buffers.values():
        if isinstance(buffer.node.layout, inductor_ir.MultiOutputLayout):
            # Inductor counts a result once for each reader
            results = {one.get_name(): one.mpi_buffer.size_free for one in results_of(buffer)}
            buffer.mpi_buffer.size_alloc = sum(results.values())
    for name, replaced in graph.wrapper_code.reuses.items():
        if {name, replaced} <= buffers.keys() - graph.removed_buffers:
            # takes over the memory of another one
            buffers[replaced].mpi_buffer.size_free = buffers[name].mpi_buffer.size_alloc = 0
