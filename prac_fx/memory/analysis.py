"""One training step, analysed: what it keeps for backward, and what it holds at each moment."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from prac_fx.config import PracConfig
from prac_fx.document.schema import Allocator
from prac_fx.errors import ReportError, one_line
from prac_fx.graph.nbytes import format_nbytes
from prac_fx.memory.between_graphs import saved_between_graphs, with_between_graphs
from prac_fx.memory.identical_blocks import identical_blocks, with_few_blocks
from prac_fx.memory.in_flight import of_others
from prac_fx.memory.optimizer import OptimizerMemory, optimizer_memory, optimizer_requests
from prac_fx.memory.planned_graph import PlannedGraph
from prac_fx.memory.repeated_blocks import (
    CannotMultiplyError,
    Repeated,
    all_values,
    check_blocks_alike,
    step_of_all_blocks,
)
from prac_fx.memory.repeated_requests import requests_of_all_blocks
from prac_fx.memory.reserved import Reserved, reserved_memory
from prac_fx.memory.saved_rows import layout_copies, values_after, values_refused
from prac_fx.memory.simulation import step_memory, step_requests
from prac_fx.memory.step import GraphBreak, Step
from prac_fx.memory.step_plan import StepPlan
from prac_fx.memory.tensors import Tensors, gradients_nbytes, tensors_of, with_captured
from prac_fx.memory.timeline import Live, StepMemory
from prac_fx.memory.trace import Call, Trace, trace
from prac_fx.passes.plan_data import PlannedValue
from prac_fx.torch_compat import functorch_config, inner_tensors, storage_key

log = logging.getLogger(__name__)

# From so many identical blocks on, a few of them are traced instead of all.
_MANY_BLOCKS = 8

NO_BACKWARD = (
    "the model has no backward: no parameter requires a gradient, the result does not depend "
    "on one, or Dynamo does not trace the model (nn.LSTM, for one)"
)

_OF_TORCH = (
    ". Under fully_shard Dynamo compiles each block by itself, and leaves one whose class is "
    "torch.nn's own, such as nn.TransformerEncoderLayer, to Python"
)


@dataclass(frozen=True, repr=False)
class AnalysedStep:
    """What one training step allocates and keeps.

    Attributes:
        tensors: parameters, buffers and inputs.
        optimizer: what the optimizer takes.
        calls: the runs of graphs that have a backward.
        values: every value that backward needs, of all calls.
        before: memory over the step with plain Inductor.
        after: with our backend.
        model: what was analysed.
        between_before_nbytes: of values that one graph has made and only a later one saves, with
            plain Inductor.
        between_after_nbytes: likewise with our backend.
        repeated: its blocks, if only a few of them were traced.
        captured: what the step reads besides its parameters, buffers and inputs; see `Step`.
        graph_breaks: where Dynamo ends a graph and begins another.
        allocator: that the two below are of; None where they were not asked for.
        reserved_before: what CUDA's allocator reserves with plain Inductor.
        reserved_after: likewise with our backend.
    """

    tensors: Tensors
    optimizer: OptimizerMemory
    calls: tuple[Call, ...]
    values: tuple[PlannedValue, ...]
    before: StepMemory
    after: StepMemory
    model: Callable[..., Any]
    between_before_nbytes: int = 0
    between_after_nbytes: int = 0
    repeated: Repeated | None = None
    captured: tuple[tuple[str, Tensor], ...] = ()
    graph_breaks: tuple[GraphBreak, ...] = ()
    allocator: Allocator | None = None
    reserved_before: Reserved | None = None
    reserved_after: Reserved | None = None

    def __repr__(self) -> str:
        """A line; it refers to all tensors of the model."""
        return (
            f"<AnalysedStep: {self.num_graphs} graphs, {len(self.values)} values, saved "
            f"{format_nbytes(self.saved_before_nbytes)} -> "
            f"{format_nbytes(self.saved_after_nbytes)}>"
        )

    @property
    def num_graphs(self) -> int:
        """Graphs that have a backward; one that runs several times counts once."""
        return len({call.graph for call in self.calls})

    @property
    def draws_anew(self) -> bool:
        """Does torch's partitioner have a backward draw anew? Gradients are wrong then."""
        return any(call.before.draws_anew for call in self.calls)

    @property
    def saved_before_nbytes(self) -> int:
        """Bytes that plain Inductor holds between forward and backward, inputs not counted."""
        return sum(value.nbytes_before for value in self.values)

    @property
    def saved_after_nbytes(self) -> int:
        """Bytes that our backend holds there, without state."""
        return sum(value.nbytes_after for value in self.values)

    @property
    def state_nbytes(self) -> int:
        """Bytes of bases and sampled rows."""
        return sum(value.state_nbytes for value in self.values)

    @property
    def flops_before(self) -> int:
        """FLOPs of matmuls, convolutions and attention with plain Inductor."""
        return sum(self._of_all_blocks(call.before.flops) for call in self.calls)

    @property
    def flops_after(self) -> int:
        """Likewise with our backend."""
        return sum(self._of_all_blocks(call.after.flops) for call in self.calls)

    @property
    def handed_over_before_nbytes(self) -> int:
        """Bytes that plain Inductor's forward graphs hand to their backward, without inputs."""
        handed_over = (self._of_all_blocks(_handed_over(call.before)) for call in self.calls)
        return sum(handed_over) + self.between_before_nbytes

    @property
    def handed_over_after_nbytes(self) -> int:
        """Likewise with our backend."""
        handed_over = (self._of_all_blocks(_handed_over(call.after)) for call in self.calls)
        return sum(handed_over) + self.between_after_nbytes

    def _of_all_blocks(self, of_modules: Mapping[str, int]) -> int:
        """Sum over the modules of the whole model, from those that were traced."""
        if self.repeated is None:
            return sum(of_modules.values())
        weight = self.repeated.weight
        return sum(number * weight(path) for path, number in of_modules.items())

    @property
    def logits_nbytes(self) -> int:
        """Bytes of the largest value that the loss is computed from: a language model's logits."""
        sizes = [
            value.nbytes
            for call in self.calls
            for kernel in call.before.forward.kernels
            for value in kernel.allocated.values()
            if value.name in call.before.facts.logits
        ]
        return max(sizes, default=0)


