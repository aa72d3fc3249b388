"""Two reports side by side: totals, peaks, and the values that are kept differently.

Two values are the same when their module, operator, shape and dtype are, and their number among
values that share these.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal, TypedDict

from prac_fx.document.schema import SCHEMA, Document, Size, Value
from prac_fx.graph.origin import any_layer
from prac_fx.report.style import Style
from prac_fx.report.text_layout import grid, more_rows, printable, titled, with_details, wrapped
from prac_fx.report.wording import (
    NOTHING,
    change_text,
    count_text,
    inputs_text,
    is_listed,
    name_text,
    nbytes_text,
    operator_text,
    options_text,
    tensor_text,
)


class Difference(TypedDict):
    """Something other than a size that the two reports do not share, as text."""

    name: str
    a: str
    b: str


class TotalPair(TypedDict):
    """A total of both reports."""

    name: str
    a_nbytes: int
    b_nbytes: int


class Treatment(TypedDict):
    """What becomes of a value in one of the reports."""

    stored_as: str
    reason: str
    nbytes_before: int
    nbytes_after: int
    state_nbytes: int


class ValuePair(TypedDict):
    """A value that is treated differently; null where it is not kept at all."""

    module: str
    op: str
    shape: list[Size]
    dtype: str
    occurrence: int
    a: Treatment | None
    b: Treatment | None


class Comparison(TypedDict):
    """Two reports compared; `schema` is that of the reports."""

    schema: int
    a: str
    b: str
    differences: list[Difference]
    totals: list[TotalPair]
    values: list[ValuePair]


_Key = tuple[str, str, tuple[Size, ...], str, int]


def compare(a: Document, b: Document, names: tuple[str, str]) -> Comparison:
    """Compare two reports.

    Args:
        a: the first one.
        b: the second one; changes are relative to the first.
        names: what to call them, such as their files.
    """
    totals_a, totals_b = _totals(a), _totals(b)
    return {
        "schema": SCHEMA,
        "a": names[0],
        "b": names[1],
        "differences": _differences(a, b),
        "totals": [
            {"name": name, "a_nbytes": totals_a[name], "b_nbytes": totals_b[name]}
            for name in totals_a
            if name in totals_b
        ],
        "values": _changed_values(a, b),
    }


def _differences(a: Document, b: Document) -> list[Difference]:
    pairs = [
        ("model", name_text(a["model"]), name_text(b["model"])),
        ("inputs", inputs_text(a), inputs_text(b)),
        ("options", options_text(a["options"]), options_text(b["options"])),
        ("optimizer", a["totals"]["optimizer"] or NOTHING, b["totals"]["optimizer"] or NOTHING),
        ("device", a["device"], b["device"]),
        ("torch", a["torch"], b["torch"]),
        ("prac_fx", a["prac_fx"], b["prac_fx"]),
    ]
    return [{"name": name, "a": of_a, "b": of_b} for name, of_a, of_b in pairs if of_a != of_b]


def _totals(document: Document) -> dict[str, int]:
    """The known totals, by name."""
    totals, peak, reserved = document["totals"], document["peak"], document.get("reserved")
    nbytes_by_name = {
        "saved before": totals["saved_before_nbytes"],
        "saved after": totals["saved_after_nbytes"],
        "peak before": None if peak is None else peak["before"]["nbytes"],
        "peak after": None if peak is None else peak["after"]["nbytes"],
        "reserved before": None if reserved is None else reserved["before"]["nbytes"],
        "reserved after": None if reserved is None else reserved["after"]["nbytes"],
        "state": totals["state_nbytes"],
        "parameters": totals["parameters_nbytes"],
        "gradients": totals["gradients_nbytes"],
        "optimizer": totals["optimizer_nbytes"],
        "buffers": totals["buffers_nbytes"],
        "inputs": totals["inputs_nbytes"],
        "logits": totals["logits_nbytes"],
    }
    return {name: nbytes for name, nbytes in nbytes_by_name.items() if nbytes is not None}


def _changed_values(a: Document, b: Document) -> list[ValuePair]:
    values_a, values_b = _by_key(a), _by_key(b)
    pairs: list[ValuePair] = []
    for key in dict.fromkeys([*values_a, *values_b]):
        module, op, shape, dtype, occurrence = key
        of_a, of_b = _treatment(values_a.get(key)), _treatment(values_b.get(key))
        if of_a != of_b:
            pairs.append(
                {
                    "module": module,
                    "op": op,
                    "shape": list(shape),
                    "dtype": dtype,
                    "occurrence": occurrence,
                    "a": of_a,
                    "b": of_b,
                }
            )
    return pairs


def _by_key(document: Document) -> dict[_Key, Value]:
    seen: Counter[tuple[str, str, tuple[Size, ...], str]] = Counter()
    values: dict[_Key, Value] = {}
    for value in document["values"]:
        if not is_listed(value):
            continue
        key = (value["module"], value["op"], tuple(value["shape"]), value["dtype"])
        values[(*key, seen[key])] = value
        seen[key] += 1
    return values


def _treatment(value: Value | None) -> Treatment | None:
    if value is None:
        return None
    return {
        "stored_as": value["stored_as"],
        "reason": value["reason"],
        "nbytes_before": value["nbytes_before"],
        "nbytes_after": value["nbytes_after"],
        "state_nbytes": value["state_nbytes"],
    }


# -- as text ---------------------------------------------------------------------------------------


def as_table(comparison: Comparison, *, top: int = 20, style: Style | None = None) -> str:
    """The comparison as text, at most 100 columns wide; `top` as in a report."""
    style = style or Style()
    comparison = printable(comparison)
    names = [wrapped(f"{side.upper()}  {comparison[side]}", 3) for side in ("a", "b")]
    lines = [
        wrapped(
            f"{difference['name'] if side == 'a' else '':10} {side.upper()}  {difference[side]}", 14
        )
        for difference in comparison["differences"]
        for side in ("a", "b")
    ]
    sections = [
        "\n".join(names),
        titled("what differs", "\n".join(lines), style),
        _totals_table(comparison, style),
        _values_table(comparison, top, style),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _totals_table(comparison: Comparison, style: Style) -> str:
    rows = [
        (
            total["name"],
            nbytes_text(total["a_nbytes"]),
            nbytes_text(total["b_nbytes"]),
            style.change(change_text(total["a_nbytes"], total["b_nbytes"])),
        )
        for total in comparison["totals"]
    ]
    return grid(rows, ("", "A", "B", ""), "lrrr")


def _values_table(comparison: Comparison, top: int, style: Style) -> str:
    if not comparison["values"]:
        return "every value is kept in the same way"
    groups = _merged(comparison["values"])
    shown = groups[: top or None]
    rows = [
        (
            count_text(len(group)),
            _path(group),
            *_side(group, "a"),
            *_side(group, "b"),
        )
        for group in shown
    ]
    headers = ("", "value", "A", "stored as", "B", "stored as")
    table = grid(rows, headers, "rlrlrl", flexible=1)
    lines = [with_details(table, (_details(group[0]) for group in shown), style)]
    title = "values that are kept differently (with prac)"
    return titled(title, "\n".join([*lines, *more_rows(groups, shown)]), style)


def _merged(pairs: list[ValuePair]) -> list[list[ValuePair]]:
    """Pairs that differ only in the number of their layer, together; the largest change first."""
    groups: dict[tuple[object, ...], list[ValuePair]] = {}
    for pair in pairs:
        sides = (tuple(side.values()) if side else None for side in (pair["a"], pair["b"]))
        key = (any_layer(pair["module"]), pair["op"], tuple(pair["shape"]), pair["dtype"], *sides)
        groups.setdefault(key, []).append(pair)
    return sorted(
        groups.values(), key=lambda group: -abs(_nbytes(group, "b") - _nbytes(group, "a"))
    )


def _path(group: list[ValuePair]) -> str:
    module = group[0]["module"] if len(group) == 1 else any_layer(group[0]["module"])
    return module or operator_text(group[0]["op"])


def _nbytes(group: list[ValuePair], side: Literal["a", "b"]) -> int:
    return sum(treatment["nbytes_after"] for pair in group if (treatment := pair[side]))


def _side(group: list[ValuePair], side: Literal["a", "b"]) -> tuple[str, str]:
    treatment = group[0][side]
    return (
        (NOTHING, "")
        if treatment is None
        else (nbytes_text(_nbytes(group, side)), treatment["stored_as"])
    )


def _details(pair: ValuePair) -> list[str]:
    a, b = pair["a"], pair["b"]
    reasons = [treatment["reason"] for treatment in (a, b) if treatment and treatment["reason"]]
    parts = [
        " and ".join(dict.fromkeys(reasons)),
        f"{operator_text(pair['op'])} {tensor_text(pair['shape'], pair['dtype'])}",
    ]
    if a and b and a["nbytes_before"] != b["nbytes_before"]:
        sizes = [nbytes_text(treatment["nbytes_before"]) for treatment in (a, b)]
        parts.append(f"without prac {sizes[0]} and {sizes[1]} each")
    return parts
