"""The backend without Inductor's code generation: all of ours runs, in a tenth of the time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.fx as fx

from prac_fx.compiler import dynamo_backend, two_phases
from prac_fx.compiler.eager_graphs import run_eagerly
from prac_fx.memory import planned_graph
from prac_fx.memory.inductor_buffers import GraphPlan
from prac_fx.passes.plan_data import Plan
from prac_fx.torch_compat import compile_fx, without_autograd_cache


@contextmanager
def no_code_generation() -> Iterator[list[Plan]]:
    """Context in which `backend="prac"` runs operator by operator what it hands to Inductor.

    It gives the list of the plans that are made in it.
    """
    plans: list[Plan] = []
    plan_and_compile = dynamo_backend.plan_and_compile

    def recorded(*args: Any, **kwargs: Any) -> Any:
        plan, compiled = plan_and_compile(*args, **kwargs)
        plans.extend([plan] if plan is not None else [])
        return plan, compiled

    with (
        patch.object(two_phases, "compile_fx_inner", run_eagerly),
        patch.object(dynamo_backend, "plan_and_compile", recorded),
        without_autograd_cache(),
    ):
        yield plans


def compile_plain(model: Any, **options: Any) -> Any:
    """`torch.compile(model)`; what Inductor would compile runs operator by operator."""
    return torch.compile(model, backend=plain_graphs, **options)


def plain_graphs(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    with without_autograd_cache():
        compiled: Callable[..., Any] = compile_fx(gm, example_inputs, inner_compile=run_eagerly)
    return compiled


@contextmanager
def without_schedules() -> Iterator[None]:
    """Context in which reports do not ask Inductor for its kernels: half the time.

    What is saved for backward, and why, does not depend on them. Peaks and timelines do, so here
    they say nothing.
    """

    def plan_nothing(gm: fx.GraphModule, *_: Any, **__: Any) -> GraphPlan:
        outputs: Any = next(iter(gm.graph.find_nodes(op="output"))).args[0]
        return GraphPlan({}, (), (None,) * len(outputs))

    with patch.object(planned_graph, "plan_graph", plan_nothing):
        yield
