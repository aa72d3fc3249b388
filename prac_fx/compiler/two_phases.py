"""The two phases of compilation, for the backend, the report and the tests alike.

Phase 1 traces Dynamo's graph with AOTAutograd up to our partitioner, which plans and stops there.
Phase 2 compiles a copy of Dynamo's graph that has placeholders for the state of each planned site;
our partitioner meets the same joint graph again and rewrites it. Everything else is Inductor's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.fx as fx

from prac_fx.compiler.cache_keys import plan_key
from prac_fx.compiler.code_generation import with_kernel_settings, within
from prac_fx.compiler.dynamo_graph import DynamoGraph
from prac_fx.compiler.eager_graphs import with_backward_net
from prac_fx.compiler.loop_split import without_lossy_splits
from prac_fx.compiler.peak_aware_reuse import without_higher_peak
from prac_fx.compiler.pipeline import (
    AnalysePartitioner,
    AnalysisDone,
    PlainPartitioner,
    RewritePartitioner,
)
from prac_fx.compiler.retries import Retries
from prac_fx.compiler.stored_plans import load_plan, store_plan
from prac_fx.config import PracConfig
from prac_fx.errors import CannotRewriteError
from prac_fx.passes.plan_data import Plan
from prac_fx.runtime.step import state_inputs
from prac_fx.torch_compat import (
    CustomPartitionerFn,
    FakeTensor,
    causes,
    comparing_sparse_results,
    compile_fx,
    compile_fx_inner,
    copy_dynamo_graph,
    gpu_fusion_patches,
    raise_signal,
    tracing_fake_mode,
    without_autograd_cache,
)

log = logging.getLogger(__name__)

Compiled = Callable[..., Any]
_Result = TypeVar("_Result")


def plan_and_compile(
    graph: DynamoGraph,
    config: PracConfig,
    patches: Mapping[str, Any],
    inner_compile: Compiled | None = None,
) -> tuple[Plan | None, Compiled | None]:
    """Both phases: plan a graph, and compile it as planned.

    A plan that an earlier compilation stored spares the first phase.

    Args:
        graph: Dynamo's.
        config: the user's options.
        patches: Inductor's.
        inner_compile: compiles the partitioned graphs, instead of Inductor.

    Returns:
        The plan, None when the graph has no backward, and what was compiled, None when the plan
        changes nothing.
    """

    def compile_planned(plan: Plan) -> Compiled:
        return compile_rewritten(graph, plan, config, patches, inner_compile)

    key = plan_key(graph, config, patches) if inner_compile is None else None
    stored = load_plan(key) if key else None
    if stored is not None:
        try:
            return stored, compile_planned(stored) if stored.changes_graph else None
        except Exception as error:
            raise_signal(error)
            log.debug("the stored plan does not serve: %s", error)
    plan, compiled = in_two_phases(graph, config, patches, compile_planned)
    if key and plan is not None:
        store_plan(key, plan)
    return plan, compiled


def in_two_phases(
    graph: DynamoGraph,
    config: PracConfig,
    patches: Mapping[str, Any],
    second_phase: Callable[[Plan], _Result],
    *,
    first_plan: Plan | None = None,
    log_level: int = logging.WARNING,
) -> tuple[Plan | None, _Result | None]:
    """Plan a graph and rewrite it. A value whose encoding fails is kept; the rest is tried again.

    Args:
        graph: Dynamo's.
        config: the user's options. The first failure is raised where they are strict.
        patches: Inductor's.
        second_phase: rewrites the graph by a plan.
        first_plan: the plan to begin with, where the first phase is done already.
        log_level: of the message about a value that is kept.

    Returns:
        The last plan, None when the graph has no backward, and what the second phase made of it,
        None when it changes nothing.
    """
    retries = Retries()
    plan = first_plan or analyse_graph(graph, config, patches)
    while plan is not None and plan.changes_graph:
        try:
            return plan, second_phase(plan)
        except Exception as error:
            failed = failed_value(error)
            if config.strict or not retries.after(plan, failed):
                raise
            log.log(log_level, "%s is kept exact: %s", failed, error)
        plan = analyse_graph(graph, config, patches, retries.blocked)
    return plan, None


def failed_value(error: BaseException | None) -> str:
    """The value at fault, from our error or what Inductor made of it; empty for none."""
    values = (cause.value for cause in causes(error) if isinstance(cause, CannotRewriteError))
    return next(values, "")


# -- phase 1 ---------------------------------------------------------------------------------------


class _NoBackward(Exception):
    """The graph turned out to be an inference graph."""


def _refuse_inference(*args: Any, **kwargs: Any) -> NoReturn:
    raise _NoBackward


def analyse_graph(
    graph: DynamoGraph,
    config: PracConfig,
    patches: Mapping[str, Any],
    blocked: Collection[str] = (),
) -> Plan | None:
    """Phase 1: trace up to the joint graph and plan. None when the graph has no backward.

    Args:
        graph: Dynamo's.
        config: the user's options.
        patches: Inductor's.
        blocked: names of values to keep, because encoding them failed.
    """
    try:
        call_partitioner(graph, AnalysePartitioner(config, graph.arguments, blocked), patches)
    except AnalysisDone as done:
        return done.plan
    return None


def call_partitioner(
    graph: DynamoGraph, partitioner: CustomPartitionerFn, patches: Mapping[str, Any]
) -> None:
    """Trace up to the joint graph and call a partitioner, which leaves by an exception of its own.

    Returns without a call when the graph has no backward.

    Args:
        graph: Dynamo's.
        partitioner: called once.
        patches: Inductor's.
    """
    try:
        with without_autograd_cache():
            compile_fx(
                copy_dynamo_graph(graph.gm),
                list(graph.example_inputs),
                inner_compile=_refuse_inference,
                config_patches={**patches, "custom_partitioner_fn": partitioner},
            )
    except _NoBackward:
        return
    raise AssertionError("the joint graph was compiled without a call of the partitioner")


# -- phase 2 ---------------------------------------------------------------------------------------


def compile_rewritten(
    graph: DynamoGraph,
    plan: Plan,
    config: PracConfig,
    patches: Mapping[str, Any],
    inner_compile: Compiled | None = None,
) -> Compiled:
    """Phase 2: compile with the partitioner that applies the plan. See `plan_and_compile`."""
    inner_compile = without_lossy_splits(without_higher_peak(inner_compile or compile_fx_inner))
    inner_compile = with_kernel_settings(inner_compile)
    inner_compile = with_backward_net(inner_compile, strict=config.strict)
    inner_compile = within(inner_compile, graph.compiling.running)
    partitioner = RewritePartitioner(plan, len(graph.example_inputs), config)
    return lower_rewritten(graph, plan, patches, partitioner, inner_compile)


def lower_rewritten(
    graph: DynamoGraph,
    plan: Plan,
    patches: Mapping[str, Any],
    partitioner: RewritePartitioner,
    inner_compile: Compiled,
) -> Compiled:
    """Have AOTAutograd trace a graph with state placeholders, and call what is given.

    Args:
        graph: Dynamo's.
        plan: of the graph.
        patches: Inductor's.
        partitioner: rewrites the joint graph by the plan.
        inner_compile: called with the forward and the backward graph.
    """
    gm, inputs = with_state_inputs(graph, plan)
    settings = {**rewritten_patches(plan, patches), "custom_partitioner_fn": partitioner}
    with comparing_sparse_results():
        compiled = compile_fx(gm, inputs, inner_compile=inner_compile, config_patches=settings)
    return cast(Compiled, compiled)


def with_state_inputs(graph: DynamoGraph, plan: Plan) -> tuple[fx.GraphModule, list[Any]]:
    """Copy Dynamo's graph with state placeholders appended, and its inputs with fake state."""
    extra: list[tuple[str, FakeTensor]] = []
    with tracing_fake_mode(graph.example_inputs):
        for state in state_inputs(plan):
            fake = torch.empty(state.shape, dtype=state.dtype, device=state.device)
            assert isinstance(fake, FakeTensor)
            extra.append((state.name, fake))
    gm = copy_dynamo_graph(graph.gm, extra)
    return gm, [*graph.example_inputs, *(fake for _, fake in extra)]


def rewritten_patches(plan: Plan, patches: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor's patches for a rewritten graph: the user's, and ours where those say nothing."""
    on_cpu = all(site.device.type == "cpu" for site in plan.sites)
    return {**({} if on_cpu else gpu_fusion_patches()), **patches}


# -- a graph that is left alone --------------------------------------------------------------------


def compile_plain(
    graph: DynamoGraph, patches: Mapping[str, Any], inner_compile: Compiled | None = None
) -> Compiled:
    """Compile a graph with plain Inductor, but for a partitioner that draws random numbers once.

    Args:
        graph: Dynamo's.
        patches: Inductor's.
        inner_compile: compiles the partitioned graphs, instead of Inductor.
    """
    compiled = compile_fx(
        copy_dynamo_graph(graph.gm),
        list(graph.example_inputs),
        inner_compile=inner_compile or compile_fx_inner,
        config_patches={**patches, "custom_partitioner_fn": PlainPartitioner()},
    )
    return cast(Compiled, compiled)
