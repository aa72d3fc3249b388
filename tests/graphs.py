"""Joint graphs for tests: traced as in compilation, stopped and printed after each editing pass."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from prac_fx.compiler.dynamo_graph import DynamoGraph
from prac_fx.compiler.eager_graphs import run_eagerly
from prac_fx.compiler.two_phases import analyse_graph, compile_rewritten
from prac_fx.graph.templates import Template
from prac_fx.options import split_options
from prac_fx.passes.partition import PartitionedGraph
from prac_fx.passes.plan_data import Plan, PlannedValue
from prac_fx.passes.runner import Pass, Work, observed
from prac_fx.torch_compat import functorch_config
from tests.compiling import SMALL


class Traced:
    """What the passes did with the one graph of a model.

    Attributes:
        plan: the plan.
        graphs: text of the joint graph before and after each editing pass, and of "fw" and "bw".
        result: the partitioned graphs; None when nothing is encoded.
    """

    plan: Plan
    result: PartitionedGraph | None = None

    def __init__(self) -> None:
        self.graphs: dict[str, str] = {}

    def record(self, done: Pass, work: Work) -> None:
        """Leave the text of the graph after each editing pass, and the result."""
        if work.plan is None or work.arguments is not None:
            return
        if done.name in ("partition", "sample"):
            self.result = work.partitioned  # `expand` still edits it
            self.graphs["fw"] = readable(work.partitioned.fw.graph)
            self.graphs["bw"] = readable(work.partitioned.bw.graph)
        elif done.graph is not None:
            name = "joint" if done.name == "merge_duplicates" else done.name
            self.graphs[name] = readable(done.graph(work).graph)

    def value(self, reason_or_decision: str) -> PlannedValue:
        """The only value with this reason or decision."""
        (value,) = [v for v in self.plan.values if reason_or_decision in (v.reason, v.decision)]
        return value


def trace(
    model: Callable[..., Any], *args: Any, dynamic: bool | None = None, **options: Any
) -> Traced:
    """Run the passes on a model's step; options without their `prac.` prefix."""
    config, _ = split_options({**SMALL, **{f"prac.{key}": v for key, v in options.items()}})
    traced = Traced()

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        graph = DynamoGraph(gm, tuple(example_inputs)).without_regions()
        plan = analyse_graph(graph, config, {})
        assert plan is not None, "no backward"
        traced.plan = plan
        if plan.sites:
            with observed(traced.record), functorch_config.patch(enable_autograd_cache=False):
                compile_rewritten(graph, plan, config, {}, run_eagerly)
            assert traced.result is not None
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
    return traced


def readable(graph: fx.Graph) -> str:
    """A graph as short text: one line a node, its shape, and whether it must be in backward.

    The results of an encoding stand on its line. Operators are numbered in order of appearance:
    torch's own numbers depend on its version.
    """
    names, lines = _names(graph), []
    for node in graph.nodes:
        if node.op == "placeholder":
            if node.users:
                lines.append(f"{names[node]}: {_shape(node)}")
        elif node.op == "output":
            outputs = fx.node.map_arg(node.args, names.__getitem__)
            lines.append("return " + ", ".join(map(str, _flat(outputs))))
        elif not _is_result(node):
            lines.append(_line(node, names))
    return "\n".join(lines)


def _is_result(node: fx.Node) -> bool:
    """Is the node one of several results of a template?"""
    return node.target is operator.getitem and isinstance(node.all_input_nodes[0].target, Template)


def _line(node: fx.Node, names: dict[fx.Node, str]) -> str:
    must = node.meta.get("partitioner_tag") == "must_be_in_backward"
    behind = "  # backward" if must else ""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), names.__getitem__)
    given = [str(arg).replace("'", "") for arg in args]
    given += [f"{key}={value}" for key, value in kwargs.items()]
    results = [user for user in node.users if _is_result(user)] or [node]
    made, shapes = (", ".join(map(of, results)) for of in (names.__getitem__, _shape))
    return f"{made} = {_operator(node)}({', '.join(given)}) -> {shapes}{behind}"


def _names(graph: fx.Graph) -> dict[fx.Node, str]:
    counts: dict[str, int] = {}
    names = {}
    for node in graph.nodes:
        ours = isinstance(node.target, Template) or _is_result(node)
        if node.op != "call_function" or ours:
            names[node] = node.name
            continue
        count = counts[_operator(node)] = counts.get(_operator(node), 0) + 1
        names[node] = f"{_operator(node)}_{count}"
    return names


def _operator(node: fx.Node) -> str:
    target = node.target
    return str(getattr(target, "_opname", getattr(target, "__name__", target)))


def _shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    return "x".join(map(str, value.shape)) or "scalar" if isinstance(value, Tensor) else "?"


def _flat(args: Any) -> list[Any]:
    return [x for arg in args for x in (_flat(arg) if isinstance(arg, list | tuple) else [arg])]


def rows_of(plan: Plan) -> str:
    """The plan as golden text: a line for each value that is neither an input nor a mask."""
    lines = []
    for value in plan.values:
        if value.reason == "input" or value.dtype == "bool":
            continue
        codec = value.codec.describe() if value.codec else value.reason
        where = value.origin.module or value.origin.op
        lines.append(
            f"{where:<42} {'x'.join(value.shape):<12} {value.role:<4} {value.decision:<9} {codec}"
        )
    return "\n".join(line.rstrip() for line in lines)
