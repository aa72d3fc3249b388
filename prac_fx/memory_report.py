"""`explain`: what a model's training step keeps for backward, before and after, without compiling it.

Dynamo and AOTAutograd trace the model, the passes run, torch's partitioner splits the result; Inductor is not
asked. The numbers after are not a formula: they come from the rewritten and partitioned graph.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
import torch.fx as fx

from prac_fx.config import PracConfig, read_options
from prac_fx.dynamo_backend import DynamoGraph, analyse_graph, with_state_inputs
from prac_fx.errors import CannotRewriteError, ReportError
from prac_fx.passes.partition import PartitionedGraph
from prac_fx.passes.plan import Plan, PlannedValue, row_without_readers
from prac_fx.pipeline import RewritePartitioner
from prac_fx.torch_compat import compile_fx, without_autograd_cache


@dataclass(frozen=True)
class MemoryReport:
    """What one training step of a model keeps for backward.

    Attributes:
        values: every value that backward needs, over all graphs that Dynamo made of the model.
        num_graphs: how many of them have a backward.
        config: the options it was made with.
    """

    values: tuple[PlannedValue, ...]
    num_graphs: int
    config: PracConfig

    @property
    def saved_before_nbytes(self) -> int:
        """Bytes that plain Inductor holds between forward and backward, inputs not counted."""
        return sum(value.nbytes_before for value in self.values)

    @property
    def saved_after_nbytes(self) -> int:
        """Bytes that `backend="prac"` holds there, without state."""
        return sum(value.nbytes_after for value in self.values)

    @property
    def state_nbytes(self) -> int:
        """Bytes of bases and sampled rows, held as long as the parameters."""
        return sum(value.state_nbytes for value in self.values)


def explain(
    model: Callable[..., Any],
    *args: Any,
    loss_fn: Callable[[Any], Any] | None = None,
    options: Mapping[str, Any] | PracConfig | None = None,
    **kwargs: Any,
) -> MemoryReport:
    """Trace one training step and report what it keeps for backward. Runs the forward pass once, eagerly.

    Args:
        model: a module, or a function, whose result can be differentiated.
        *args: its inputs.
        loss_fn: applied to the result and traced together with the model.
        options: as for `torch.compile(options=...)`, or a `PracConfig`.
        **kwargs: its keyword inputs.

    Raises:
        PracOptionError: a bad option.
        ReportError: nothing in the traced step has a backward.
    """
    config, patches = read_options(options)
    collector = _Collector(config, patches)

    def step(self: Any, *inputs: Any, **named: Any) -> Any:
        result = self(*inputs, **named)
        return result if loss_fn is None else loss_fn(result)

    # a code object of its own, so that no earlier call counts against Dynamo's recompile limit
    fresh = types.FunctionType(step.__code__.replace(), step.__globals__, closure=step.__closure__)
    with torch.enable_grad():
        torch.compile(fresh, backend=collector)(model, *args, **kwargs)
    if not collector.plans:
        raise ReportError(
            "the model has no backward: no parameter requires a gradient, the result does not depend "
            "on one, or Dynamo does not trace the model (nn.LSTM, for one)"
        )
    return MemoryReport(tuple(collector.values), len(collector.plans), config)


class _Collector:
    """A Dynamo backend that plans each graph, keeps the result, and runs the graph eagerly."""

    def __init__(self, config: PracConfig, patches: Mapping[str, Any]) -> None:
        self.config = config
        self.patches = patches
        self.plans: list[Plan] = []
        self.values: list[PlannedValue] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graph = DynamoGraph(gm, tuple(example_inputs))
        plan = analyse_graph(graph, self.config, self.patches) if graph.trainable else None
        if plan is not None:
            self.plans.append(plan)
            self.values += values_after(graph, plan, self.config, self.patches)
        forward: Callable[..., Any] = gm.forward
        return forward


class _RewriteDone(Exception):
    def __init__(self, result: PartitionedGraph) -> None:
        super().__init__("rewriting is done")
        self.result = result


class _StopAfterRewrite(RewritePartitioner):
    """Rewrites and partitions as in compilation, and stops there."""

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **options: Any
    ) -> NoReturn:
        raise _RewriteDone(self.run(gm, joint_inputs, options))

    def uuid(self) -> None:  # type: ignore[override]
        """Nothing is compiled, so there is nothing to cache."""
        return


def rewrite_graph(
    graph: DynamoGraph, plan: Plan, config: PracConfig, patches: Mapping[str, Any]
) -> PartitionedGraph:
    """The second phase of compilation up to the partitioned graphs.

    Raises:
        CannotRewriteError: as in compilation.
    """
    gm, inputs = with_state_inputs(graph, plan)
    partitioner = _StopAfterRewrite(plan, len(graph.example_inputs), config)
    try:
        with without_autograd_cache():
            compile_fx(gm, inputs, config_patches={**patches, "custom_partitioner_fn": partitioner})
    except _RewriteDone as done:
        return done.result
    raise AssertionError("the joint graph was compiled without a call of the partitioner")


def values_after(
    graph: DynamoGraph, plan: Plan, config: PracConfig, patches: Mapping[str, Any]
) -> list[PlannedValue]:
    """The plan's rows with the bytes that the rewritten graph really saves for each.

    Min-cut decides anew on the rewritten graph: it may drop a value that only an encoded one needed, or
    save another one; such rows say so.
    """
    if not plan.changes_graph:
        return list(plan.values)
    try:
        result = rewrite_graph(graph, plan, config, patches)
    except CannotRewriteError as error:
        return [_kept_instead(value, str(error)) for value in plan.values]
    saved = {one.node.name: one for one in result.saved}
    rows = []
    for value in plan.values:
        # a storage with several saved views has one row that counts
        names: tuple[str, ...] = (value.name,)
        if value.decision == "encode":
            names = result.stored[value.allocated_by]
        stored = [saved.pop(name) for name in names if name in saved]
        if stored:
            rows.append(replace(value, nbytes_after=sum(one.nbytes for one in stored)))
        elif value.nbytes_before and value.reason != "derived":
            rows.append(replace(value, decision="recompute", reason="min_cut", nbytes_after=0))
        else:
            rows.append(value)
    return rows + [
        row_without_readers(one.node, "keep", "min_cut", one.nbytes)
        for one in saved.values()
        if not one.is_input
    ]


def _kept_instead(value: PlannedValue, why: str) -> PlannedValue:
    """The row of a value in a graph that the backend would compile with plain Inductor."""
    if value.decision != "encode" and value.reason != "derived":
        return value
    return replace(
        value,
        decision="keep",
        reason="cannot_rewrite",
        detail=why,
        codec=None,
        coordinates=None,
        nbytes_after=value.nbytes_before,
        state_nbytes=0,
    )
