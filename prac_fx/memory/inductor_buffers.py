"""Which buffers Inductor allocates for a graph, kernel by kernel, and when it frees them.

Inductor itself is asked: it lowers the graph, fuses and orders the kernels, and decides which
results take over the memory of an input. No code is written or compiled, so this takes a second or
two where compilation takes minutes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch import Tensor

from prac_fx.graph.nbytes import (
    Symbols,
    evaluated,
    expression_of,
    size_hint,
    storage_nbytes,
    storage_size,
)
from prac_fx.graph.origin import Origin, origin_of
from prac_fx.torch_compat import (
    AllocateLine,
    FreeIfNotReusedLine,
    FreeLine,
    GraphLowering,
    ReuseLine,
    inductor_ir,
    inplace_decisions,
    lower_and_schedule,
    results_of,
)


@dataclass(frozen=True)
class Value:
    """A tensor of the graph, as far as memory is concerned.

    Attributes:
        name: of the FX node that it is, or Inductor's name where it knows none.
        nbytes: of its storage.
        shape: its sizes.
        dtype: such as "bfloat16".
        origin: where in the user's code it comes from.
        symbolic: its bytes and its sizes as expressions, where symbolic sizes are among them.
    """

    name: str
    nbytes: int
    shape: tuple[int, ...]
    dtype: str
    origin: Origin
    symbolic: tuple[sympy.Expr, ...] = ()

    def at(self, symbols: Symbols) -> Value:
        """The same in a run of the graph in which symbolic sizes have these values."""
        if not self.symbolic:
            return self
        known = (self.nbytes, *self.shape)
        found = (evaluated(expression, symbols) for expression in self.symbolic)
        nbytes, *shape = (
            old if new is None else new for old, new in zip(known, found, strict=True)
        )
        return replace(self, nbytes=nbytes, shape=tuple(shape))


@dataclass(frozen=True)
class Kernel:
    """One entry of Inductor's schedule. Buffers and graph inputs go by Inductor's names.

    Attributes:
        names: of the FX nodes it computes.
        origin: of the last of them.
        allocated: what it writes to new memory, before it runs.
        replaced: buffers whose memory some of `allocated` take over; they are gone when it runs.
        freed: buffers and graph inputs that nothing reads after it.
    """

    names: tuple[str, ...]
    origin: Origin
    allocated: dict[str, Value]
    replaced: tuple[str, ...]
    freed: tuple[str, ...]

    def at(self, symbols: Symbols) -> Kernel:
        """The same in a run of the graph in which symbolic sizes have these values."""
        return replace(self, allocated=_at(self.allocated, symbols))


@dataclass(frozen=True)
class GraphPlan:
    """What a graph allocates.

    Attributes:
        inputs: the tensors among the graph's inputs, by name.
        kernels: in the order in which they run.
        outputs: for each output of the graph the name of its FX node and the buffer or graph input
            that it is, or is a view of; None for what is no tensor.
    """

    inputs: dict[str, Value]
    kernels: tuple[Kernel, ...]
    outputs: tuple[tuple[str, str] | None, ...]

    def saved_buffers(self, num_results: int) -> frozenset[str]:
        """What a forward graph hands to its backward, after so many results for the caller."""
        return frozenset(pair[1] for pair in self.outputs[num_results:] if pair is not None)

    def has_inputs(self, nbytes: Mapping[str, int]) -> bool:
        """Are these the bytes of those of its inputs that are named?"""
        known = self.inputs
        return all(known[name].nbytes == nbytes[name] for name in nbytes if name in known)

    def at(self, symbols: Symbols, nbytes: Mapping[str, int]) -> GraphPlan:
        """The same in another run.

        Args:
            symbols: values of symbolic sizes.
            nbytes: of inputs, by name; those of others follow from their sizes.
        """
        inputs = {
            name: replace(value, nbytes=nbytes.get(name, value.nbytes))
            for name, value in _at(self.inputs, symbols).items()
        }
        return GraphPlan(inputs, tuple(kernel.at(symbols) for kernel in self.kernels), self.outputs)


def _at(values: dict[str, Value], symbols: Symbols) -> dict[str, Value]:
    return {name: value.at(symbols) for name, value in values.items()}


def plan_graph(gm: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> GraphPlan:
    """Plan a graph as Inductor would.

    Args:
        gm: from AOTAutograd; Inductor's passes edit it.
        example_inputs: its inputs.
        **options: what AOTAutograd gives to Inductor beside them.
    """
    inputs = {
        str(node.target): _value(node.name, node)
        for node in gm.graph.find_nodes(op="placeholder")
        if isinstance(node.meta.get("val"), Tensor)
    }
    outputs: Any = next(iter(gm.graph.find_nodes(op="output"))).args[0]
    if not any(node.op == "call_function" for node in gm.graph.nodes):
        return GraphPlan(inputs, (), tuple(_input_output(output, inputs) for output in outputs))
    names = [output.name if isinstance(output, fx.Node) else None for output in outputs]

    def read(graph: GraphLowering) -> GraphPlan:
        buffers = [_output_buffer(output) for output in graph.graph_outputs]
        pairs = [
            (name, buffer) if name is not None and buffer is not None else None
            for name, buffer in zip(names, buffers, strict=True)
        ]
        return GraphPlan(inputs, tuple(_Schedule(graph).kernels()), tuple(pairs))

    return lower_and_schedule(gm, example_inputs, read, **options)


def _value(name: str, node: fx.Node) -> Value:
    tensor: Tensor = node.meta["val"]
    shape = tuple(size_hint(size) for size in tensor.shape)
    dtype = str(tensor.dtype).removeprefix("torch.")
    symbolic = _if_symbolic(map(expression_of, (storage_size(tensor), *tensor.shape)))
    return Value(name, storage_nbytes(tensor), shape, dtype, origin_of(node), symbolic)


def _if_symbolic(expressions: Iterable[sympy.Expr]) -> tuple[sympy.Expr, ...]:
    """The expressions, unless all of them are plain numbers."""
    listed = tuple(expressions)
    return listed if any(one.free_symbols for one in listed) else ()


def _input_output(output: object, inputs: dict[str, Value]) -> tuple[str, str] | None:
    """An output of a graph that computes nothing: one of its inputs, or no tensor."""
    if not isinstance(output, fx.Node) or str(output.target) not in inputs:
        return None
    return output.name, str(output.target)


def _output_buffer(output: Any) -> str | None:
    """Name of the buffer behind a graph output; None for a constant or a symbolic size."""
    if isinstance(output, inductor_ir.NoneAsConstantBuffer | inductor_ir.ShapeAsConstantBuffer):
        return None
    name: str = output.get_name()
    return name


class _Schedule:
    """Walks through Inductor's schedule as `Scheduler._codegen` does, and notes allocations."""

    def __init__(self, graph: GraphLowering) -> None:
        self.graph = graph
        self.scheduler = graph.scheduler
        self.wrapper = graph.wrapper_code

    def kernels(self) -> Iterator[Kernel]:
        """The kernels in order."""
        nodes = self.scheduler.nodes
        ends = []
        for node, following in zip_longest(nodes, nodes[1:]):
            self._run(node)
            if following is None:
                # stands for the call of the last kernel: Inductor drops allocations after it, as
                # nothing would use them
                self.wrapper.writeline("")  # type: ignore[no-untyped-call]
            if not _shares_call(node, following):
                self.scheduler.free_buffers()
            ends.append(len(self.wrapper.lines))
        # what is freed may wait to be used again instead, and is held until then
        self.wrapper.run_wrapper_ir_passes(is_inference=False)
        for node, begin, end in zip(nodes, [0, *ends], ends, strict=False):
            yield self._kernel(node, self.wrapper.lines[begin:end])

    def _run(self, node: Any) -> None:
        """Allocate what a node writes, and note what nothing reads after it."""
        self.scheduler.current_node = node
        self.scheduler.buffer_names_to_free.update(node.last_usage)
        with inplace_decisions():
            for part in node.get_nodes():
                part.decide_inplace_update()
                part.mark_run()
        self.scheduler.available_buffer_names.update(node.get_buffer_names())
        self.scheduler.completed_operations.update(node.get_operation_names())
        self.graph.removed_buffers |= self._local_buffers(node)

    def _local_buffers(self, node: Any) -> set[str]:
        """Buffers that only the kernel reads which writes them: they live in registers.

        Results that take over one another's memory stay together, as in
        `Kernel.remove_kernel_local_buffers`: all of them are local, or none is.
        """
        if node.is_extern():
            return set()
        operations = node.get_operation_names()
        local = {
            name
            for name in node.get_buffer_names()
            if self.scheduler.can_buffer_be_removed_through_fusion(name, operations)
        }
        results = [result.get_name() for result in node.get_outputs()]
        reuses = self.wrapper.reuses
        for name in reversed(results):
            if name in reuses and name not in local:
                local.discard(reuses[name])
        for name in results:
            if name in reuses and reuses[name] not in local:
                local.discard(name)
        return local

    def _kernel(self, node: Any, lines: Sequence[Any]) -> Kernel:
        allocated: dict[str, Value] = {}
        replaced: list[str] = []
        freed: list[str] = []
        for line in lines:
            if isinstance(line, AllocateLine):
                allocated[line.node.get_name()] = self._buffer(line.node)
            elif isinstance(line, ReuseLine):
                # within a kernel, or from a buffer that was there before
                old = line.node.get_name()
                if allocated.pop(old, None) is None:
                    replaced.append(old)
                allocated[line.reused_as.get_name()] = self._buffer(line.reused_as)
            elif isinstance(line, FreeLine) or (
                isinstance(line, FreeIfNotReusedLine) and not line.is_reused
            ):
                freed.append(line.node.get_name())
        allocated |= {buffer.get_name(): self._buffer(buffer) for buffer in _own_results(node)}
        origins = _fx_nodes(node)
        origin = origin_of(origins[-1]) if origins else Origin("", node.get_name(), "", 0)
        names = tuple(origin.name for origin in origins)
        return Kernel(names, origin, allocated, tuple(replaced), tuple(freed))

    def _buffer(self, buffer: Any) -> Value:
        dtype: torch.dtype = buffer.get_dtype()
        sizes = [
            self.graph.get_allocation_storage_size(buffer) * dtype.itemsize,
            *buffer.get_size(),
        ]
        nbytes, *shape = map(self._hint, sizes)
        node = buffer.get_origin_node() or next(iter(_by_position(buffer.get_origins())), None)
        origin = Origin("", "", "", 0) if node is None else origin_of(node)
        name = buffer.get_name() if node is None else node.name
        return Value(
            name,
            nbytes,
            tuple(shape),
            str(dtype).removeprefix("torch."),
            origin,
            _if_symbolic(map(self._expression, sizes)),
        )

    def _expression(self, size: Any) -> sympy.Expr:
        # Inductor has symbols of its own for expressions of the graph's
        expression: sympy.Expr = self.graph.sizevars.remove_precomputed_replacements(
            sympy.sympify(size)
        )
        return expression

    def _hint(self, size: Any) -> int:
        return int(self.graph.sizevars.optimization_hint(size, fallback=0))


