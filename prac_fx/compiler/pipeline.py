"""The passes in run order, as the two partitioners that the two phases of compilation install."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch.fx as fx

from prac_fx.codecs import PracCodec
from prac_fx.config import PracConfig
from prac_fx.errors import CannotRewriteError
from prac_fx.graph.aliases import restore_views
from prac_fx.graph.graph_edit import Inliner, with_names_in_order
from prac_fx.passes.classify import classify
from prac_fx.passes.draws import partition_drawing_once
from prac_fx.passes.factor import factor
from prac_fx.passes.partition import PartitionedGraph, partition
from prac_fx.passes.plan import JointGraph, Plan, fingerprint, make_plan
from prac_fx.passes.rewrite import SiteState, State, rewrite
from prac_fx.passes.roles import assign_roles
from prac_fx.passes.sentinels import sentinels
from prac_fx.passes.survey import survey
from prac_fx.torch_compat import (
    CustomPartitionerFn,
    argument_index,
    fx_graph_cse,
    trace_structured,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arguments:
    """What is known of the arguments of Dynamo's graph, by index.

    Attributes:
        names: relative to the compiled module.
        parameters: all nn.Parameters.
        trainable: those that require a gradient.
    """

    names: Mapping[int, str]
    parameters: frozenset[int]
    trainable: frozenset[int]

    @property
    def owner(self) -> int:
        """The parameter that owns what belongs to the whole graph: the first that trains, or the first of all."""
        return min(self.trainable or self.parameters)


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
    """Passes 1 to 5: classify, survey, roles, chains, plan. Leaves `gm` as it is but for `merge_duplicates`.

    Args:
        gm: the joint graph module.
        joint_inputs: its inputs as the partitioner received them.
        partition_options: keyword arguments of torch's partitioner.
        config: the user's options.
        arguments: what is known of the graph's arguments.
        blocked: names of values to keep, because encoding them failed.
    """
    merge_duplicates(gm)
    surveyed = survey(gm, joint_inputs, partition_options)
    static = {
        *arguments.parameters,
        *(partition_options.get("static_lifetime_input_indices") or ()),
    }
    num_fwd_outputs = partition_options["num_fwd_outputs"]
    classification = classify(gm.graph, static, arguments.parameters)
    roles = assign_roles(
        gm.graph,
        classification,
        surveyed,
        num_fwd_outputs=num_fwd_outputs,
        trainable=arguments.trainable,
    )
    joint = JointGraph(
        gm.graph,
        classification,
        surveyed,
        roles,
        arguments.names,
        arguments.owner,
        bool(arguments.trainable),
        sentinels(gm.graph, classification.backward, arguments.parameters),
    )
    return make_plan(joint, config, blocked)


def merge_duplicates(gm: fx.GraphModule) -> None:
    """Drop dead nodes and merge equal ones, as torch's partitioner does first of all, and number the rest anew.

    Query, key and value then read one node, and both phases see the same graph with the same names: how many dead
    nodes a trace leaves behind, and so how the others are numbered, may differ.
    """
    gm.graph.eliminate_dead_code()
    gm.graph = with_names_in_order(fx_graph_cse(gm.graph))
    restore_views(gm.graph)


def apply_plan(
    gm: fx.GraphModule,
    joint_inputs: Sequence[object],
    partition_options: Mapping[str, Any],
    plan: Plan,
    state: State,
) -> PartitionedGraph:
    """Passes 6 to 9: rewrite, factor, sample, partition.

    Raises:
        CannotRewriteError: the graph is not the one that was planned, or an invariant does not hold.
    """
    inline = Inliner(gm.graph)
    encoded = rewrite(gm.graph, plan, state, inline)
    factor(encoded, inline)
    gm.graph.lint()
    gm.recompile()
    return partition(gm, joint_inputs, partition_options, encoded, plan)


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
        first_state: argument index of the first state placeholder; they follow in site order, the basis
            and, where the codec samples rows, the row buffer; then the seed, if any site needs it.
        config: part of the compile cache key.
    """

    def __init__(self, plan: Plan, first_state: int, config: PracConfig) -> None:
        self._plan = plan
        self._first_state = first_state
        self._key = cache_key(plan, config)

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **options: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Forward and backward graph."""
        result = self.run(gm, joint_inputs, options)
        return result.fw, result.bw

    def run(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], options: Mapping[str, Any]
    ) -> PartitionedGraph:
        """Rewrite and partition."""
        merge_duplicates(gm)
        if fingerprint(gm.graph) != self._plan.fingerprint:
            raise CannotRewriteError("tracing the model twice gave two different joint graphs")
        _trace_graph("prac_joint_graph_before", gm)
        state = self._find_state(gm.graph)
        result = apply_plan(gm, joint_inputs, options, self._plan, state)
        _trace_graph("prac_joint_graph_after", gm)
        return result

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
                if not isinstance(site.codec, PracCodec):
                    continue
                basis = by_index[index]
                rows = by_index[index + 1] if site.codec.sample_rows else None
                index += 2 if site.codec.sample_rows else 1
                sites[site.value] = SiteState(basis, rows)
            if self._plan.is_random:
                seed = by_index[index]
        except KeyError:
            raise CannotRewriteError("a state placeholder did not reach the joint graph") from None
        return State(sites, seed)

    def uuid(self) -> str:
        """Hash of our sources, the configuration and the plan (torch._inductor.custom_graph_pass)."""
        return self._key


class PlainPartitioner(CustomPartitionerFn):
    """For graphs that are left to plain Inductor: torch's partitioner, but nothing random is drawn anew."""

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **options: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Forward and backward graph."""
        return partition_drawing_once(gm, joint_inputs, **options)

    def uuid(self) -> str:
        """Hash of our sources: torch's cache must not mix up these graphs with those of its own partitioner."""
        return _sources_digest().hex()


def cache_key(plan: Plan, config: PracConfig) -> str:
    """What the compiled result depends on besides torch's own inputs; a warm cache is keyed by it."""
    digest = hashlib.blake2b(_sources_digest(), digest_size=16)
    digest.update(config.cache_key().encode())
    identity = (plan.sites, plan.clones, plan.statistics, plan.fingerprint)
    digest.update(repr(identity).encode())
    return digest.hexdigest()


@functools.cache
def _sources_digest() -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    package = Path(__file__).parents[1]
    # in a checkout `passes` is a link, which rglob does not follow
    folders = (package, (package / "passes").resolve())
    for path in sorted({path for folder in folders for path in folder.rglob("*.py")}):
        digest.update(path.read_bytes())
    return digest.digest()


def _trace_graph(name: str, gm: fx.GraphModule) -> None:
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=lambda: gm.print_readable(print_output=False),
    )
