"""What a step saves, and the FLOPs it takes, within torch's memory budgets.

torch's partitioner runs on one trace of the whole model. To meet `activation_memory_budget` the
partitioner chooses among the blocks of a deep model. So none of them stands for the others, and
what it chooses in a shallow model says little about a deep one. Partitioning is exact and, of all
that an analysis does, the smaller part. The peak is not found here: it depends on when Inductor
runs what is computed again, sometimes many blocks before it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import torch.fx as fx

from prac_fx.compiler.dynamo_graph import DynamoGraph
from prac_fx.compiler.two_phases import call_partitioner
from prac_fx.graph.flops import CountedOperator, counted_operators, flops_by_module
from prac_fx.graph.nbytes import Symbols
from prac_fx.memory.graph_run import GraphRun
from prac_fx.memory.step import Step, trace_with
from prac_fx.passes.draws import draws_anew
from prac_fx.passes.runner import merge_duplicates
from prac_fx.passes.survey import SavedValue, saved_values
from prac_fx.torch_compat import (
    CustomPartitionerFn,
    argument_index,
    functorch_config,
    min_cut_rematerialization_partition,
)


@dataclass(frozen=True)
class Partition:
    """What a step takes within a budget.

    Attributes:
        saved_nbytes: handed from forward to backward, inputs not counted.
        flops: of matmuls, convolutions and attention.
        recomputed_flops: those of them that backward computes again.
        draws_anew: backward draws random numbers again, which makes gradients wrong.
    """

    saved_nbytes: int
    flops: int
    recomputed_flops: int
    draws_anew: bool = False


def partition_within(
    step: Step, budgets: Sequence[float], patches: Mapping[str, Any]
) -> dict[float, Partition]:
    """Partition the graphs of a step within each budget. Its model runs once, eagerly.

    Args:
        step: what to trace.
        budgets: torch's `activation_memory_budget`.
        patches: Inductor's.
    """
    backend = _Budgeter(budgets, patches)
    trace_with(step, backend)
    return {
        budget: Partition(
            sum(call[budget].saved_nbytes for call in backend.calls),
            sum(call[budget].flops for call in backend.calls),
            sum(call[budget].recomputed_flops for call in backend.calls),
            any(call[budget].draws_anew for call in backend.calls),
        )
        for budget in budgets
    }


class _Budgeter:
    """A Dynamo backend that partitions each graph within each budget, and runs it eagerly."""

    def __init__(self, budgets: Sequence[float], patches: Mapping[str, Any]) -> None:
        self._budgets = budgets
        self._patches = patches
        self.calls: list[Mapping[float, Partition]] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graph = DynamoGraph(gm, tuple(example_inputs)).without_regions()
        forward = GraphRun(graph)
        found = self._partitions(graph) if graph.requires_grad else {}
        if not found:
            return forward

        def run(*args: Any) -> Any:
            symbols = graph.symbols_in(args)
            self.calls.append({budget: one.at(symbols) for budget, one in found.items()})
            # the budgets share one trace: what the first of them saves counts
            return forward.run(args, found[self._budgets[0]].saved_arguments)

        return run

    def _partitions(self, graph: DynamoGraph) -> Mapping[float, _Halves]:
        """By budget; empty when the graph has no backward."""
        partitioner = _BudgetsPartitioner(self._budgets)
        with suppress(_Stop):
            call_partitioner(graph, partitioner, self._patches)
        return partitioner.found


@dataclass(frozen=True)
class _Halves:
    """A joint graph, partitioned.

    Attributes:
        saved: what its forward hands to its backward.
        operators: those of both halves whose FLOPs are counted.
        of_joint: those of the joint graph.
        draws_anew: as in `Partition`.
    """

    saved: Sequence[SavedValue]
    operators: Sequence[CountedOperator]
    of_joint: Sequence[CountedOperator]
    draws_anew: bool

    @property
    def saved_arguments(self) -> frozenset[int]:
        """Indices of the arguments that are saved as they are."""
        indices = (argument_index(value.node) for value in self.saved if value.is_input)
        return frozenset(index for index in indices if index is not None)

    def at(self, symbols: Symbols) -> Partition:
        """What it takes in a run in which symbolic sizes have these values."""
        nbytes = sum(value.at(symbols).nbytes for value in self.saved)
        flops = flops_by_module(self.operators, symbols).total()
        recomputed = flops - flops_by_module(self.of_joint, symbols).total()
        return Partition(nbytes, flops, recomputed, self.draws_anew)


class _Stop(Exception):
    """All is known."""


class _BudgetsPartitioner(CustomPartitionerFn):
    """Partitions the joint graph within each budget, and stops there."""

    def __init__(self, budgets: Sequence[float]) -> None:
        self._budgets = budgets
        self.found: dict[float, _Halves] = {}

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **options: Any
    ) -> NoReturn:
        merge_duplicates(gm, options["num_fwd_outputs"])
        of_joint = counted_operators(gm.graph)
        for budget in self._budgets:
            with functorch_config.patch(activation_memory_budget=budget):
                fw, bw = min_cut_rematerialization_partition(gm, joint_inputs, **options)
            saved = saved_values(gm.graph, fw, options["num_fwd_outputs"])
            operators = (*counted_operators(fw.graph), *counted_operators(bw.graph))
            anew = draws_anew(gm.graph, fw, bw)
            self.found[budget] = _Halves(saved, operators, of_joint, anew)
        raise _Stop

    def uuid(self) -> None:
        """Nothing is compiled, so there is nothing to cache."""
        return
