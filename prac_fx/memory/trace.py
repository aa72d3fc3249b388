"""Trace one training step, with plain Inductor or as our backend rewrites it, and plan what it allocates.

Dynamo and AOTAutograd trace the model, torch's partitioner and our passes split it, and Inductor lowers and schedules
both halves (`prac_fx.memory.inductor_buffers`). Nothing is compiled. The model itself then runs once, eagerly; with fake tensors
that costs nothing.
"""

from __future__ import annotations

import dataclasses
import logging
import types
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from prac_fx.compiler.dynamo_graph import DynamoGraph
from prac_fx.compiler.peak_aware_reuse import without_higher_peak
from prac_fx.compiler.pipeline import Arguments, RewritePartitioner, analyse, merge_duplicates
from prac_fx.compiler.two_phases import analyse_graph, in_two_phases, lower_rewritten
from prac_fx.config import PracConfig
from prac_fx.errors import one_line
from prac_fx.graph.flops import graph_flops
from prac_fx.memory.inductor_buffers import GraphPlan, plan_graph
from prac_fx.memory.joint_facts import JointFacts, joint_facts
from prac_fx.memory.timeline import StepGraph
from prac_fx.passes.draws import draws_anew, partition_drawing_once
from prac_fx.passes.partition import PartitionedGraph
from prac_fx.passes.plan import Plan
from prac_fx.torch_compat import (
    CustomPartitionerFn,
    FakeTensorMode,
    compile_fx,
    copy_dynamo_graph,
    functorch_config,
    make_boxed_func,
    min_cut_rematerialization_partition,
    raise_signal,
    storage_key,
    without_recompile_limit,
)


