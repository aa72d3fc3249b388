"""The passes in run order, and what runs them.

`TORCH_LOGS="+prac_fx.passes"` logs how long each pass takes, and the graph after each pass that
edits it. `TORCH_TRACE` keeps those graphs as artifacts. `prac.skip_passes` leaves a pass out, to
find the pass that a fault comes from.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch.fx as fx

from prac_fx.config import SKIPPABLE_PASSES, PracConfig
from prac_fx.errors import CannotRewriteError
from prac_fx.graph.aliases import restore_views
from prac_fx.graph.graph_edit import with_names_in_order
from prac_fx.graph.inliner import Inliner, expand
from prac_fx.passes.classify import Classification, classify
from prac_fx.passes.encoded import EncodedSite, State
from prac_fx.passes.factor import factor
from prac_fx.passes.joint_graph import JointGraph, fingerprint
from prac_fx.passes.partition import PartitionedGraph, partition
from prac_fx.passes.plan import make_plan
from prac_fx.passes.plan_data import Plan
from prac_fx.passes.rewrite import rewrite
from prac_fx.passes.roles import ValueRole, assign_roles
from prac_fx.passes.sample import sample
from prac_fx.passes.sentinels import sentinels
from prac_fx.passes.survey import Survey, survey
from prac_fx.passes.tabulate import tabulate
from prac_fx.torch_compat import trace_structured, without_duplicates

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
        """The parameter that owns what belongs to the whole graph.

        It is the first that trains, or else the first of all.
        """
        return min(self.trainable or self.parameters)


@dataclass
class Work:
    """One joint graph on its way through the passes: what they take, and what they have found out.

    Attributes:
        gm: the joint graph module.
        joint_inputs: its inputs as the partitioner received them.
        partition_options: keyword arguments of torch's partitioner.
        config: the user's options.
        arguments: what is known of the graph's arguments; planning needs it.
        blocked: names of values to keep, because encoding them failed.
        plan: made by planning, given to rewriting.
        find_state: finds the placeholders of state in the graph; rewriting needs it.
    """

    gm: fx.GraphModule
    joint_inputs: Sequence[object]
    partition_options: Mapping[str, Any]
    config: PracConfig
    arguments: Arguments | None = None
    blocked: Collection[str] = ()
    plan: Plan | None = None
    find_state: Callable[[fx.Graph], State] | None = None
    surveyed: Survey = field(init=False)
    classification: Classification = field(init=False)
    roles: tuple[ValueRole, ...] = field(init=False)
    sentinels: Mapping[fx.Node, fx.Node] = field(init=False)
    inline: Inliner = field(init=False)
    encoded: list[EncodedSite] = field(init=False)
    partitioned: PartitionedGraph = field(init=False)


@dataclass(frozen=True)
class Pass:
    """A step of the work.

    Attributes:
        name: a verb.
        run: does it.
        graph: what it edits; None for a pass that only looks.
    """

    name: str
    run: Callable[[Work], None]
    graph: Callable[[Work], fx.GraphModule] | None = None


# -- planning --------------------------------------------------------------------------------------


def merge_duplicates(gm: fx.GraphModule, num_fwd_outputs: int) -> None:
    """Drop dead nodes, merge equal ones, and number the rest anew.

    torch's partitioner drops and merges first of all, too. Query, key and value then read one node.
    Both phases see the same graph with the same names. Without new numbers they may not: traces
    leave different numbers of dead nodes behind, and the names of the others count them.

    Args:
        gm: the joint graph module.
        num_fwd_outputs: how many of its outputs are forward's.
    """
    gm.graph.eliminate_dead_code()
    (output,) = gm.graph.find_nodes(op="output")
    of_backward = _needed_for(output.args[0][num_fwd_outputs:])
    merged = without_duplicates(gm.graph, of_backward.__contains__)
    gm.graph = with_names_in_order(merged)
    restore_views(gm.graph)


def _merge_duplicates(work: Work) -> None:
    merge_duplicates(work.gm, work.partition_options["num_fwd_outputs"])


def _needed_for(outputs: Iterable[Any]) -> set[fx.Node]:
    """The nodes that some outputs are computed from."""
    found: set[fx.Node] = set()
    waiting = [node for node in outputs if isinstance(node, fx.Node)]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _survey(work: Work) -> None:
    work.surveyed = survey(work.gm, work.joint_inputs, work.partition_options)


def _classify(work: Work) -> None:
    assert work.arguments is not None
    parameters = work.arguments.parameters
    buffers = work.partition_options.get("static_lifetime_input_indices") or ()
    work.classification = classify(work.gm.graph, {*parameters, *buffers}, parameters)


def _assign_roles(work: Work) -> None:
    assert work.arguments is not None
    work.roles = assign_roles(
        work.gm.graph,
        work.classification,
        work.surveyed,
        num_fwd_outputs=work.partition_options["num_fwd_outputs"],
        trainable=work.arguments.trainable,
    )


def _find_sentinels(work: Work) -> None:
    assert work.arguments is not None
    work.sentinels = sentinels(
        work.gm.graph, work.classification.backward, work.arguments.parameters
    )


def _plan(work: Work) -> None:
    assert work.arguments is not None
    joint = JointGraph(
        work.gm.graph,
        work.classification,
        work.surveyed,
        work.roles,
        work.arguments.names,
        work.arguments.owner,
        bool(work.arguments.trainable),
        work.sentinels,
    )
    judged = "judge" not in work.config.skip_passes
    work.plan = make_plan(joint, work.config, work.blocked, judged=judged)


PLANNING = (
    Pass("merge_duplicates", _merge_duplicates, lambda work: work.gm),
    Pass("survey", _survey),
    Pass("classify", _classify),
    Pass("assign_roles", _assign_roles),
    Pass("find_sentinels", _find_sentinels),
    Pass("plan", _plan),
)


# -- rewriting -------------------------------------------------------------------------------------


def _check_fingerprint(work: Work) -> None:
    assert work.plan is not None
    if fingerprint(work.gm.graph) != work.plan.fingerprint:
        raise CannotRewriteError("tracing the model twice gave two different joint graphs")


def _rewrite(work: Work) -> None:
    assert work.plan is not None
    assert work.find_state is not None
    work.inline = Inliner(work.gm.graph)
    state = work.find_state(work.gm.graph)
    work.encoded = rewrite(work.gm.graph, work.plan, state, work.inline)


def _factor(work: Work) -> None:
    factor(work.encoded, work.inline)


def _partition(work: Work) -> None:
    assert work.plan is not None
    work.gm.graph.lint()
    work.gm.recompile()
    work.partitioned = partition(
        work.gm, work.joint_inputs, work.partition_options, work.encoded, work.plan
    )


def _sample(work: Work) -> None:
    sample(work.partitioned.fw, work.encoded)


def _expand(work: Work) -> None:
    for gm in (work.partitioned.fw, work.partitioned.bw):
        expand(gm.graph)
        _settle(gm)


def _tabulate(work: Work) -> None:
    for gm in (work.partitioned.fw, work.partitioned.bw):
        if tabulate(gm.graph):
            _settle(gm)


def _settle(gm: fx.GraphModule) -> None:
    gm.graph.lint()
    gm.recompile()


REWRITING = (
    Pass("merge_duplicates", _merge_duplicates, lambda work: work.gm),
    Pass("check_fingerprint", _check_fingerprint),
    Pass("rewrite", _rewrite, lambda work: work.gm),
    Pass("factor", _factor, lambda work: work.gm),
    Pass("partition", _partition, lambda work: work.partitioned.fw),
    Pass("sample", _sample, lambda work: work.partitioned.fw),
    Pass("expand", _expand),
    Pass("tabulate", _tabulate),
)


# -- running ---------------------------------------------------------------------------------------

Observer = Callable[[Pass, Work], None]
_OBSERVERS: ContextVar[tuple[Observer, ...]] = ContextVar("observers", default=())


@contextlib.contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Context in which `observer` is called after each pass, with the pass and the work it left."""
    token = _OBSERVERS.set((*_OBSERVERS.get(), observer))
    try:
        yield
    finally:
        _OBSERVERS.reset(token)


def run(passes: Sequence[Pass], work: Work) -> None:
    """Run passes in their order, without those that `prac.skip_passes` names.

    Raises:
        CannotRewriteError: from a pass. The graph is not the one that was planned, or an invariant
            does not hold.
    """
    for pass_ in passes:
        if pass_.name in work.config.skip_passes:
            log.debug("%s: skipped", pass_.name)
            continue
        start = time.perf_counter()
        pass_.run(work)
        log.debug("%s: %.1f ms", pass_.name, 1e3 * (time.perf_counter() - start))
        if pass_.graph is not None:
            _show(pass_.name, pass_.graph(work))
        for observer in _OBSERVERS.get():
            observer(pass_, work)


def _show(name: str, gm: fx.GraphModule) -> None:
    """The graph after a pass, for logs and structured traces."""

    def text() -> str:
        return gm.print_readable(print_output=False)

    if log.isEnabledFor(logging.DEBUG):
        log.debug("graph after %s:\n%s", name, text())
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": f"prac_after_{name}", "encoding": "string"},
        payload_fn=text,
    )


assert {*SKIPPABLE_PASSES} <= {"judge", *(pass_.name for pass_ in REWRITING)}
