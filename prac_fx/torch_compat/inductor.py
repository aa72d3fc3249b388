"""Inductor: its options, and how it lowers and schedules a graph without writing code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar, cast
from unittest.mock import patch

import sympy
import torch
import torch.fx as fx
from torch._guards import TracingContext
from torch._inductor import config as inductor_config
from torch._inductor import ir as inductor_ir
from torch._inductor.codegen.common import Kernel
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V

from prac_fx.torch_compat.patches import comparing_sparse_results


def inductor_decompositions() -> dict[Any, Any]:
    """The decomposition table that Inductor traces with."""
    return cast(dict[Any, Any], select_decomp_table())


def inductor_patches(mode: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Config patches that `torch.compile(mode=..., options=...)` stands for with Inductor.

    Source: `torch._TorchCompileInductorWrapper`, which also checks names and types.

    Raises:
        RuntimeError: from torch, for an unknown mode, an unknown key, or a value of the wrong type.
    """
    wrapper: Any = torch._TorchCompileInductorWrapper
    config: dict[str, Any] = wrapper(mode, dict(options), None).config
    return config


def gpu_fusion_patches() -> dict[str, Any]:
    """Config patches with which GPU kernels of a rewritten graph fuse as they should.

    The kernel that reads a matmul's result also encodes it. The encoding loops over groups, and the
    reader loops over the model's shapes. Inductor sees that both read the same memory where it
    normalises loops. Later versions see it because they try other indices; earlier ones lack the
    option that does so.

    What makes an operand of a matmul of odd width also pads it. Inductor would rather pad in place
    (`inplace_constant_pad_nd`, torch._inductor.lowering). It writes the operand for that, finds
    that a view of it cannot be padded, and copies it (torch 2.11).
    """
    patches = {"inplace_padding": False}
    if not hasattr(inductor_config, "loop_reindexing_after_fusion"):
        patches["loop_ordering_after_fusion"] = False
    return patches


# of a group of elements that shares a scale, in the default options
_GROUP = 128


def holding_groups_in_registers() -> AbstractContextManager[Any]:
    """Context in which a GPU kernel reads a group of elements once, keeps it and reduces it.

    Inductor calls that a persistent reduction. Its heuristic asks for at most 64 elements where the
    rows of a value are padded, as those of a matmul of odd width are
    (`InductorChoices.should_use_persistent_reduction`). It then reads each group twice, in a loop.
    """
    chosen = type(V.choices)

    class Choices(chosen):  # type: ignore[misc, valid-type]
        @staticmethod
        def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
            if chosen.should_use_persistent_reduction(features, cooperative_reduction):
                return True
            elements = features.reduction_numel
            settings = inductor_config.triton
            return (
                settings.persistent_reductions
                and not cooperative_reduction
                and isinstance(elements, int | sympy.Integer)
                and int(elements) <= _GROUP
            )

    handler = Choices()
    handler.__dict__.update(V.choices.__dict__)
    return cast(AbstractContextManager[Any], V.set_choices_handler(handler))


_Result = TypeVar("_Result")


class _Scheduled(Exception):
    """Leaves Inductor once a graph is scheduled."""


def lower_and_schedule(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    read: Callable[[GraphLowering], _Result],
    **options: Any,
) -> _Result:
    """Let Inductor lower, fuse and order a graph, read the result, and stop before code is written.

    Source: `GraphLowering.codegen` (torch._inductor.graph), whose first two steps these are.

    Args:
        gm: a forward or backward graph as AOTAutograd hands it to Inductor, which takes ownership
            of it.
        example_inputs: its inputs.
        read: called with the lowered graph, its scheduler in place, under Inductor's handlers.
        **options: of `compile_fx_inner`.

    Returns:
        What `read` returns.
    """
    results: list[_Result] = []

    def stop_when_scheduled(graph: GraphLowering) -> Any:
        graph.init_wrapper_code()
        graph._update_scheduler()
        _report_output_strides(graph)
        results.append(read(graph))
        raise _Scheduled

    settings = {
        # Inductor does not lower a graph that it finds in its cache
        "fx_graph_cache": False,
        # a search for the fastest kernels would run them
        "max_autotune": False,
        "max_autotune_gemm": False,
        # Inductor copies its configuration for its logs, and a partitioner may hold fake tensors
        "custom_partitioner_fn": None,
    }
    with (
        inductor_config.patch(settings),
        patch.object(GraphLowering, "codegen", stop_when_scheduled),
        comparing_sparse_results(),
    ):
        try:
            compile_fx_inner(gm, example_inputs, **options)
        except Exception:
            if not results:
                raise
    if not results:
        raise AssertionError("Inductor returned without scheduling the graph")
    return results[0]


def _report_output_strides(graph: GraphLowering) -> None:
    """Tell AOTAutograd the strides of a forward graph's outputs.

    The backward graph is lowered for these strides.
    `set_tracing_context_output_strides` (torch._inductor.output_code) does so for a compiled graph.
    Symbolic strides are left out.
    """
    context = TracingContext.try_get()
    if context is None or context.output_strides is None or context.output_strides:
        return
    for output in graph.graph_outputs:
        layout = output.maybe_get_layout() if isinstance(output, inductor_ir.IRNode) else None
        strides = list(getattr(layout, "stride", None) or [])
        is_plain = bool(strides) and all(
            isinstance(stride, int | sympy.Integer) for stride in strides
        )
        context.output_strides.append(tuple(map(int, strides)) if is_plain else None)


def inplace_decisions() -> Any:
    """Context in which Inductor's scheduler decides which outputs take over the memory of an input.

    `Scheduler.codegen_extern_call` does so for kernels that Inductor does not write itself.
    """
    return V.set_kernel_handler(Kernel(increase_kernel_count=False))


def results_of(operator: Any) -> Iterator[Any]:
    """The scheduled buffers of an operator's several results, each as often as it has readers."""
    for user in operator.users:
        parts = user.node.get_outputs() if hasattr(user.node, "get_outputs") else []
        yield from (part for part in parts if isinstance(part.node, inductor_ir.MultiOutput))