def analyse_step(
    step: Step,
    config: PracConfig | None,
    patches: Mapping[str, Any],
    optimizer: str = "adamw",
    *,
    budget: float | None = None,
    plain: AnalysedStep | None = None,
    all_blocks: bool = False,
    name: str = "the step",
    allocator: Allocator | None = None,
) -> AnalysedStep:
    """Trace a step and run through its memory. Of many identical blocks a few are traced.

    Args:
        step: what to analyse.
        config: options of our backend; None for plain Inductor alone.
        patches: Inductor's.
        optimizer: a key of `prac_fx.memory.optimizer.OPTIMIZERS`.
        budget: torch's `activation_memory_budget`; None for the one that is set. Where one below 1
            is set all blocks are traced, since torch chooses among them; where one is given a few
            are, as if it did not.
        plain: an analysis of the same step with other options of our backend, whose part of plain
            Inductor is used.
        all_blocks: trace all of them, however many there are.
        name: of this way to train, for the log.
        allocator: of CUDA, to find out what it reserves, whatever device the tensors are on.

    Raises:
        ReportError: an unknown optimizer, or nothing has a backward.
        CannotMultiplyError: within the budget that is given the blocks are not treated alike.
    """
    optimizer_memory(optimizer, ())  # refuses an unknown one before any work

    def analysed(model: Callable[..., Any], repeated: Repeated | None) -> AnalysedStep:
        known = () if plain is None or plain.repeated != repeated else plain.calls
        traced = replace(step, model=model)
        found = trace(traced, config, patches, budget=budget, plain=known)
        existing = [pair for call in found.calls for pair in call.existing]
        return _analysed(with_captured(step, existing), optimizer, found, repeated, allocator)

    # of a sharded model each is a graph of its own, and equal ones are traced once
    if step.sharded or (budget is None and functorch_config.activation_memory_budget < 1):
        all_blocks = True
    repeated = None if all_blocks else identical_blocks(step.model, _MANY_BLOCKS)
    if repeated is not None and isinstance(step.model, nn.Module):
        try:
            return analysed(with_few_blocks(step.model, repeated), repeated)
        except Exception as error:  # the model's own code may count its blocks, and raise anything
            if budget is not None and budget < 1:
                raise
            log.warning(
                "%s: all %d blocks of %s are analysed one by one, which takes longer: of this "
                "model a few do not tell what all of them take (%s)",
                name,
                repeated.total,
                repeated.module,
                error if isinstance(error, CannotMultiplyError) else one_line(error),
            )
    return analysed(step.model, None)