def _shares_call(node: Any, following: Any) -> bool:
    """Does Inductor's C++ backend run two scheduled nodes in one call, and free only after both?

    Source: `CppScheduling.flush`, which runs before each external kernel and at the end.
    """
    if following is None or node.is_extern() or following.is_extern():
        return False
    device, next_device = node.get_device(), following.get_device()
    return device is not None and device.type == "cpu" and device == next_device


def _own_results(node: Any) -> Iterator[Any]:
    """Buffers that an operator allocates itself, which no line of the wrapper shows."""
    for part in node.get_nodes():
        operation = part.node
        if not isinstance(operation, inductor_ir.ExternKernelAlloc):
            continue
        for result in part.get_outputs():
            yield from _tensors_of(result)


def _tensors_of(result: Any) -> Iterator[Any]:
    buffer = result.node
    if buffer.should_allocate() or buffer.get_inputs_that_alias_output():
        return
    if isinstance(buffer.layout, inductor_ir.MultiOutputLayout):
        yield from (part.node for part in results_of(result))
    elif isinstance(buffer.layout, inductor_ir.FixedLayout | inductor_ir.FlexibleLayout):
        if not buffer.get_mutation_names():
            yield buffer


def _fx_nodes(node: Any) -> list[fx.Node]:
    origins = {
        origin
        for part in node.get_nodes()
        if part.node is not None
        for origin in part.node.get_origins()
    }
    return _by_position(origins)


def _by_position(nodes: Any) -> list[fx.Node]:
    return sorted(node for node in nodes if node.op == "call_function")
