"""Plans as text: the table of the report and of the log."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from tabulate import tabulate

from prac_fx.graph.nbytes import format_nbytes
from prac_fx.passes.plan_data import Plan, PlannedValue

HEADERS = ("module", "source", "shape", "dtype", "role", "before", "after", "decision", "reason")


def plan_as_text(plan: Plan) -> str:
    """One row per value that backward needs, and the totals."""
    return values_table(plan.values) + "\n" + totals_line(plan)


def values_table(values: Sequence[PlannedValue]) -> str:
    """A plain-text table of planned values."""
    return tabulate([_row(value) for value in values], headers=HEADERS, tablefmt="simple")


def totals_line(plan: Plan) -> str:
    """Saved bytes before and after, and the state that lives as long as the parameters."""
    return (
        f"saved for backward: {format_nbytes(plan.nbytes_before)} -> "
        f"{format_nbytes(plan.nbytes_after)}; state {format_nbytes(plan.state_nbytes)}"
    )


def source_location(value: PlannedValue) -> str:
    """`file.py:12`, without the folder; empty when unknown."""
    origin = value.origin
    return f"{PurePath(origin.file).name}:{origin.line}" if origin.file else ""


def _row(value: PlannedValue) -> tuple[str, ...]:
    return (
        value.origin.module or value.name,
        source_location(value),
        "x".join(value.shape),
        value.dtype,
        value.role,
        format_nbytes(value.nbytes_before),
        format_nbytes(value.nbytes_after),
        value.stored_as,
        value.reason,
    )