@dataclass(frozen=True)
class Step:
    """What to trace.

    Attributes:
        model: called with the inputs.
        args: positional inputs.
        kwargs: keyword inputs.
        loss_fn: applied to the result and traced together with the model.
        fake_mode: of the model's tensors, if they are fake.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    loss_fn: Callable[[Any], Any] | None = None
    fake_mode: FakeTensorMode | None = None


@dataclass(frozen=True)
class PlannedGraph:
    """One of Dynamo's graphs, partitioned and planned.

    Attributes:
        facts: of the joint graph.
        forward: what Inductor would allocate.
        backward: likewise.
        forward_flops: of matmuls, convolutions and attention in the forward graph, by module path.
        flops: of both.
        plan: what our passes decide; None when they were not asked.
        rewritten: what they made; None for plain Inductor.
        refused: why the graph cannot be rewritten; None when it can.
        draws_anew: torch's own partitioner has backward draw random numbers again, which makes gradients wrong.
    """

    facts: JointFacts
    forward: GraphPlan
    backward: GraphPlan
    forward_flops: Mapping[str, int]
    flops: Mapping[str, int]
    plan: Plan | None = None
    rewritten: PartitionedGraph | None = None
    refused: str | None = None
    draws_anew: bool = False


@dataclass(frozen=True)
class Call:
    """One run of a graph in the forward pass.

    Attributes:
        before: with plain Inductor.
        after: as our backend makes it; the same object where it leaves the graph alone, or was not asked.
        trainable: argument indices of the trained parameters.
        arguments: storage of each argument.
        results: storage of each result.
    """

    before: PlannedGraph
    after: PlannedGraph
    trainable: frozenset[int]
    arguments: tuple[int | None, ...]
    results: tuple[int | None, ...]

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
            arguments={name: one for name, one in arguments.items() if one is not None},
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


def trace(
    step: Step,
    config: PracConfig | None = None,
    patches: Mapping[str, Any] | None = None,
    *,
    budget: float | None = None,
    plain: Sequence[Call] = (),
) -> list[Call]:
    """Trace the step.

    Args:
        step: what to trace.
        config: options of our backend; None for plain Inductor alone.
        patches: Inductor's.
        budget: torch's `activation_memory_budget`; None for the one that is set.
        plain: an earlier trace of the same step with other options of our backend: what plain Inductor makes of its
            graphs is not found out again.

    Returns:
        The runs of graphs that have a backward, in order.
    """
    backend = _Planner(config, patches or {}, [call.before for call in plain])
    trace_with(step, backend, budget)
    return backend.calls


def trace_with(step: Step, backend: Callable[..., Any], budget: float | None = None) -> None:
    """Have a Dynamo backend look at the graphs of a step, and run what it returns.

    Args:
        step: what to trace.
        backend: called with each graph and its example inputs.
        budget: torch's `activation_memory_budget`; None for the one that is set.
    """

    def run(self: Any, *inputs: Any, **named: Any) -> Any:
        result = self(*inputs, **named)
        return result if step.loss_fn is None else step.loss_fn(result)

    # a code object of its own, so that no earlier call counts against Dynamo's recompile limit
    fresh = types.FunctionType(run.__code__.replace(), run.__globals__, closure=run.__closure__)
    settings: dict[str, Any] = {
        # a warm cache would not ask the partitioner, and a lazy backward would never be lowered
        "enable_autograd_cache": False,
        "force_non_lazy_backward_lowering": True,
    }
    if budget is not None:
        settings["activation_memory_budget"] = budget
    with (
        torch.enable_grad(),
        functorch_config.patch(settings),
        without_recompile_limit(),
        step.fake_mode or nullcontext(),
    ):
        torch.compile(fresh, backend=backend)(step.model, *step.args, **step.kwargs)


class _Planner:
    """A Dynamo backend that plans each graph, and runs it eagerly."""

    def __init__(
        self,
        config: PracConfig | None,
        patches: Mapping[str, Any],
        planned: Sequence[PlannedGraph],
    ) -> None:
        self.config = config
        self.patches = patches
        self.planned = planned
        self.calls: list[Call] = []
        # storages are known by their address, which must not be used again
        self._results: list[Any] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graph = DynamoGraph(gm, tuple(example_inputs))
        forward: Callable[..., Any] = gm.forward
        before = self._plain(graph) if graph.is_planned else None
        if before is None:
            return forward
        after = before
        if self.config is not None:
            after = plan_rewritten(graph, before, self.config, self.patches)
        trainable = graph.trainable

        def run(*args: Any) -> Any:
            results = forward(*args)
            self._results.append(results)
            found = results if isinstance(results, tuple | list) else (results,)
            self.calls.append(Call(before, after, trainable, _storages(args), _storages(found)))
            return results

        return run

    def _plain(self, graph: DynamoGraph) -> PlannedGraph | None:
        """The graph by plain Inductor, with our plan for it; known already if its joint graph is one that was planned."""
        if self.config is not None and self.planned:
            plan = analyse_graph(graph, self.config, self.patches)
            for one in self.planned:
                if plan and one.plan and one.plan.fingerprint == plan.fingerprint:
                    return dataclasses.replace(one, plan=plan, refused=None)
        return plan_plain(graph, self.config, self.patches)


def _storages(values: Sequence[Any]) -> tuple[int | None, ...]:
    return tuple(storage_key(value) if isinstance(value, Tensor) else None for value in values)


class _NoBackward(Exception):
    """The graph turned out to be an inference graph."""


class _Planned(Exception):
    """Both halves of a graph are planned."""


class _Observer:
    """Stands in for Inductor behind AOTAutograd: plans the forward and the backward graph, and stops there."""

    def __init__(self) -> None:
        self.facts: JointFacts | None = None
        self.forward: GraphPlan | None = None
        self.backward: GraphPlan | None = None
        self.forward_flops: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()

    def look(
        self, gm: fx.GraphModule, options: Mapping[str, Any], parameters: frozenset[int]
    ) -> None:
        """See the joint graph before it is rewritten or partitioned."""
        self.facts = joint_facts(gm.graph, options["num_fwd_outputs"], parameters)

    def compile(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Any:
        """In the place of `compile_fx_inner`."""
        if self.facts is None:
            raise _NoBackward
        flops = graph_flops(gm.graph)
        self.flops += flops
        if self.forward is None:
            self.forward_flops = flops
            run = gm.forward
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
            self.forward_flops,
            self.flops,
            plan,
            rewritten,
        )


class _PlainPartitioner(CustomPartitionerFn):
    """torch's own partitioner, or, where our passes look at the joint graph first, what our backend leaves graphs to."""

    def __init__(
        self, observer: _Observer, arguments: Arguments, config: PracConfig | None
    ) -> None:
        self._observer = observer
        self._arguments = arguments
        self._config = config
        self.plan: Plan | None = None
        self.draws_anew = False

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **options: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        merge_duplicates(gm)
        self._observer.look(gm, options, self._arguments.parameters)
        if self._config is not None:
            self.plan = analyse(
                gm, joint_inputs, options, config=self._config, arguments=self._arguments
            )
        halves = min_cut_rematerialization_partition(gm, joint_inputs, **options)
        self.draws_anew = draws_anew(gm.graph, *halves)
        if self._config is not None and self.draws_anew:
            return partition_drawing_once(gm, joint_inputs, **options)
        return halves

    def uuid(self) -> None:
        """Nothing is compiled, so there is nothing to cache."""
        return


