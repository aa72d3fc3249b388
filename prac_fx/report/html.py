"""The report as one HTML page that needs no network: template, style and script are in `page/`.

Whatever comes from the user's model is text to it. Jinja escapes it where it stands in markup. The
script only ever sets it as text. The page's own content security policy lets no other script,
style or connection in.
"""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from importlib import resources
from typing import Any, Literal

import jinja2

from prac_fx.document.schema import CATEGORIES, Category, Document, Live, Timeline
from prac_fx.passes.plan_data import REASONS
from prac_fx.report import wording
from prac_fx.report.axes import Sample
from prac_fx.report.chart import Chart, draw_chart
from prac_fx.report.palette import DARK, LIGHT
from prac_fx.report.repeats import Repeat, merge_live, merge_repeats
from prac_fx.report.wording import (
    AFTER,
    BEFORE,
    change_text,
    cheapest_texts,
    context_text,
    is_listed,
    nbytes_text,
    operator_text,
    position_text,
    reason_codes,
    reserved_text,
    tensor_text,
    value_name,
)

MEANINGS: dict[Category, str] = {
    "parameters": "weights of the model",
    "buffers": "its other tensors",
    "inputs": "the batch",
    "gradients": "of the parameters",
    "optimizer": "its state",
    "saved": "kept by forward for backward",
    "state": "bases and sampled rows of prac",
    "unsharded": "layers gathered from other ranks, and gradients before they are reduced",
    "temporary": "used and freed within the step",
    "loss": "logits, and what follows from them",
}

_MAX_LIVE = 8
_VALUE_COLUMNS = (
    ("Value", "text"),
    ("Role", "text"),
    ("Before", "number"),
    ("After", "number"),
    ("Stored as", "text"),
)
_FILTERS = {
    "nbytes": nbytes_text,
    "percent": lambda share: f"{share:.2f}%",
    **{
        name: getattr(wording, name)
        for name in (
            "count_text",
            "fits_text",
            "flops_text",
            "graphs_text",
            "ranks_text",
            "inputs_text",
            "model_text",
            "name_text",
            "options_text",
            "position_text",
            "price_text",
            "ranks_text",
            "repeated_text",
            "share_text",
            "step_time_text",
            "tensor_text",
            "value_text",
        )
    },
}


def as_html(document: Document) -> str:
    """The whole page; it loads nothing and sends nothing."""
    css, script = _palette() + _page_file("page.css"), _page_file("page.js")
    timelines = document["timeline"]
    chart = None if timelines is None else draw_chart(timelines)
    policy = (
        f"default-src 'none'; style-src {_hash(css)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    return _template().render(
        doc=document,
        model=document["model"],
        before=BEFORE,
        after=AFTER,
        policy=policy,
        css=css,
        script=script,
        data=_embedded(_script_data(document, chart)),
        **_summary(document),
        **_step(document, chart),
        **_alternatives(document),
        **_gpus(document),
        **_values(document),
    )


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(_FILTERS)
    return environment.from_string(_page_file("page.html"))


@cache
def _page_file(name: str) -> str:
    return (resources.files("prac_fx.report") / "page" / name).read_text(encoding="utf-8")


def _palette() -> str:
    """The colours of the categories as variables of the style."""
    light, dark = (
        "".join(f"--{category}:{colour};" for category, colour in colours.items())
        for colours in (LIGHT, DARK)
    )
    return f"\n:root{{{light}}}\n@media (prefers-color-scheme: dark){{:root{{{dark}}}}}"


def _hash(text: str) -> str:
    """The name of an inline script or style in a content security policy."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _embedded(data: object) -> str:
    """JSON in which nothing can end the script element that it stands in."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# -- sections --------------------------------------------------------------------------------------


