"""Joint graphs for tests: traced as in compilation, stopped and printed after each editing pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from prac_fx.compiler.dynamo_graph import DynamoGraph
from prac_fx.compiler.eager_graphs import run_eagerly
from prac_fx.compiler.two_phases import analyse_graph, compile_rewritten
from prac_fx.graph.graph_edit import LABEL
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
        if done.name == "partition":
            self.result = work.partitioned  # `sample` still edits it
        elif done.graph is not None and done.name != "sample":
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
        graph = DynamoGraph(gm, tuple(example_inputs))
        plan = analyse_graph(graph, config, {})
        assert plan is not None, "no backward"
        traced.plan = plan
        if plan.sites:
            with observed(traced.record), functorch_config.patch(enable_autograd_cache=False):
                compile_rewritten(graph, plan, config, {}, run_eagerly)
            assert traced.result is not None
            traced.graphs["fw"] = readable(traced.result.fw.graph)
            traced.graphs["bw"] = readable(traced.result.bw.graph)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
    return traced


def readable(graph: fx.Graph) -> str:
    """A graph as short text: one line a node, its shape, and whether it must be in backward.

    All that belongs to one encoding, decoding, weight gradient or sample is one line. So plan and
    rewrite can be read, and do not change with the codec. Operators are numbered in order of
    appearance: torch's own numbers depend on its version.
    """
    parts = _parts(graph)
    names, lines = _names(graph, parts), []
    for node in graph.nodes:
        members = parts.get(node, [node])
        if node.op == "placeholder":
            if node.users:
                lines.append(f"{names[node]}: {_shape(node)}")
        elif node.op == "output":
            outputs = fx.node.map_arg(node.args, names.__getitem__)
            lines.append("return " + ", ".join(map(str, _flat(outputs))))
        elif node is members[-1]:
            lines.append(_line(members, names))
    return "\n".join(lines)


def _parts(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """What each node is part of, by node."""
    parts: dict[object, list[fx.Node]] = {}
    for node in graph.nodes:
        if LABEL in node.meta and node.op == "call_function":
            parts.setdefault(node.meta[LABEL], []).append(node)
    return {node: members for members in parts.values() for node in members}


def _line(members: list[fx.Node], names: dict[fx.Node, str]) -> str:
    last = members[-1]
    must = last.meta.get("partitioner_tag") == "must_be_in_backward"
    behind = "  # backward" if must else ""
    if LABEL not in last.meta:
        args, kwargs = fx.node.map_arg((last.args, last.kwargs), names.__getitem__)
        given = [str(arg).replace("'", "") for arg in args]
        given += [f"{key}={value}" for key, value in kwargs.items()]
        call = f"{_operator(last)}({', '.join(given)})"
        return f"{names[last]} = {call} -> {_shape(last)}{behind}"
    inside = set(members)
    given = dict.fromkeys(
        names[arg] for node in members for arg in node.all_input_nodes if arg not in inside
    )
    results = [node for node in members if not inside.issuperset(node.users)]
    made = ", ".join(names[node] for node in results)
    shapes = ", ".join(map(_shape, results))
    return f"{made} = {last.meta[LABEL][0]}({', '.join(given)}) -> {shapes}{behind}"


def _names(graph: fx.Graph, parts: dict[fx.Node, list[fx.Node]]) -> dict[fx.Node, str]:
    counts: dict[str, int] = {}
    names = {}
    for node in graph.nodes:
        if node.op != "call_function" or node in parts:
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
