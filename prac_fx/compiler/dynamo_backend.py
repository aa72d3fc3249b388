"""The "prac" backend of `torch.compile`: analyse the joint graph, then compile it rewritten.

Phase 1 traces Dynamo's graph with AOTAutograd up to our partitioner, which plans and stops there.
Phase 2 compiles a copy of Dynamo's graph that has placeholders for the state of each planned site; our
partitioner meets the same joint graph again and rewrites it. Everything else is Inductor's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import torch
import torch.fx as fx
from torch import Tensor, nn

from prac_fx.compiler.eager_graphs import with_backward_net
from prac_fx.compiler.graph_records import record_graph
from prac_fx.compiler.loop_split import without_lossy_splits
from prac_fx.compiler.peak_aware_reuse import without_higher_peak
from prac_fx.compiler.pipeline import (
    AnalysePartitioner,
    AnalysisDone,
    PlainPartitioner,
    RewritePartitioner,
)
from prac_fx.compiler.plan_text import plan_as_text
from prac_fx.compiler.retries import Retries
from prac_fx.config import PracConfig
from prac_fx.document.job import check_report_path, report_graph
from prac_fx.errors import CannotRewriteError, PracOptionError, warn
from prac_fx.graph.nbytes import format_nbytes
from prac_fx.graph.origin import clean_path
from prac_fx.options import config_patches, split_options
from prac_fx.passes.plan_data import Plan
from prac_fx.passes.runner import Arguments
from prac_fx.runtime.data_parallel import is_distributed
from prac_fx.runtime.step import state_inputs, training_step
from prac_fx.torch_compat import (
    CustomPartitionerFn,
    FakeTensor,
    causes,
    comparing_sparse_results,
    compile_fx,
    compile_fx_inner,
    copy_dynamo_graph,
    gpu_fusion_patches,
    inductor_config,
    placeholder_source_name,
    raise_signal,
    trace_structured,
    tracing_fake_mode,
    without_autograd_cache,
)

log = logging.getLogger(__name__)

_NO_PARAMETER = "no nn.Parameter enters this graph, which would own what is kept from step to step"


def prac(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Entry point: `torch.compile(model, backend="prac", options={"prac.principal": 0.2, ...})`.

    Args:
        gm: Dynamo's graph.
        example_inputs: its inputs, fake tensors.
        mode: one of Inductor's modes.
        options: `prac.*` keys for us, all others for Inductor.

    Raises:
        PracOptionError: before any tracing of ours, for a bad option.
    """
    config, inductor_options = split_options(options)
    return _checked_compile(gm, example_inputs, config, mode, inductor_options, options)


def backend(config: PracConfig | None = None) -> PracBackend:
    """Typed form: `torch.compile(model, backend=prac_fx.backend(PracConfig(principal=0.2)))`.

    Raises:
        PracOptionError: when `config` is not a `PracConfig`.
    """
    config = PracConfig() if config is None else config
    if not isinstance(config, PracConfig):
        raise PracOptionError(f"prac_fx.backend: expected a PracConfig, got {config!r}")
    return PracBackend(config)


@dataclass(frozen=True)
class PracBackend:
    """A Dynamo backend with a fixed configuration. Equal configurations share compiled code."""

    config: PracConfig

    @property
    def __name__(self) -> str:
        """The name that Dynamo shows in its logs and errors."""
        return "prac"

    def __call__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Callable[..., Any]:
        """Compile one of Dynamo's graphs; `options` may hold Inductor's keys only."""
        ours = [key for key in options or {} if str(key).startswith("prac.")]
        if ours:
            raise PracOptionError(
                f"option {ours[0]!r} contradicts the PracConfig that this backend was made with"
            )
        _, inductor_options = split_options(options)
        return _checked_compile(gm, example_inputs, self.config, mode, inductor_options, self)