def _analysed(
    step: Step,
    optimizer_name: str,
    traced: Trace,
    repeated: Repeated | None,
    allocator: Allocator | None,
) -> AnalysedStep:
    calls = traced.calls
    if not calls:
        raise ReportError(NO_BACKWARD + (_OF_TORCH if step.sharded else ""))
    tensors = tensors_of(step)
    optimizer = optimizer_memory(optimizer_name, tensors.trained)
    if repeated is not None:
        check_blocks_alike([call.before.forward_flops for call in calls], repeated)
    values = [(number, value) for number, call in enumerate(calls) for value in _values(call)]
    if repeated is not None:
        values = [(0, value) for value in all_values([value for _, value in values], repeated)]
    constants = tensors.live()
    constants.append(Live(optimizer.name, "optimizer", "", optimizer.state_nbytes))
    if step.has_buckets:
        nbytes = gradients_nbytes(tensors)
        constants.append(Live("buckets of DistributedDataParallel", "gradients", "", nbytes))
    states = tuple(value.state_nbytes for _, value in values if value.state_nbytes)
    state = Live("bases and sampled rows", "state", "", sum(states), parts=states)
    static = frozenset(storage_key(one) for tensor in tensors.all for one in inner_tensors(tensor))
    if traced.outside is not None:
        static |= traced.outside.storages

    def planned(graphs: Sequence[PlannedGraph], more: Sequence[Live]) -> StepPlan:
        pairs = zip(calls, graphs, strict=True)
        return StepPlan(
            (*constants, *more),
            tuple(call.step_graph(graph) for call, graph in pairs),
            static,
            optimizer.temporary_nbytes,
            traced.outside,
        )

    def memory(plan: StepPlan) -> StepMemory:
        return step_memory(plan) if repeated is None else step_of_all_blocks(plan, repeated)

    plain = planned([call.before for call in calls], [])
    # the same object means that nothing is rewritten
    changed = any(call.after is not call.before for call in calls)
    ours = planned([call.after for call in calls], [state]) if changed else plain
    between, between_ours = saved_between_graphs(plain), saved_between_graphs(ours)
    if (between or between_ours) and repeated is not None:
        raise CannotMultiplyError("it is several graphs, and one saves what another has made")
    rows = tuple(with_between_graphs(values, between, between_ours))

    def with_others(plan: StepPlan, saved_nbytes: int) -> StepPlan:
        others = of_others(plan, tensors, step.in_flight, saved_nbytes)
        return replace(plan, constants=(*plan.constants, *others))

    plain = with_others(plain, sum(row.nbytes_before for row in rows))
    ours = with_others(ours, sum(row.nbytes_after for row in rows)) if changed else plain
    before = memory(plain)
    after = memory(ours) if changed else before
    found = AnalysedStep(
        tensors,
        optimizer,
        calls,
        rows,
        before,
        after,
        step.model,
        sum(value.nbytes for value in between.values()),
        sum(value.nbytes for value in between_ours.values()),
        repeated,
        step.captured,
        traced.graph_breaks,
    )
    return found if allocator is None else _with_reserved(found, plain, ours, allocator)


def _with_reserved(
    found: AnalysedStep, plain: StepPlan, ours: StepPlan, allocator: Allocator
) -> AnalysedStep:
    """The analysis with what CUDA's allocator reserves for these plans."""
    optimizer = optimizer_requests(found.optimizer.name, found.tensors.trained)

    def reserved(plan: StepPlan, memory: StepMemory) -> Reserved:
        if found.repeated is None:
            requests = step_requests(plan)[1]
        else:
            requests = requests_of_all_blocks(plan, found.repeated, memory.events)
        return reserved_memory(requests, optimizer, allocator)

    before = reserved(plain, found.before)
    return replace(
        found,
        allocator=allocator,
        reserved_before=before,
        reserved_after=before if ours is plain else reserved(ours, found.after),
    )


def _handed_over(graph: PlannedGraph) -> Mapping[str, int]:
    """Bytes of the buffers that a forward graph allocates and hands to its backward, by module."""
    plan = graph.forward
    saved = plan.saved_buffers(graph.facts.num_results)
    found: Counter[str] = Counter()
    for kernel in plan.kernels:
        for name, value in kernel.allocated.items():
            if name in saved:
                found[value.origin.module] += value.nbytes
    return found


def _values(call: Call) -> list[PlannedValue]:
    graph = call.after
    if graph.plan is None and not graph.unplanned:
        return []
    copies = layout_copies(call.before.forward, graph.forward, graph.facts.num_results)
    if graph.plan is None:
        return [*graph.unplanned, *copies]
    if graph.rewritten is not None:
        return values_after(graph.plan, graph.rewritten) + copies
    if graph.refused is not None:
        return values_refused(graph.plan, graph.refused) + copies
    return [*graph.plan.values, *copies]
