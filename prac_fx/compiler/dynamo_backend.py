"""The "prac" backend of `torch.compile`: its options, and what becomes of each graph.

How a graph is compiled is in `prac_fx.compiler.two_phases`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch.fx as fx

from prac_fx.compiler.announce import announce, set_up_log
from prac_fx.compiler.dynamo_graph import DynamoGraph
from prac_fx.compiler.first_steps import watch_first_steps
from prac_fx.compiler.graph_records import forget_graphs, with_record
from prac_fx.compiler.plan_text import plan_as_text
from prac_fx.compiler.two_phases import Compiled, compile_plain, plan_and_compile
from prac_fx.config import PracConfig
from prac_fx.document.graph_record import graph_record
from prac_fx.document.job import check_report_path
from prac_fx.environment import DISABLE, EXACT, OPTIONS, is_set
from prac_fx.errors import PracOptionError, warn
from prac_fx.options import config_patches, split_options
from prac_fx.passes.plan_data import Plan
from prac_fx.runtime.data_parallel import is_distributed
from prac_fx.runtime.step import training_step
from prac_fx.torch_compat import (
    compile_fx,
    copy_dynamo_graph,
    inductor_config,
    raise_signal,
    trace_structured,
)
from prac_fx.torch_versions import untested_torch

log = logging.getLogger(__name__)

_NO_PARAMETER = "no nn.Parameter enters this graph, which would own what is kept from step to step"


def prac(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    policy: str | None = None,
) -> Compiled:
    """What `torch.compile(model, backend="prac", options={"prac.principal": 0.2, ...})` calls.

    Args:
        gm: Dynamo's graph.
        example_inputs: its inputs, fake tensors.
        mode: one of Inductor's modes.
        options: `prac.*` keys for us, all others for Inductor.
        policy: that the backend's name says; None for any.

    Raises:
        PracOptionError: before any tracing of ours, for a bad option, or for another policy.
    """
    named = {} if policy is None else {"prac.policy": policy}
    config, inductor_options = split_options({**named, **(options or {})})
    if policy not in (None, config.policy):
        raise PracOptionError(
            f'backend="prac_{policy}" contradicts prac.policy={config.policy!r}; '
            'backend="prac" takes any policy'
        )
    given = policy if options is None else options
    return _checked_compile(gm, example_inputs, config, mode, inductor_options, given)


prac.reset = forget_graphs  # type: ignore[attr-defined]  # `torch._dynamo.reset()` calls it


def backend(config: PracConfig | None = None) -> PracBackend:
    """Typed form: `torch.compile(model, backend=prac_fx.backend(PracConfig(principal=0.2)))`.

    Raises:
        PracOptionError: when `config` is not a `PracConfig`.
    """
    config = PracConfig() if config is None else config
    if not isinstance(config, PracConfig):
        raise PracOptionError(f"prac_fx.backend: expected a PracConfig, got {config!r}")
    watch_first_steps(config.strict)
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
    ) -> Compiled:
        """Compile one of Dynamo's graphs; `options` may hold Inductor's keys only."""
        ours = [key for key in options or {} if str(key).startswith("prac.")]
        if ours:
            raise PracOptionError(
                f"option {ours[0]!r} contradicts the PracConfig that this backend was made with"
            )
        _, inductor_options = split_options(options)
        return _checked_compile(gm, example_inputs, self.config, mode, inductor_options, self)

    def reset(self) -> None:
        """Forget the graphs; `torch._dynamo.reset()` calls this."""
        forget_graphs()


def _checked_compile(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: PracConfig,
    mode: str | None,
    inductor_options: Mapping[str, Any],
    given: object,
) -> Compiled:
    """What both forms of the backend do once the options are split: check the rest, compile.

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
            'prac.across_ranks="independent" contradicts a DTensor argument: the ranks of its mesh '
            "share data, and with noise of their own their copies of replicated parameters would "
            'drift apart; "auto" lets data-parallel '
            "ranks alone draw independently"
        )
    patches = config_patches(mode, inductor_options)
    set_up_log()
    if untested := untested_torch():
        warn(untested, once_for=untested_torch)
    if is_set(DISABLE):
        return _without_us(gm, example_inputs, config, patches)
    for variable in (OPTIONS, EXACT):
        if variable in os.environ:
            log.info("%s=%s", variable, os.environ[variable])
    if is_set(EXACT):
        config = config.made_exact()
    if config.report is not None:
        check_report_path(config.report)
    if config.is_biased:
        warn(_BIASED, once_for=given)
    if config.uses_pamm:
        warn(_PAMM, once_for=given)
    if config.input_gradient == "prac":
        warn(_PROJECTED, once_for=given)
    return _compile(gm, example_inputs, config, patches)


