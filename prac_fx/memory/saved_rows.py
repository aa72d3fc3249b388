"""The rows of a report: every value that backward needs, with the bytes that are saved for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from prac_fx.memory.inductor_buffers import GraphPlan, Value
from prac_fx.passes.partition import PartitionedGraph
from prac_fx.passes.plan_data import Plan, PlannedValue
from prac_fx.passes.rows import row_without_readers
from prac_fx.passes.survey import SavedValue


def values_after(plan: Plan, rewritten: PartitionedGraph) -> list[PlannedValue]:
    """The plan's rows with the bytes that the rewritten and partitioned graph saves for each.

    Min-cut decides anew on the rewritten graph: it may drop a value that only an encoded one
    needed, or save another one; such rows say so.
    """
    saved = {one.node.name: one for one in rewritten.saved}
    rows = []
    for value in plan.values:
        # a storage with several saved views has one row that counts
        names: tuple[str, ...] = (value.name,)
        if value.decision == "encode":
            names = rewritten.stored[value.allocated_by]
        stored = [saved.pop(name) for name in names if name in saved]
        if stored:
            rows.append(replace(value, nbytes_after=sum(one.nbytes for one in stored)))
        elif (value.nbytes_before or value.nbytes_after) and value.reason != "derived":
            rows.append(replace(value, decision="recompute", reason="min_cut", nbytes_after=0))
        else:
            rows.append(value)
    return rows + [
        row_without_readers(one.node, "keep", "min_cut", one.nbytes)
        for one in saved.values()
        if not one.is_input
    ]


def layout_copies(before: GraphPlan, after: GraphPlan, num_results: int) -> list[PlannedValue]:
    """Rows of copies of inputs that Inductor saves for backward instead of the inputs.

    Where a graph has convolutions, it may turn them and what they read to another memory layout
    (channels last), parameters and inputs included; source: `GraphLowering.decide_layout_opt` in
    torch/_inductor/graph.py.

    Args:
        before: forward graph of plain Inductor.
        after: of our backend.
        num_results: outputs of both that the caller receives; the others are saved.
    """
    copies = {name: value.nbytes for name, value in _saved_copies(after, num_results)}
    return [
        replace(
            kept_value(value, "layout_copy"),
            name=f"{name}_copy",
            allocated_by=f"{name}_copy",
            nbytes_after=copies.get(name, 0),
        )
        for name, value in _saved_copies(before, num_results)
    ]


def with_nbytes(row: PlannedValue, nbytes: int) -> PlannedValue:
    """The row of a value that takes so many bytes as it is, wherever it takes any."""
    return replace(
        row,
        nbytes_before=nbytes if row.nbytes_before else 0,
        nbytes_after=nbytes if row.nbytes_after and row.codec is None else row.nbytes_after,
    )


def kept_value(value: Value, reason: str) -> PlannedValue:
    """The row of a buffer that is no value of the joint graph, or one that no plan knows."""
    return PlannedValue(
        name=value.name,
        allocated_by=value.name,
        shape=tuple(map(str, value.shape)),
        dtype=value.dtype,
        role="-",
        origin=value.origin,
        read_by=(),
        decision="keep",
        reason=reason,
        detail="",
        nbytes_before=value.nbytes,
        nbytes_after=value.nbytes,
    )


def _saved_copies(plan: GraphPlan, num_results: int) -> Iterator[tuple[str, Value]]:
    """The input that each is a copy of, and the copy."""
    allocated = {name: value for kernel in plan.kernels for name, value in kernel.allocated.items()}
    inputs = {value.name for value in plan.inputs.values()}
    for pair in plan.outputs[num_results:]:
        if pair is not None and pair[0] in inputs and pair[1] in allocated:
            yield pair[0], allocated[pair[1]]


def values_unplanned(saved: Iterable[SavedValue]) -> list[PlannedValue]:
    """The rows of a graph that no parameter enters, such as that of a loss after a graph break."""
    return [
        replace(
            row_without_readers(value.node, "keep", _reason(value), value.nbytes),
            nbytes_before=value.nbytes,
        )
        for value in saved
    ]


def _reason(value: SavedValue) -> str:
    if value.is_input:
        return "input"
    return "shared_storage" if value.shares_with else "no_parameter"


def values_refused(plan: Plan, why: str) -> list[PlannedValue]:
    """The plan's rows for a graph that the backend compiles with plain Inductor after all."""
    return [_kept_instead(value, why) for value in plan.values]


def _kept_instead(value: PlannedValue, why: str) -> PlannedValue:
    if value.decision != "encode" and value.reason != "derived":
        return value
    return replace(
        value,
        decision="keep",
        reason="cannot_rewrite",
        detail=why,
        codec=None,
        nbytes_after=value.nbytes_before,
        state_nbytes=0,
    )