def _checked_compile(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: PracConfig,
    mode: str | None,
    inductor_options: Mapping[str, Any],
    given: object,
) -> Callable[..., Any]:
    """What both forms of the backend do once the options are split: the remaining checks, then compile.

    Args:
        gm: Dynamo's graph.
        example_inputs: its inputs.
        config: our options.
        mode: one of Inductor's.
        inductor_options: Inductor's.
        given: the object that all graphs of one `torch.compile` call have in common.
    """
    if inductor_config.custom_partitioner_fn is not None:
        raise PracOptionError(
            'torch._inductor.config.custom_partitioner_fn is set: backend="prac" is a '
            "partitioner itself and cannot be combined with another one"
        )
    if config.across_ranks == "independent" and any(map(is_distributed, example_inputs)):
        raise PracOptionError(
            'prac.across_ranks="independent" contradicts a DTensor argument: the ranks of its mesh share data, and '
            'with noise of their own their copies of replicated parameters would drift apart; "auto" lets data-parallel '
            "ranks alone draw independently"
        )
    patches = config_patches(mode, inductor_options)
    if config.report is not None:
        check_report_path(config.report)
    if config.is_biased:
        warn(_BIASED, once_for=given)
    if config.input_gradient == "prac":
        warn(_PROJECTED, once_for=given)
    return _compile(gm, example_inputs, config, patches)


_BIASED = "prac.random=0 (PAC) gives biased gradients: the random part is what makes the estimator unbiased"
_PROJECTED = (
    'prac.input_gradient="prac" (policy "paper") projects what the input gradient reads: that noise passes '
    "through every earlier layer and makes gradients noisy and biased. A small LLaMA ended at a validation loss "
    'of 2.30 instead of 1.73 (benchmarks/results/convergence.md); policy "balanced" saves more and stays at it'
)


def _compile(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: PracConfig, patches: dict[str, Any]
) -> Callable[..., Any]:
    def plain() -> Callable[..., Any]:
        compiled = compile_fx(
            copy_dynamo_graph(gm),
            list(example_inputs),
            inner_compile=compile_fx_inner,
            config_patches=plain_patches(patches),
        )
        return cast(Callable[..., Any], compiled)

    def record(compiled: Callable[..., Any], plan: Plan | None, reason: str = "") -> None:
        record_graph(compiled, graph.record_names, config, plan, reason)
        report_graph(gm, config, plan, reason)

    graph = DynamoGraph(gm, tuple(example_inputs))
    if not graph.requires_grad:
        return plain()
    if not graph.parameters:
        compiled = plain()
        if graph.returns_grad:
            log.info("plain Inductor: %s", _NO_PARAMETER)
            record(compiled, None, _NO_PARAMETER)
        return compiled
    try:
        plan, rewritten = plan_and_compile(graph, config, patches)
    except Exception as error:
        raise_signal(error)
        if config.strict:
            raise
        # if plain Inductor fails too, its error is the one to see
        compiled = plain()
        reason = f"{type(error).__name__}: {error}"
        warn(
            f'backend="prac" compiles this graph with plain Inductor, nothing is compressed: {reason}'
        )
        log.debug("fallback", exc_info=error)
        record(compiled, None, reason)
        return compiled
    _log_plan(plan)
    if plan is None:
        return plain()
    compiled = plain() if rewritten is None else training_step(rewritten, plan, config)
    record(compiled, plan)
    return compiled


def plan_and_compile(
    graph: DynamoGraph,
    config: PracConfig,
    patches: Mapping[str, Any],
    inner_compile: Callable[..., Any] | None = None,
) -> tuple[Plan | None, Callable[..., Any] | None]:
    """Both phases. A value whose encoding fails, or does not pay, is kept, and the rest is planned again.

    Args:
        graph: Dynamo's.
        config: the user's options.
        patches: Inductor's.
        inner_compile: compiles the partitioned graphs, instead of Inductor.
    """
    retries = Retries()
    while True:
        plan = analyse_graph(graph, config, patches, retries.blocked)
        if plan is None or not plan.changes_graph:
            return plan, None
        try:
            return plan, compile_rewritten(graph, plan, config, patches, inner_compile)
        except Exception as error:
            failed = failed_value(error)
            if config.strict or not retries.after(plan, failed):
                raise
            log.warning("%s is kept exact: %s", failed, error)


def failed_value(error: BaseException | None) -> str:
    """The value at fault, from our own error or from what Inductor made of it; empty when there is none."""
    ours = (one.value for one in causes(error) if isinstance(one, CannotRewriteError))
    return next(ours, "")


