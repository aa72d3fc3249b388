"""The rows of a report's document, and their sums."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from prac_fx.config import PracConfig
from prac_fx.document.schema import Category, Rollup, RollupRow, Value
from prac_fx.passes.plan_data import PlannedValue


def options_of(config: PracConfig) -> dict[str, Any]:
    """The options, except where a job writes its report."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(config).items()
        if name != "report"
    }


def value_of(value: PlannedValue, layer_kind: str) -> Value:
    """A row of the document; `layer_kind` is the class of the module that computes it."""
    codec = value.codec
    projected = None if codec is None else codec.subspace
    return {
        "name": value.name,
        "module": value.origin.module,
        "op": value.origin.op,
        "file": value.origin.file,
        "line": value.origin.line,
        "shape": [int(size) if size.isdigit() else size for size in value.shape],
        "dtype": value.dtype,
        "role": value.role,
        "read_by": list(value.read_by),
        "decision": value.decision,
        "reason": value.reason,
        "detail": value.detail,
        "codec": None if codec is None else codec.name,
        "stored_as": value.stored_as,
        "principal": None if projected is None else projected.principal,
        "random": None if projected is None else projected.random,
        "blocks": None if projected is None else projected.blocks,
        "coordinates": None if codec is None else codec.coordinates,
        "nbytes_before": value.nbytes_before,
        "nbytes_after": value.nbytes_after,
        "state_nbytes": value.state_nbytes,
        "layer_kind": layer_kind,
        "category": _category(value),
    }


def _category(value: PlannedValue) -> Category:
    categories: dict[str, Category] = {"input": "inputs", "loss_intermediate": "loss"}
    return categories.get(value.reason, "saved")


def rollup_of(values: Sequence[Value]) -> Rollup:
    """The saved bytes of values by module, layer kind and role."""
    counted = [value for value in values if value["nbytes_before"] or value["nbytes_after"]]
    return {
        "module": _grouped((value["module"], value) for value in counted),
        "kind": _grouped((value["layer_kind"], value) for value in counted),
        "role": _grouped((value["role"], value) for value in counted),
    }


def _grouped(pairs: Iterable[tuple[str, Value]]) -> list[RollupRow]:
    """Sums by name, largest first."""
    rows: dict[str, RollupRow] = {}
    for name, value in pairs:
        row = rows.setdefault(
            name, {"name": name, "before_nbytes": 0, "after_nbytes": 0, "count": 0}
        )
        row["before_nbytes"] += value["nbytes_before"]
        row["after_nbytes"] += value["nbytes_after"]
        row["count"] += 1
    return sorted(rows.values(), key=lambda row: (-row["before_nbytes"], row["name"]))
