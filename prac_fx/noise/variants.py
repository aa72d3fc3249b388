"""The graphs that `verify` compares.

Each of Dynamo's graphs is compiled exactly, as planned, and with one group of values encoded at a
time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.fx as fx

from prac_fx.compiler.dynamo_graph import DynamoGraph
from prac_fx.compiler.eager_graphs import run_eagerly
from prac_fx.compiler.two_phases import compile_plain, compile_rewritten, plan_and_compile
from prac_fx.config import PracConfig
from prac_fx.graph.origin import any_layer
from prac_fx.passes.plan_data import Plan, PlannedValue
from prac_fx.runtime.step import training_step
from prac_fx.torch_compat import raise_signal, without_autograd_cache

# Which values are encoded: those of one group, named by (module path, codec), or one of these.
Variant = tuple[str, str]
EXACT: Variant = ("", "exact")
ALL: Variant = ("", "all")


@dataclass(frozen=True)
class _CompiledGraph:
    """One of Dynamo's graphs: its plan, if it was rewritten, and what to call for each variant."""

    plan: Plan | None
    variants: Mapping[Variant, Callable[..., Any]]


class Variants:
    """A Dynamo backend that compiles each graph in all variants and calls the one asked for.

    With `by_value` there is a variant for each group of values, too.

    Attributes:
        ran: the graphs with a backward that ran since `begin_step`.
        notes: sentences about what could not be compiled.
        failed: groups that cannot be encoded alone.
        compiled: how many graphs were compiled so far.
    """

    def __init__(self, config: PracConfig, patches: Mapping[str, Any], by_value: bool) -> None:
        # every draw has a tail of its own
        self._config = replace(config, tail_every=1)
        self._patches = dict(patches)
        self._variant = EXACT
        self._by_value = by_value
        self.ran: list[_CompiledGraph] = []
        self.notes: list[str] = []
        self.failed: set[Variant] = set()
        self.compiled = 0

    def begin_step(self, variant: Variant) -> None:
        """Run this variant from now on; a graph that does not have it runs exactly."""
        self._variant = variant
        self.ran.clear()

    def plans_of_last_step(self) -> list[Plan]:
        """The plan of each graph that ran, once for each time that it did."""
        return [graph.plan for graph in self.ran if graph.plan is not None]

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile one of Dynamo's graphs in all variants."""
        self.compiled += 1
        graph = DynamoGraph(gm, tuple(example_inputs)).without_regions()
        if not graph.is_planned:
            forward: Callable[..., Any] = gm.forward
            return forward
        with without_autograd_cache():
            compiled = self._compile(graph)

        def run(*args: Any) -> Any:
            self.ran.append(compiled)
            variants = compiled.variants
            return variants.get(self._variant, variants[EXACT])(*args)

        return run

    def _compile(self, graph: DynamoGraph) -> _CompiledGraph:
        variants = {EXACT: compile_plain(graph, self._patches, run_eagerly)}
        try:
            plan, rewritten = plan_and_compile(graph, self._config, self._patches, run_eagerly)
        except Exception as error:
            raise_signal(error)
            if self._config.strict:
                raise
            self.notes.append(f"a graph is kept exact: {type(error).__name__}: {error}")
            return _CompiledGraph(None, variants)
        if plan is not None and rewritten is not None:
            variants[ALL] = training_step(rewritten, plan, self._config)
            variants |= self._groups_alone(graph, plan) if self._by_value else {}
        return _CompiledGraph(plan, variants)

    def _groups_alone(self, graph: DynamoGraph, plan: Plan) -> dict[Variant, Callable[..., Any]]:
        variants: dict[Variant, Callable[..., Any]] = {}
        for key, rows in encoded_groups([plan]).items():
            alone = _plan_of_group(plan, rows)
            try:
                compiled = compile_rewritten(graph, alone, self._config, self._patches, run_eagerly)
            except Exception as error:
                raise_signal(error)
                self.failed.add(key)
                self.notes.append(f"not measured alone: {' '.join(key)}: {error}")
                continue
            variants[key] = training_step(compiled, alone, self._config)
        return variants


def _plan_of_group(plan: Plan, rows: Sequence[PlannedValue]) -> Plan:
    """The plan with only some of its sites.

    It is not made anew. So the sites share their bases with the whole, and backward derives from
    them what it derives there. What it derives from other values, which are exact now, torch may
    save.
    """
    names = {row.allocated_by for row in rows}
    values = [
        replace(row, reason="min_cut") if row.reason in ("derived", "replaced") else row
        for row in plan.values
    ]
    # Some masks are packed lest backward computes them from decoded values. They stay so: they have
    # no noise.
    masks = {row.allocated_by: row.nbytes_after for row in plan.values if _is_extra_mask(row)}
    values = [replace(row, nbytes_before=masks.get(row.name, row.nbytes_before)) for row in values]
    sites = tuple(site for site in plan.sites if site.value in {*names, *masks})
    return replace(plan, values=tuple(values), sites=sites)


def _is_extra_mask(row: PlannedValue) -> bool:
    return row.codec is not None and row.codec.is_lossless and not row.nbytes_before


def encoded_groups(plans: Sequence[Plan]) -> dict[Variant, list[PlannedValue]]:
    """Encoded values by module path, with `*` for layer numbers, and codec."""
    groups: dict[Variant, list[PlannedValue]] = {}
    rows = (row for plan in plans for row in plan.values if row.codec is not None)
    for row in (row for row in rows if not _is_extra_mask(row)):
        path = any_layer(row.origin.module or row.name)
        groups.setdefault((path, row.stored_as), []).append(row)
    return groups
