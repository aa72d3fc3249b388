"""The partitioners that run the passes in the two phases."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

import torch.fx as fx

from prac_fx.compiler.cache_keys import compiled_key, sources_digest
from prac_fx.config import PracConfig
from prac_fx.errors import CannotRewriteError
from prac_fx.passes.draws import partition_drawing_once
from prac_fx.passes.encoded import SiteState, State
from prac_fx.passes.partition import PartitionedGraph
from prac_fx.passes.plan_data import Plan
from prac_fx.passes.runner import PLANNING, REWRITING, Arguments, Work, run
from prac_fx.torch_compat import CustomPartitionerFn, argument_index


class AnalysisDone(Exception):
    """Leaves the first phase with its result; never reaches a user."""

    def __init__(self, plan: Plan) -> None:
        super().__init__("analysis is done")
        self.plan = plan


def analyse(
    gm: fx.GraphModule,
    joint_inputs: Sequence[object],
    partition_options: Mapping[str, Any],
    *,
    config: PracConfig,
    arguments: Arguments,
    blocked: Collection[str] = (),
) -> Plan:
    """Plan. Leaves `gm` as it is but for `merge_duplicates`.

    Args:
        gm: the joint graph module.
        joint_inputs: its inputs as the partitioner received them.
        partition_options: keyword arguments of torch's partitioner.
        config: the user's options.
        arguments: what is known of the graph's arguments.
        blocked: names of values to keep, because encoding them failed.
    """
    work = Work(gm, joint_inputs, partition_options, config, arguments, blocked)
    run(PLANNING, work)
    assert work.plan is not None
    return work.plan


class AnalysePartitioner(CustomPartitionerFn):
    """First phase: looks at the joint graph, plans, and stops there by raising `AnalysisDone`."""

    def __init__(
        self,
        config: PracConfig,
        arguments: Arguments,
        blocked: Collection[str] = (),
    ) -> None:
        self._config = config
        self._arguments = arguments
        self._blocked = blocked

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **options: Any
    ) -> NoReturn:
        """Plan, and leave with the plan."""
        plan = analyse(
            gm,
            joint_inputs,
            options,
            config=self._config,
            arguments=self._arguments,
            blocked=self._blocked,
        )
        raise AnalysisDone(plan)

    def uuid(self) -> None:
        """The first phase compiles nothing, so there is nothing to cache."""
        return


class RewritePartitioner(CustomPartitionerFn):
    """Second phase: meets the planned joint graph again, with state placeholders, and rewrites it.

    Args:
        plan: from the first phase.
        first_state: argument index of the first state placeholder; they follow in site order, the
            basis and, where the codec samples rows, the row buffer; then the seed, if any site
            needs it.
        config: part of the compile cache key.
    """

    def __init__(self, plan: Plan, first_state: int, config: PracConfig) -> None:
        # torch's cache key hashes a pickle of this object, too, in which the path of a job's
        # report must not count
        self._plan, self._config = plan, dataclasses.replace(config, report=None)
        self._first_state = first_state
        self._key = compiled_key(plan, config)

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **options: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Forward and backward graph."""
        result = self.run(gm, joint_inputs, options)
        return result.fw, result.bw

    def run(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], options: Mapping[str, Any]
    ) -> PartitionedGraph:
        """Rewrite and partition.

        Raises:
            CannotRewriteError: the graph is not the one that was planned, or an invariant does
                not hold.
        """
        work = Work(gm, joint_inputs, options, self._config, plan=self._plan)
        work.find_state = self._find_state
        run(REWRITING, work)
        return work.partitioned

    def _find_state(self, graph: fx.Graph) -> State:
        by_index = {
            argument_index(node): node
            for node in graph.find_nodes(op="placeholder")
            if argument_index(node) is not None
        }
        sites: dict[str, SiteState] = {}
        index, seed = self._first_state, None
        try:
            for site in self._plan.sites:
                if site.codec.subspace is None:
                    continue
                samples = site.codec.subspace.sample_rows > 0
                basis, rows = by_index[index], by_index[index + 1] if samples else None
                index += 2 if samples else 1
                sites[site.value] = SiteState(basis, rows)
            if self._plan.is_random:
                seed = by_index[index]
        except KeyError:
            raise CannotRewriteError("a state placeholder did not reach the joint graph") from None
        return State(sites, seed)

    def uuid(self) -> str:
        """Hash of our sources, the options and the plan (torch._inductor.custom_graph_pass)."""
        return self._key


class PlainPartitioner(CustomPartitionerFn):
    """For graphs left to plain Inductor: torch's partitioner, but nothing random is drawn anew."""

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **options: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Forward and backward graph."""
        return partition_drawing_once(gm, joint_inputs, **options)

    def uuid(self) -> str:
        """Hash of our sources: torch's cache keeps these apart from its own partitioner's."""
        return sources_digest().hex()