_BIASED = (
    "prac.random=0 (PAC) gives biased gradients: the random part is what makes the estimator "
    "unbiased"
)
_PAMM = (
    'the codec "pamm" gives biased weight gradients: each token counts by its projection on another'
)
_PROJECTED = (
    'prac.input_gradient="prac" (policy "paper") projects what the input gradient reads: that '
    "noise passes through every earlier layer and makes gradients noisy and biased. A small LLaMA "
    "ended at a validation loss of 2.30 instead of 1.75 (benchmarks/results/convergence.md); "
    'policy "balanced" saves more and stays at it'
)


def _compile(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: PracConfig, patches: dict[str, Any]
) -> Compiled:
    graph = DynamoGraph(gm, tuple(example_inputs))
    with graph.compiling.running():
        if not graph.requires_grad:
            return compile_plain(graph, patches)
        if not graph.is_planned:
            return _recorded(compile_plain(graph, patches), graph, config, _NO_PARAMETER)
        return _compile_planned(graph, config, patches)


def _compile_planned(
    plain: DynamoGraph, config: PracConfig, patches: Mapping[str, Any]
) -> Compiled:
    try:
        graph = plain.without_regions()
        plan, rewritten = plan_and_compile(graph, config, patches)
    except Exception as error:
        raise_signal(error)
        if config.strict:
            raise
        return _fall_back(plain, config, patches, error)
    if plan is None:
        log.debug("graph without backward: plain Inductor")
        return compile_plain(plain, patches)
    _log_plan(plan)
    if rewritten is None:
        compiled = compile_plain(plain, patches)
    else:
        compiled = training_step(rewritten, plan, config)
    return _told(compiled, graph, config, plan)


def _without_us(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: PracConfig, patches: dict[str, Any]
) -> Compiled:
    """Inductor's, and nothing of ours in it."""
    graph = DynamoGraph(gm, tuple(example_inputs))
    with graph.compiling.running():
        compiled = compile_fx(copy_dynamo_graph(gm), list(example_inputs), config_patches=patches)
    return _recorded(cast(Compiled, compiled), graph, config, f"{DISABLE} is set")


def _recorded(compiled: Compiled, graph: DynamoGraph, config: PracConfig, reason: str) -> Compiled:
    """What is plain Inductor's for a reason, with a record if it has a backward."""
    if not graph.returns_grad:
        return compiled
    return _told(compiled, graph, config, None, reason)


def _fall_back(
    graph: DynamoGraph, config: PracConfig, patches: Mapping[str, Any], error: Exception
) -> Compiled:
    """Plain Inductor's instead of ours. If that fails too, its error is the one to see."""
    compiled = compile_plain(graph, patches)
    reason = f"{type(error).__name__}: {error}"
    warn(f'backend="prac" compiles this graph with plain Inductor, nothing is compressed: {reason}')
    log.debug("fallback", exc_info=error)
    return _told(compiled, graph, config, None, reason)


def _told(
    compiled: Compiled,
    graph: DynamoGraph,
    config: PracConfig,
    plan: Plan | None,
    fallback: str = "",
) -> Compiled:
    """A compiled graph with a record, which the log tells of."""
    record = graph_record(graph.gm, config, graph.compiling, plan, fallback)
    announce(record)
    return with_record(compiled, record)


def _log_plan(plan: Plan) -> None:
    log.debug("plan:\n%s", plan_as_text(plan))
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "prac_plan", "encoding": "string"},
        payload_fn=lambda: plan_as_text(plan),
    )