def _summary(document: Document) -> dict[str, Any]:
    totals, peak, timeline = document["totals"], document["peak"], document["timeline"]
    saved = totals["saved_before_nbytes"], totals["saved_after_nbytes"]
    figures = [
        _figure(
            "Saved for backward",
            *saved,
            [_saved_by_category(document, side) for side in ("nbytes_before", "nbytes_after")],
            "What forward leaves for backward, inputs and parameters not counted.",
        ),
    ]
    if peak is not None and timeline is not None:
        peaks = peak["before"]["nbytes"], peak["after"]["nbytes"]
        at_peak = [_categories_at_peak(timeline["before"]), _categories_at_peak(timeline["after"])]
        where = f"With {AFTER} in {position_text(peak['after'])}."
        figures.insert(0, _figure("Estimated peak", *peaks, at_peak, where))
        reserved = document.get("reserved")
        if reserved is not None:  # as bars with gaps: what is held at the peak, and what is free
            pair = reserved["before"]["nbytes"], reserved["after"]["nbytes"]
            note = reserved_text(reserved)
            figures.insert(1, _figure("Reserved by the CUDA allocator", *pair, at_peak, note))
    fixed = [
        ("Parameters", totals["parameters_nbytes"]),
        ("Gradients", totals["gradients_nbytes"]),
        (f"Optimizer, {totals['optimizer']}", totals["optimizer_nbytes"]),
        ("Logits", totals["logits_nbytes"]),
        ("State of prac", totals["state_nbytes"]),
        ("Buffers", totals["buffers_nbytes"]),
        ("Inputs", totals["inputs_nbytes"]),
    ]
    return {
        "figures": figures,
        "fixed": [(name, nbytes) for name, nbytes in fixed if nbytes is not None],
    }


def _figure(
    name: str, before: int, after: int, parts: list[dict[Category, int]], note: str
) -> dict[str, Any]:
    largest = max(before, after, 1)
    bars = []
    for side, nbytes, sizes in zip((BEFORE, AFTER), (before, after), parts, strict=True):
        left, shown = 0.0, []
        for category, size in sizes.items():
            width = 100 * size / largest
            shown.append({"category": category, "nbytes": size, "left": left, "width": width})
            left += width
        bars.append({"name": side, "nbytes": nbytes, "parts": shown})
    return {
        "name": name,
        "before": before,
        "after": after,
        "change": change_text(before, after),
        "bars": bars,
        "note": note,
    }


def _categories_at_peak(timeline: Timeline) -> dict[Category, int]:
    event = max(range(len(timeline["nbytes"])), key=timeline["nbytes"].__getitem__)
    columns = timeline["by_category"]
    known = [name for name in CATEGORIES if name in columns]
    return {name: columns[name][event] for name in known if columns[name][event]}


def _saved_by_category(
    document: Document, side: Literal["nbytes_before", "nbytes_after"]
) -> dict[Category, int]:
    sums: dict[Category, int] = {}
    for value in document["values"]:
        sums[value["category"]] = sums.get(value["category"], 0) + value[side]
    return {name: sums[name] for name in CATEGORIES if sums.get(name)}


def _step(document: Document, chart: Chart | None) -> dict[str, Any]:
    peak, timeline = document["peak"], document["timeline"]
    if chart is None or peak is None or timeline is None:
        return {"chart": None}
    before = _categories_at_peak(timeline["before"])
    after = _categories_at_peak(timeline["after"])
    used = {
        name
        for side in (timeline["before"], timeline["after"])
        for name, column in side["by_category"].items()
        if any(column)
    }
    legend = [
        {
            "category": name,
            "meaning": MEANINGS[name],
            "before": before.get(name, 0),
            "after": after.get(name, 0),
        }
        for name in reversed(CATEGORIES)
        if name in used
    ]
    live = [
        {"name": name, "peak": side, "largest": merge_live(side["live"])[:_MAX_LIVE]}
        for name, side in ((BEFORE, peak["before"]), (AFTER, peak["after"]))
    ]
    return {
        "chart": chart,
        "chart_label": (
            "Bytes allocated during a step. "
            f"{BEFORE} peaks at {nbytes_text(peak['before']['nbytes'])} in "
            f"{peak['before']['phase']}, {AFTER} at {nbytes_text(peak['after']['nbytes'])} in "
            f"{peak['after']['phase']}."
        ),
        "peaks": [
            ("before", chart.before, peak["before"]["nbytes"]),
            ("after", chart.after, peak["after"]["nbytes"]),
        ],
        "legend": legend,
        "live": live,
    }