class _RewritePartitioner(RewritePartitioner):
    """The partitioner of compilation, observed."""

    def __init__(
        self,
        observer: _Observer,
        plan: Plan,
        first_state: int,
        config: PracConfig,
        parameters: frozenset[int],
    ) -> None:
        super().__init__(plan, first_state, config)
        self._observer = observer
        self._parameters = parameters
        self.result: PartitionedGraph | None = None

    def run(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], options: Mapping[str, Any]
    ) -> PartitionedGraph:
        merge_duplicates(gm)
        self._observer.look(gm, options, self._parameters)
        self.result = super().run(gm, joint_inputs, options)
        return self.result

    def uuid(self) -> None:  # type: ignore[override]
        """Nothing is compiled, so there is nothing to cache."""
        return


def _partition(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    inner_compile: Callable[..., Any],
    partitioner: CustomPartitionerFn,
    patches: Mapping[str, Any],
) -> bool:
    """AOTAutograd with our partitioner, and an observer's `compile` behind it. False when the graph has no backward."""
    try:
        compile_fx(
            gm,
            list(inputs),
            inner_compile=inner_compile,
            config_patches={**patches, "custom_partitioner_fn": partitioner},
        )
    except _Planned:
        return True
    except _NoBackward:
        return False
    raise AssertionError("AOTAutograd returned without lowering a backward graph")


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
    partitioner = _PlainPartitioner(observer, graph.arguments, config)
    gm = copy_dynamo_graph(graph.gm)
    if not _partition(gm, graph.example_inputs, observer.compile, partitioner, patches):
        return None
    planned = observer.planned(partitioner.plan, None)
    return dataclasses.replace(planned, draws_anew=partitioner.draws_anew)


def plan_rewritten(
    graph: DynamoGraph, before: PlannedGraph, config: PracConfig, patches: Mapping[str, Any]
) -> PlannedGraph:
    """Plan a graph as our backend compiles it, after its first phase. Retries without what cannot be encoded.

    Args:
        graph: Dynamo's.
        before: of plain Inductor, with a plan.
        config: options of our backend.
        patches: Inductor's.

    Returns:
        `before` itself when nothing is rewritten, or a copy that says why it cannot be.
    """

    def plan_second_phase(plan: Plan) -> PlannedGraph:
        return _plan_rewritten(graph, plan, config, patches)

    # where the backend is strict, a failure ends the job: the report tells of one that goes on
    lenient = dataclasses.replace(config, strict=False)
    try:
        plan, planned = in_two_phases(
            graph,
            lenient,
            patches,
            plan_second_phase,
            first_plan=before.plan,
            log_level=logging.DEBUG,
        )
    except Exception as error:
        raise_signal(error)
        return dataclasses.replace(before, refused=one_line(error))
    if planned is not None:
        return planned
    return before if plan is before.plan else dataclasses.replace(before, plan=plan)


def _plan_rewritten(
    graph: DynamoGraph, plan: Plan, config: PracConfig, patches: Mapping[str, Any]
) -> PlannedGraph:
    observer = _Observer()
    parameters = graph.arguments.parameters
    first_state = len(graph.example_inputs)
    partitioner = _RewritePartitioner(observer, plan, first_state, config, parameters)
    with suppress(_Planned):
        lower_rewritten(graph, plan, patches, partitioner, without_higher_peak(observer.compile))
    return observer.planned(plan, partitioner.result)
