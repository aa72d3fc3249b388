"""Reads a report file and checks it against the types of `document`, so that the rest need not doubt it."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints, is_typeddict

from prac_fx.document.schema import SCHEMA, Document, Timeline
from prac_fx.errors import ReportError

_SCALARS = {int: "a whole number, 0 or more", float: "a number", str: "text"}


class _Mismatch(Exception):
    """Something in a document is not what the schema says."""


def load_document(path: Path) -> Document:
    """Read a report that was written with `--format json`.

    Raises:
        ReportError: no such file, not JSON, another schema version, or a field that is missing or ill-typed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ReportError(f"{path}: cannot read: {reason}") from error
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path}: not a JSON report: {error}") from error
    return check_document(data, str(path))


def check_document(data: object, source: str) -> Document:
    """The same data, known to be a document.

    Args:
        data: parsed JSON.
        source: where it is from; error messages start with it.

    Raises:
        ReportError: another schema version, or a field that is missing, ill-typed or inconsistent.
    """
    schema = data.get("schema") if isinstance(data, dict) else None
    if not isinstance(schema, int):
        raise ReportError(f"{source}: not a memory report: it has no schema version")
    if schema != SCHEMA:
        raise ReportError(
            f"{source}: schema version {schema}, this is prac_fx for version {SCHEMA}: "
            "write the report again, or read it with the prac_fx that wrote it"
        )
    try:
        _check(data, Document, "")
        document = cast(Document, data)
        timeline = document["timeline"]
        if (document["peak"] is None) != (timeline is None):
            raise _Mismatch("peak and timeline: only one of them is null")
        if timeline is not None:
            _check_timeline(timeline["before"], "timeline.before")
            _check_timeline(timeline["after"], "timeline.after")
    except _Mismatch as error:
        raise ReportError(f"{source}: not a memory report: {error}") from error
    return document


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


@cache
def _fields(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _check(value: object, kind: Any, where: str) -> None:
    """Does a value match a type? `where` is its path within the document."""
    origin = get_origin(kind)
    if kind is Any:
        return
    if is_typeddict(kind):
        _check_fields(value, kind, where)
    elif origin in (Union, types.UnionType):
        _check_union(value, kind, where)
    elif origin is Literal:
        if value not in get_args(kind):
            raise _Mismatch(f"{where}: expected one of {_listed(get_args(kind))}, got {value!r}")
    elif origin is list:
        _expect(isinstance(value, list), "a list", value, where)
        for index, item in enumerate(cast("list[object]", value)):
            _check(item, get_args(kind)[0], f"{where}[{index}]")
    elif origin is dict:
        _expect(isinstance(value, dict), "an object", value, where)
        for key, item in cast("dict[object, object]", value).items():
            _check(key, get_args(kind)[0], f"{where}: a name")
            _check(item, get_args(kind)[1], f"{where}.{key}")
    else:
        _expect(_is_scalar(value, kind), _SCALARS[kind], value, where)


def _check_fields(value: object, kind: Any, where: str) -> None:
    _expect(isinstance(value, dict), "an object", value, where or "the report")
    given = cast("dict[str, object]", value)
    for name, field in _fields(kind).items():
        path = f"{where}.{name}" if where else name
        if name not in given:
            raise _Mismatch(f"{path} is missing")
        _check(given[name], field, path)


def _check_union(value: object, kind: Any, where: str) -> None:
    members = [member for member in get_args(kind) if member is not type(None)]
    if value is None and len(members) < len(get_args(kind)):
        return
    if len(members) == 1:
        _check(value, members[0], where)
    elif not any(_is_scalar(value, member) for member in members):
        wanted = " or ".join(_SCALARS[member] for member in members)
        _expect(False, wanted, value, where)


def _is_scalar(value: object, kind: Any) -> bool:
    if isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, kind) and not (kind is int and cast(int, value) < 0)


def _expect(matches: bool, wanted: str, value: object, where: str) -> None:
    if not matches:
        text = repr(value)
        shown = text if len(text) <= 40 else text[:37] + "..."
        raise _Mismatch(f"{where}: expected {wanted}, got {shown}")


def _listed(words: tuple[object, ...]) -> str:
    return ", ".join(map(str, words))


def _check_timeline(timeline: Timeline, where: str) -> None:
    """Lists of one length, and phases that follow each other."""
    events = len(timeline["nbytes"])
    if not events:
        raise _Mismatch(f"{where}: no events")
    lists: Iterator[tuple[str, int]] = (
        (f"by_category.{name}", len(column)) for name, column in timeline["by_category"].items()
    )
    for name, length in [*lists, ("labels", len(timeline["labels"]))]:
        if length != events:
            raise _Mismatch(f"{where}.{name}: {length} entries for {events} events")
    end = 0
    for index, phase in enumerate(timeline["phases"]):
        if not end == phase["start"] <= phase["end"]:
            raise _Mismatch(f"{where}.phases[{index}]: does not follow the phase before it")
        end = phase["end"]
    if end != events:
        raise _Mismatch(f"{where}.phases: end at event {end} of {events}")
