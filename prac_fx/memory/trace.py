"""Trace one training step, plain or as our backend rewrites it, and plan what it allocates.

Dynamo and AOTAutograd trace the model, torch's partitioner and our passes split it, and Inductor
lowers and schedules both halves (`prac_fx.memory.planned_graph`). Nothing is compiled. The model
itself then runs once, eagerly; with fake tensors that costs nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.fx as fx
from torch import Tensor

from prac_fx.compiler.dynamo_graph import DynamoGraph
from prac_fx.compiler.two_phases import analyse_graph
from prac_fx.config import PracConfig
from prac_fx.graph.nbytes import storage_nbytes
from prac_fx.memory.graph_run import GraphRun
from prac_fx.memory.module_paths import name_from_model
from prac_fx.memory.outside import Outside, OutsideObserver, black_box
from prac_fx.memory.planned_graph import PlannedGraph, plan_plain, plan_rewritten
from prac_fx.memory.step import GraphBreak, Step, trace_with
from prac_fx.memory.step_plan import StepGraph
from prac_fx.torch_compat import (
    existing_storages,
    inner_tensors,
    is_traceable_wrapper_subclass,
    placeholder_source_name,
    storage_key,
)


@dataclass(frozen=True)
class Call:
    """One run of a graph in the forward pass.

    Attributes:
        graph: number of the graph, which may run several times.
        before: with plain Inductor, at the sizes of this run.
        after: as our backend makes it; the same object where it leaves the graph alone, or was not
            asked.
        trainable: argument indices of the trained parameters.
        arguments: storage of each argument.
        results: storage of each result.
        existing: the arguments whose storage is older than the step, with Dynamo's names of where
            they come from.
    """

    graph: int
    before: PlannedGraph
    after: PlannedGraph
    trainable: frozenset[int]
    arguments: tuple[int | None, ...]
    results: tuple[int | None, ...]
    existing: tuple[tuple[str, Tensor], ...] = ()

    def step_graph(self, planned: PlannedGraph) -> StepGraph:
        """`before` or `after` with the storages of this call."""
        facts = planned.facts
        arguments = {name: self._argument(index) for name, index in facts.arguments.items()}
        return StepGraph(
            forward=planned.forward,
            backward=planned.backward,
            num_results=facts.num_results,
            loss_result=facts.loss_result,
            loss=facts.loss,
            arguments={name: of for name, of in arguments.items() if of is not None},
            results=tuple(
                self.results[i] if i is not None and i < len(self.results) else None
                for i in facts.results
            ),
            gradients=tuple(
                self._argument(i) if i in self.trainable else None for i in facts.gradients
            ),
        )

    def _argument(self, index: int | None) -> int | None:
        # state placeholders come after Dynamo's arguments
        return self.arguments[index] if index is not None and index < len(self.arguments) else None


@dataclass(frozen=True)
class Trace:
    """A traced step.

    Attributes:
        calls: the runs of graphs that have a backward, in order.
        graph_breaks: where Dynamo ends a graph and begins another.
        outside: what is held outside of the graphs, if the step is sharded.
    """

    calls: tuple[Call, ...]
    graph_breaks: tuple[GraphBreak, ...]
    outside: Outside | None = None


def trace(
    step: Step,
    config: PracConfig | None = None,
    patches: Mapping[str, Any] | None = None,
    *,
    budget: float | None = None,
    plain: Sequence[Call] = (),
) -> Trace:
    """Trace the step.

    Args:
        step: what to trace.
        config: options of our backend; None for plain Inductor alone.
        patches: Inductor's.
        budget: torch's `activation_memory_budget`; None for the one that is set.
        plain: an earlier trace of the same step with other options of our backend: what plain
            Inductor makes of its graphs is not found out again.
    """
    observer = OutsideObserver(step) if step.sharded else None
    backend = _Planner(step.model, config, patches or {}, [call.before for call in plain], observer)

    def run_again(result: Any, again: Callable[[], Any]) -> None:
        if observer is not None:
            observer.get_ready(result)
        # under DistributedDataParallel, Dynamo has run a graph to find the inputs of the next one
        backend.calls.clear()
        if observer is None:
            again()
        else:
            observer.watch(again)

    twice = step.sharded or step.has_buckets
    breaks = trace_with(step, backend, budget, run_again if twice else None)
    outside = None if observer is None else observer.seen([one.arguments for one in backend.calls])
    return Trace(tuple(backend.calls), breaks, outside)


class _Planner:
    """A Dynamo backend that plans each graph, and runs it eagerly."""

    def __init__(
        self,
        model: Callable[..., Any],
        config: PracConfig | None,
        patches: Mapping[str, Any],
        known: Sequence[PlannedGraph],
        observer: OutsideObserver | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.patches = patches
        self.known = known
        self.observer = observer
        self.calls: list[Call] = []
        self._num_graphs = 0
        # whatever the model reads it from: a closure, an attribute, a global
        self._existing = existing_storages()
        # storages are known by their address, which must not be used again
        self._alive: list[Any] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        name_from_model(gm, self.model)
        graph = DynamoGraph(gm, tuple(example_inputs)).without_regions()
        forward = GraphRun(graph)
        before = self._plain(graph) if graph.requires_grad else None
        if before is None:
            return forward
        after = before
        if self.config is not None and before.plan is not None:
            after = plan_rewritten(graph, before, self.config, self.patches)
        number = self._num_graphs
        self._num_graphs += 1
        trainable, sources = graph.trainable, [*map(placeholder_source_name, graph.placeholders)]

        def run(*args: Any) -> Any:
            results = self._results(forward, args, after.saved_arguments, trainable)
            self._alive += [args, results]
            arguments = _storages(args)
            existing = tuple(
                (sources[index], args[index])
                for index, storage in enumerate(arguments)
                if storage in self._existing
            )
            # the graph was planned with the sizes of its first run
            sizes = graph.symbols_in(args), _nbytes_behind(args)
            plain = before.at(*sizes)
            ours = plain if after is before else after.at(*sizes)
            self.calls.append(
                Call(number, plain, ours, trainable, arguments, _storages(results), existing)
            )
            return results

        return run

    def _results(
        self,
        graph: GraphRun,
        args: Sequence[Any],
        saved: Collection[int],
        trainable: Collection[int],
    ) -> tuple[Any, ...]:
        if self.observer is None:
            return graph.run(args, saved)
        results = black_box(graph.results, self.observer, len(self.calls), trainable, args)
        return graph.marked(args, results, saved)

    def _plain(self, graph: DynamoGraph) -> PlannedGraph | None:
        """The graph by plain Inductor, with our plan; known if its joint graph is."""
        if self.config is not None and self.known and graph.is_planned:
            plan = analyse_graph(graph, self.config, self.patches)
            for known in self.known:
                if plan and known.plan and known.plan.fingerprint == plan.fingerprint:
                    return dataclasses.replace(known, plan=plan, refused=None)
        return plan_plain(graph, self.config, self.patches)


def _nbytes_behind(values: Sequence[Any]) -> list[int | None]:
    """Bytes of the storages, but for subclasses such as DTensor, which others stand for."""
    return [
        storage_nbytes(value)
        if isinstance(value, Tensor) and not is_traceable_wrapper_subclass(value)
        else None
        for value in values
    ]


def _storages(values: Sequence[Any]) -> tuple[int | None, ...]:
    return tuple(
        storage_key(next(inner_tensors(value))) if isinstance(value, Tensor) else None
        for value in values
    )
