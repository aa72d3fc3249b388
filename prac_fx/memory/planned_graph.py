"""One of Dynamo's graphs, planned: what Inductor would allocate, for it and as we rewrite it.

The backend's own two phases run (`prac_fx.compiler.two_phases`). In the place of Inductor's
compilation stands an observer, which has Inductor lower and schedule each half
(`prac_fx.memory.inductor_buffers`) and stops there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch.fx as fx

from prac_fx.compiler.dynamo_graph import DynamoGraph
from prac_fx.compiler.peak_aware_reuse import without_higher_peak
from prac_fx.compiler.pipeline import RewritePartitioner, analyse
from prac_fx.compiler.two_phases import in_two_phases, lower_rewritten
from prac_fx.config import PracConfig
from prac_fx.errors import one_line
from prac_fx.graph.flops import CountedOperator, counted_operators, flops_by_module
from prac_fx.graph.nbytes import Symbols, size_hint
from prac_fx.memory.inductor_buffers import GraphPlan, plan_graph
from prac_fx.memory.joint_facts import JointFacts, joint_facts
from prac_fx.memory.saved_rows import values_unplanned, with_nbytes
from prac_fx.passes.draws import draws_anew, partition_drawing_once
from prac_fx.passes.partition import PartitionedGraph
from prac_fx.passes.plan_data import Plan, PlannedValue
from prac_fx.passes.runner import Pass, Work, merge_duplicates, observed
from prac_fx.passes.survey import saved_values
from prac_fx.torch_compat import (
    CustomPartitionerFn,
    SymbolicSizes,
    compile_fx,
    copy_dynamo_graph,
    make_boxed_func,
    min_cut_rematerialization_partition,
    raise_signal,
    tracing_fake_mode,
)


@dataclass(frozen=True)
class PlannedGraph:
    """One of Dynamo's graphs, partitioned and planned.

    Attributes:
        facts: of the joint graph.
        forward: what Inductor would allocate.
        backward: likewise.
        forward_operators: matmuls, convolutions and attention in the forward graph.
        operators: likewise in both.
        plan: what our passes decide; None when they were not asked, or no parameter enters the
            graph.
        unplanned: what is saved then, where they were asked.
        rewritten: what they made; None for plain Inductor.
        refused: why the graph cannot be rewritten; None when it can.
        draws_anew: torch's own partitioner has backward draw random numbers again, which makes
            gradients wrong.
        symbols: values of symbolic sizes in one run; none for those while tracing.
    """

    facts: JointFacts
    forward: GraphPlan
    backward: GraphPlan
    forward_operators: tuple[CountedOperator, ...]
    operators: tuple[CountedOperator, ...]
    plan: Plan | None = None
    unplanned: tuple[PlannedValue, ...] = ()
    rewritten: PartitionedGraph | None = None
    refused: str | None = None
    draws_anew: bool = False
    symbols: Symbols = field(default_factory=dict)

    @cached_property
    def forward_flops(self) -> Mapping[str, int]:
        """FLOPs of the forward graph by module path."""
        return flops_by_module(self.forward_operators, self.symbols)

    @cached_property
    def flops(self) -> Mapping[str, int]:
        """FLOPs of both graphs by module path."""
        return flops_by_module(self.operators, self.symbols)

    @cached_property
    def saved_arguments(self) -> frozenset[int]:
        """Indices of the arguments that are saved as they are."""
        forward, arguments = self.forward, self.facts.arguments
        saved = (pair for pair in forward.outputs[self.facts.num_results :] if pair is not None)
        return frozenset(
            arguments[name]
            for name, buffer in saved
            if name in arguments and buffer in forward.inputs
        )

    def at(self, symbols: Symbols, storages: Sequence[int | None]) -> PlannedGraph:
        """The same in another run; what is decided stays.

        What the encoding of a value takes there is in `rewritten` alone.

        Args:
            symbols: values of symbolic sizes.
            storages: bytes behind each argument, which the graph does not tell where an argument is
                a view; None where they are not known.
        """
        inputs = {
            name: nbytes
            for name, index in self.facts.arguments.items()
            if index < len(storages) and (nbytes := storages[index]) is not None
        }
        if not symbols and self.forward.has_inputs(inputs):
            return self
        plan, rewritten = self.plan, self.rewritten
        if plan is not None:
            plan = replace(plan, values=self._rows_at(plan.values, symbols))
        if rewritten is not None:
            saved = tuple(value.at(symbols) for value in rewritten.saved)
            rewritten = replace(rewritten, saved=saved)
        return replace(
            self,
            forward=self.forward.at(symbols, inputs),
            backward=self.backward.at(symbols, {}),
            plan=plan,
            unplanned=self._rows_at(self.unplanned, symbols),
            rewritten=rewritten,
            symbols=symbols,
        )

    def _rows_at(self, rows: Sequence[PlannedValue], symbols: Symbols) -> tuple[PlannedValue, ...]:
        sizes = self.facts.symbolic_nbytes
        return tuple(
            with_nbytes(row, size_hint(sizes[row.name], symbols)) if row.name in sizes else row
            for row in rows
        )


def plan_plain(
    graph: DynamoGraph, config: PracConfig | None, patches: Mapping[str, Any]
) -> PlannedGraph | None:
    """Plan a graph as plain Inductor compiles it. None when it has no backward.

    Args:
        graph: Dynamo's.
        config: options of our backend, when its plan for the graph is wanted too.
        patches: Inductor's.
    """
    observer = _Observer()
    partitioner = _PlainPartitioner(observer, graph, config)
    try:
        compile_fx(
            copy_dynamo_graph(graph.gm),
            list(graph.example_inputs),
            inner_compile=observer.compile,
            config_patches={**patches, "custom_partitioner_fn": partitioner},
        )
    except _NoBackward:
        return None
    except _Planned:
        planned = observer.planned(partitioner.plan, None)
        if planned.plan is not None and planned.plan.changes_graph:
            partitioner.sizes.restore()  # our second phase knows no more than the first
        return replace(planned, unplanned=partitioner.unplanned, draws_anew=partitioner.draws_anew)
    raise AssertionError("AOTAutograd returned without lowering a backward graph")


def plan_rewritten(
    graph: DynamoGraph, before: PlannedGraph, config: PracConfig, patches: Mapping[str, Any]
) -> PlannedGraph:
    """Plan a graph as our backend compiles it, after its first phase.

    Args:
        graph: Dynamo's.
        before: of plain Inductor, with a plan.
        config: options of our backend.
        patches: Inductor's.

    Returns:
        `before` itself when nothing is rewritten, or a copy that says why it cannot be.
    """

    def second_phase(plan: Plan) -> PlannedGraph:
        return _lowered(graph, plan, config, patches)

    # where the backend is strict, a failure ends the job: the report tells of one that goes on
    lenient = replace(config, strict=False)
    try:
        plan, planned = in_two_phases(
            graph,
            lenient,
            patches,
            second_phase,
            first_plan=before.plan,
            log_level=logging.DEBUG,
        )
    except Exception as error:
        raise_signal(error)
        return replace(before, refused=one_line(error))
    if planned is not None:
        return planned
    return before if plan is before.plan else replace(before, plan=plan)


def _lowered(
    graph: DynamoGraph, plan: Plan, config: PracConfig, patches: Mapping[str, Any]
) -> PlannedGraph:
    """A graph that is rewritten by a plan."""
    observer = _Observer()
    partitioner = _RewritePartitioner(observer, graph, plan, config)
    with suppress(_Planned):
        lower_rewritten(graph, plan, patches, partitioner, without_higher_peak(observer.compile))
    return observer.planned(plan, partitioner.result)


class _NoBackward(Exception):
    """The graph turned out to be an inference graph."""


class _Planned(Exception):
    """Both halves of a graph are planned."""


class _Observer:
    """Stands in for Inductor behind AOTAutograd: plans both graphs, and stops there."""

    def __init__(self) -> None:
        self.facts: JointFacts | None = None
        self.forward: GraphPlan | None = None
        self.backward: GraphPlan | None = None
        self.forward_operators: tuple[CountedOperator, ...] = ()
        self.operators: tuple[CountedOperator, ...] = ()

    def look(
        self, gm: fx.GraphModule, options: Mapping[str, Any], parameters: frozenset[int]
    ) -> None:
        """See the joint graph before it is rewritten or partitioned."""
        self.facts = joint_facts(gm.graph, options["num_fwd_outputs"], parameters)

    def compile(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Any:
        """In the place of `compile_fx_inner`."""
        if self.facts is None:
            raise _NoBackward
        operators = counted_operators(gm.graph)
        self.operators += operators
        if self.forward is None:
            self.forward_operators = operators
            run: Callable[..., Any] = gm.forward
            self.forward = plan_graph(gm, example_inputs, **options)
            return make_boxed_func(run)
        self.backward = plan_graph(gm, example_inputs, **options)
        raise _Planned

    def planned(self, plan: Plan | None, rewritten: PartitionedGraph | None) -> PlannedGraph:
        """What was seen."""
        assert self.facts is not None
        assert self.forward is not None
        assert self.backward is not None
        return PlannedGraph(
            self.facts,
            self.forward,
            self.backward,
            self.forward_operators,
            self.operators,
            plan,
            rewritten=rewritten,
        )


class _PlainPartitioner(CustomPartitionerFn):
    """torch's own partitioner; where our passes look first, that of graphs which we leave alone."""

    def __init__(self, observer: _Observer, graph: DynamoGraph, config: PracConfig | None) -> None:
        self._observer = observer
        self._arguments = graph.arguments
        self._is_planned = graph.is_planned
        self._config = config
        self.plan: Plan | None = None
        self.unplanned: tuple[PlannedValue, ...] = ()
        self.draws_anew = False
        self._mode = tracing_fake_mode(graph.example_inputs)
        self.sizes = SymbolicSizes(self._mode)

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **options: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        if self._config is not None and self._is_planned:
            self.plan = analyse(  # merges duplicates first of all
                gm, joint_inputs, options, config=self._config, arguments=self._arguments
            )
            self.sizes = SymbolicSizes(self._mode)
        else:
            merge_duplicates(gm, options["num_fwd_outputs"])
        self._observer.look(gm, options, self._arguments.parameters)
        halves = min_cut_rematerialization_partition(gm, joint_inputs, **options)
        self.draws_anew = draws_anew(gm.graph, *halves)
        if self._config is not None and self.draws_anew:
            halves = partition_drawing_once(gm, joint_inputs, **options)
        if self._config is not None and not self._is_planned:
            saved = saved_values(gm.graph, halves[0], options["num_fwd_outputs"])
            self.unplanned = tuple(values_unplanned(saved))
        return halves

    def uuid(self) -> None:
        """Nothing is compiled, so there is nothing to cache."""
        return


class _RewritePartitioner(RewritePartitioner):
    """The partitioner of compilation, observed."""

    def __init__(
        self, observer: _Observer, graph: DynamoGraph, plan: Plan, config: PracConfig
    ) -> None:
        super().__init__(plan, len(graph.example_inputs), config)
        self._observer = observer
        self._parameters = graph.parameters
        self.result: PartitionedGraph | None = None

    def run(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], options: Mapping[str, Any]
    ) -> PartitionedGraph:
        def look(done: Pass, work: Work) -> None:
            if done.name == "merge_duplicates":
                self._observer.look(work.gm, options, self._parameters)

        with observed(look):
            self.result = super().run(gm, joint_inputs, options)
        return self.result

    def uuid(self) -> None:  # type: ignore[override]
        """Nothing is compiled, so there is nothing to cache."""
        return
