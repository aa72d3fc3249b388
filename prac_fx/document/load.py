"""Reads a report file and checks it against `schema`, so that the rest need not doubt it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypedDict, get_args

import msgspec

from prac_fx.document.schema import (
    ALLOCATORS,
    CATEGORIES,
    SCHEMA,
    Decision,
    Document,
    Gpus,
    StepPhase,
    Timeline,
    Whole,
)
from prac_fx.errors import ReportError

# The words that a field allows. msgspec does not name them when it finds another one.
_WORDS: dict[str, tuple[str, ...]] = {
    "category": CATEGORIES,
    "by_category": CATEGORIES,
    "phase": get_args(StepPhase),
    "decision": get_args(Decision),
    "allocator": ALLOCATORS,
}
_MAX_MESSAGE = 300


class _Versioned(TypedDict):
    """What every version of the schema has."""

    schema: Whole


def load_document(path: Path) -> Document:
    """Read a report that was written with `--format json`.

    Raises:
        ReportError: no such file, not JSON, another schema version, or a field that is missing or
            ill-typed.
    """
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: cannot read: {getattr(error, 'strerror', error)}") from error
    return _checked(lambda kind: msgspec.json.decode(data, type=kind), str(path))


def check_document(data: object, source: str) -> Document:
    """The same data, known to be a document.

    Fields that the schema does not have are left out.

    Args:
        data: parsed JSON.
        source: where it is from; error messages start with it.

    Raises:
        ReportError: another schema version, or a field that is missing, ill-typed or inconsistent.
    """
    return _checked(lambda kind: msgspec.convert(data, kind), source)


def _checked(read: Callable[[Any], Any], source: str) -> Document:
    """The document in some data.

    Args:
        read: makes a value of a type of the data, or raises what msgspec does.
        source: where the data is from.
    """
    try:
        schema = read(_Versioned)["schema"]
        if schema != SCHEMA:
            raise ReportError(
                f"{source}: schema version {schema}, this is prac_fx for version {SCHEMA}: "
                "write the report again, or read it with the prac_fx that wrote it"
            )
        document: Document = read(Document)
    except msgspec.ValidationError as error:
        raise ReportError(f"{source}: not a memory report: {_explained(str(error))}") from error
    except (ValueError, RecursionError) as error:  # JSON that is malformed, not UTF-8, or too deep
        raise ReportError(f"{source}: not a JSON report: {error}") from error
    for contradiction in _contradictions(document):
        raise ReportError(f"{source}: not a memory report: {contradiction}")
    return document


def _explained(message: str) -> str:
    """What msgspec says; where it only says that a word is not allowed, the allowed ones follow."""
    what, at, path = message.rpartition(" - at ")
    words = _WORDS.get(path.strip("`").rpartition(".")[2])
    if what.startswith("Invalid enum value") and words:
        path = f"{path[:_MAX_MESSAGE]}, expected one of {', '.join(words)}"
    return what[:_MAX_MESSAGE] + at + path


def _contradictions(document: Document) -> Iterable[str]:
    """What the types allow although no step is like it, in words."""
    timeline = document["timeline"]
    if (document["peak"] is None) != (timeline is None):
        yield "peak and timeline: only one of them is null"
    if timeline is not None:
        yield from _timeline_contradictions(timeline["before"], "timeline.before")
        yield from _timeline_contradictions(timeline["after"], "timeline.after")
    if "gpus" in document:
        yield from _gpu_contradictions(document["gpus"])


def _gpu_contradictions(gpus: Gpus) -> Iterable[str]:
    """The cheapest GPU that fits is none of those that fit."""
    rows = gpus["rows"]
    before = {gpu["name"] for gpu in rows if gpu["fits_before"]}
    after = {gpu["name"] for gpu in rows if gpu["fits_after"]}
    for key, fitting, cheapest in (
        ("cheapest_before", before, gpus["cheapest_before"]),
        ("cheapest_after", after, gpus["cheapest_after"]),
    ):
        if cheapest not in fitting and (cheapest is not None or fitting):
            yield f"gpus.{key}: it is not one of those that fit"


def _timeline_contradictions(timeline: Timeline, where: str) -> Iterable[str]:
    """Lists of different lengths, categories that do not add up, phases that do not follow."""
    events = len(timeline["nbytes"])
    columns = timeline["by_category"]
    if not events:
        yield f"{where}: no events"
    lengths = {f"by_category.{name}": len(column) for name, column in columns.items()}
    for name, length in {**lengths, "labels": len(timeline["labels"])}.items():
        if length != events:
            yield f"{where}.{name}: {length} entries for {events} events"
    sums = [sum(event) for event in zip(*columns.values(), strict=False)] or [0] * events
    for event, (total, nbytes) in enumerate(zip(sums, timeline["nbytes"], strict=False)):
        if total != nbytes:
            yield f"{where}.by_category: {total} bytes in all at event {event}, which has {nbytes}"
    end = 0
    for index, phase in enumerate(timeline["phases"]):
        if not end == phase["start"] <= phase["end"]:
            yield f"{where}.phases[{index}]: does not follow the phase before it"
        end = phase["end"]
    if end != events:
        yield f"{where}.phases: end at event {end} of {events}"