@dataclass(frozen=True)
class DynamoGraph:
    """Dynamo's graph with its inputs, and what we need to know of them."""

    gm: fx.GraphModule
    example_inputs: tuple[Any, ...]

    @property
    def placeholders(self) -> list[fx.Node]:
        """The graph's arguments, in order."""
        return list(self.gm.graph.find_nodes(op="placeholder"))

    @property
    def argument_names(self) -> dict[int, str]:
        """Names of the arguments relative to the compiled module."""
        names = (placeholder_source_name(node) for node in self.placeholders)
        return {index: clean_path(name) for index, name in enumerate(names)}

    @property
    def arguments(self) -> Arguments:
        """What the passes need to know of the arguments."""
        return Arguments(self.argument_names, self.parameters, self.trainable)

    @property
    def record_names(self) -> tuple[str, ...]:
        """Names of the parameters that require a gradient, in order; of all of them when none does."""
        names = self.argument_names
        return tuple(names[index] for index in sorted(self.trainable or self.parameters))

    @property
    def requires_grad(self) -> bool:
        """Does an argument require a gradient? If not, the graph has no backward. If so, it has one in nearly all cases."""
        return torch.is_grad_enabled() and any(map(_requires_grad, self.placeholders))

    @property
    def returns_grad(self) -> bool:
        """Does a result require a gradient, as far as Dynamo knows?"""
        output = next(iter(self.gm.graph.find_nodes(op="output")))
        return any(map(_requires_grad, output.all_input_nodes))

    @property
    def is_planned(self) -> bool:
        """Is its backward looked at?"""
        return self.requires_grad and bool(self.parameters)

    @property
    def parameters(self) -> frozenset[int]:
        """Indices of parameters, frozen ones included."""
        values = (node.meta.get("example_value") for node in self.placeholders)
        return frozenset(i for i, v in enumerate(values) if isinstance(v, nn.Parameter))

    @property
    def trainable(self) -> frozenset[int]:
        """Indices of parameters that require a gradient.

        Other leaves do not count: Dynamo does not guard on being a leaf, so the next call of the same
        graph may pass an activation there, whose gradient runs on into earlier layers.
        """
        placeholders = self.placeholders
        return frozenset(i for i in self.parameters if _requires_grad(placeholders[i]))


def _requires_grad(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, Tensor) and value.requires_grad


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


def with_state_inputs(graph: DynamoGraph, plan: Plan) -> tuple[fx.GraphModule, list[Any]]:
    """Copy Dynamo's graph with state placeholders appended, and its inputs with fake state."""
    extra: list[tuple[str, FakeTensor]] = []
    with tracing_fake_mode(graph.example_inputs):
        for one in state_inputs(plan):
            fake = torch.empty(one.shape, dtype=one.dtype, device=one.device)
            assert isinstance(fake, FakeTensor)
            extra.append((one.name, fake))
    gm = copy_dynamo_graph(graph.gm, extra)
    return gm, [*graph.example_inputs, *(fake for _, fake in extra)]


def plain_patches(patches: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor's config patches for a graph that is not rewritten: the user's, and a partitioner that draws once."""
    return {**patches, "custom_partitioner_fn": PlainPartitioner()}


def rewritten_patches(plan: Plan, patches: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor's config patches for a rewritten graph: the user's, and ours where those say nothing."""
    on_cpu = all(site.device.type == "cpu" for site in plan.sites)
    return {**({} if on_cpu else gpu_fusion_patches()), **patches}


def compile_rewritten(
    graph: DynamoGraph,
    plan: Plan,
    config: PracConfig,
    patches: Mapping[str, Any],
    inner_compile: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Phase 2: compile with the partitioner that applies the plan; arguments as for `plan_and_compile`."""
    gm, inputs = with_state_inputs(graph, plan)
    partitioner = RewritePartitioner(plan, len(graph.example_inputs), config)
    settings = {**rewritten_patches(plan, patches), "custom_partitioner_fn": partitioner}
    inner_compile = without_lossy_splits(without_higher_peak(inner_compile or compile_fx_inner))
    inner_compile = with_backward_net(inner_compile, strict=config.strict)
    with comparing_sparse_results():
        compiled = compile_fx(gm, inputs, inner_compile=inner_compile, config_patches=settings)
    return cast(Callable[..., Any], compiled)


def _log_plan(plan: Plan | None) -> None:
    if plan is None:
        log.debug("graph without backward: plain Inductor")
        return
    log.info(
        "saved for backward: %s -> %s, %d of %d values encoded, state %s",
        format_nbytes(plan.nbytes_before),
        format_nbytes(plan.nbytes_after),
        len(plan.sites),
        len(plan.values),
        format_nbytes(plan.state_nbytes),
    )
    log.debug("plan:\n%s", plan_as_text(plan))
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "prac_plan", "encoding": "string"},
        payload_fn=lambda: plan_as_text(plan),
    )