def _alternatives(document: Document) -> dict[str, Any]:
    ways = document["alternatives"]
    largest = max([way["peak_nbytes"] or 0 for way in ways] or [0]) or 1
    return {
        "alternatives": [
            {"way": way, "width": 100 * (way["peak_nbytes"] or 0) / largest} for way in ways
        ],
        "has_batch": document["fits_nbytes"] is not None,
        "has_measured": document["measured"] is not None,
    }


def _gpus(document: Document) -> dict[str, Any]:
    gpus = document.get("gpus")
    if gpus is None:
        return {"gpus": None}
    return {
        "gpus": gpus,
        "has_prices": any(gpu["price_per_hour"] is not None for gpu in gpus["rows"]),
        "cheapest": cheapest_texts(gpus),
        "context": context_text(gpus),
    }


def _values(document: Document) -> dict[str, Any]:
    listed = [value for value in document["values"] if is_listed(value)]
    merged = merge_repeats(listed)
    each = [Repeat(value["module"] or value_name(value), (value,)) for value in listed]
    each.sort(key=lambda repeat: (-repeat.before_nbytes, -repeat.after_nbytes))
    return {
        "value_columns": _VALUE_COLUMNS,
        "merged": merged,
        "values": each,
        "most": {"merged": _largest(merged), "each": _largest(each)},
        "inputs_count": len(document["values"]) - len(listed),
        "reasons": [(code, REASONS.get(code, "")) for code in reason_codes(document)],
    }


def _largest(rows: list[Repeat]) -> int:
    return max([max(row.before_nbytes, row.after_nbytes) for row in rows] or [0]) or 1


# -- what the script reads -------------------------------------------------------------------------


def _script_data(document: Document, chart: Chart | None) -> dict[str, Any]:
    timeline, peak = document["timeline"], document["peak"]
    of_step: dict[str, Any] = {}
    if chart is not None and timeline is not None and peak is not None:
        of_step = {
            "spans": [(span.name, span.left, span.right) for span in chart.spans],
            "before": _samples(timeline["before"], chart.samples_before),
            "after": _samples(timeline["after"], chart.samples_after),
            "live": {
                "before": _live(peak["before"]["live"]),
                "after": _live(peak["after"]["live"]),
            },
        }
    return {
        "names": [BEFORE, AFTER],
        **of_step,
        "values": [
            (
                value["module"],
                operator_text(value["op"]),
                value["category"],
                value["decision"],
                value["nbytes_before"],
                value["nbytes_after"],
                ", ".join(
                    filter(
                        None,
                        (
                            tensor_text(value["shape"], value["dtype"]),
                            value["stored_as"],
                            value["reason"],
                        ),
                    )
                ),
            )
            for value in document["values"]
            if value["nbytes_before"] or value["nbytes_after"]
        ],
    }


def _samples(timeline: Timeline, samples: tuple[Sample, ...]) -> dict[str, Any]:
    events = [sample.event for sample in samples]
    return {
        "left": [round(sample.left, 5) for sample in samples],
        "events": events,
        "nbytes": [timeline["nbytes"][event] for event in events],
        "labels": [timeline["labels"][event] for event in events],
        "categories": {
            name: [column[event] for event in events]
            for name, column in timeline["by_category"].items()
            if any(column)
        },
    }


def _live(live: list[Live]) -> list[tuple[object, ...]]:
    return [
        (
            entry["module"],
            entry["what"],
            entry["category"],
            "",
            entry["nbytes"],
            entry["nbytes"],
            ", ".join(
                filter(None, (entry["category"], tensor_text(entry["shape"], entry["dtype"])))
            ),
        )
        for entry in live
    ]
