"""The report as text, at most 100 columns wide."""

from __future__ import annotations

from typing import Literal, get_args

from prac_fx.document.schema import (
    CATEGORIES,
    Alternative,
    Document,
    MeasuredAlternative,
    Peak,
    RollupRow,
)
from prac_fx.passes.plan_data import REASONS
from prac_fx.report.repeats import LiveRepeat, Repeat, merge_live, merge_repeats
from prac_fx.report.style import Style
from prac_fx.report.text_layout import grid, more_rows, printable, titled, with_details, wrapped
from prac_fx.report.wording import (
    AFTER,
    BEFORE,
    NOTHING,
    STEP_TIME_NOTE,
    change_text,
    cheapest_texts,
    context_text,
    count_text,
    fits_text,
    flops_text,
    graphs_text,
    inputs_text,
    is_listed,
    model_text,
    name_text,
    nbytes_text,
    operator_text,
    options_text,
    position_text,
    price_text,
    ranks_text,
    reason_codes,
    repeated_text,
    reserved_text,
    share_text,
    shortened,
    source_text,
    step_time_text,
    tensor_text,
)

By = Literal["value", "module", "kind", "role"]
GROUPINGS: tuple[By, ...] = get_args(By)

_MAX_LIVE = 5
_MAX_KINDS = 8


def as_table(
    document: Document, *, top: int = 20, by: By = "value", style: Style | None = None
) -> str:
    """The report as text.

    Args:
        document: the report.
        top: how many rows the list of values has at most; 0 for all.
        by: what the list has a row for.
        style: marks headings and changes; plain text without.
    """
    style = style or Style()
    document = printable(document)
    sections = [
        _header(document, style),
        _totals(document, style),
        *_peaks(document, style),
        _alternatives(document, style),
        _measured(document, style),
        _gpus(document, style),
        _advice(document, style),
        _values(document, top, style) if by == "value" else _rollup(document, by, top, style),
        _rollup(document, "kind", _MAX_KINDS, style) if by == "value" else "",
        _reasons(document, style) if by == "value" else "",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _header(document: Document, style: Style) -> str:
    model = document["model"]
    lines = [
        ("model", f"{name_text(model)}, {model_text(model)}"),
        ("", repeated_text(model)),
        ("inputs", inputs_text(document)),
        ("rank", ranks_text(document)),
        ("graphs", graphs_text(document)),
        ("options", options_text(document["options"])),
        (
            "made with",
            f"prac_fx {document['prac_fx']}, torch {document['torch']}, "
            f"device {document['device']}",
        ),
    ]
    return "\n".join(wrapped(f"{name:11}{text}", 11) for name, text in lines if text)


def _totals(document: Document, style: Style) -> str:
    totals, peak = document["totals"], document["peak"]
    pairs = [("saved for backward", totals["saved_before_nbytes"], totals["saved_after_nbytes"])]
    if peak is not None:
        pairs.append(("estimated peak", peak["before"]["nbytes"], peak["after"]["nbytes"]))
    reserved = document.get("reserved")
    if reserved is not None:
        pairs.append(
            (
                "reserved by the CUDA allocator",
                reserved["before"]["nbytes"],
                reserved["after"]["nbytes"],
            )
        )
    rows = [
        (name, nbytes_text(before), nbytes_text(after), style.change(change_text(before, after)))
        for name, before, after in pairs
    ]
    fixed = {
        "state of prac": totals["state_nbytes"],
        "parameters": totals["parameters_nbytes"],
        "gradients": totals["gradients_nbytes"],
        f"optimizer ({totals['optimizer']})": totals["optimizer_nbytes"],
        "buffers": totals["buffers_nbytes"],
        "inputs": totals["inputs_nbytes"],
        "logits": totals["logits_nbytes"],
    }
    for name, nbytes in fixed.items():
        if nbytes is None:
            continue
        before = 0 if name == "state of prac" else nbytes
        rows.append((name, nbytes_text(before), nbytes_text(nbytes), ""))
    table = grid(rows, ("", BEFORE, AFTER, ""), "lrrr")
    note = "" if reserved is None else wrapped(reserved_text(reserved))
    return "\n".join(filter(None, (table, note)))


def _peaks(document: Document, style: Style) -> list[str]:
    peak = document["peak"]
    if peak is None:
        return []
    return [
        _peak(peak["before"], f"peak with {BEFORE}", style),
        _peak(peak["after"], f"peak with {AFTER}", style),
    ]


def _peak(peak: Peak, title: str, style: Style) -> str:
    by_category = [
        (category, sum(entry["nbytes"] for entry in peak["live"] if entry["category"] == category))
        for category in CATEGORIES
    ]
    by_category.sort(key=lambda pair: -pair[1])
    shares = [
        f"{category} {share_text(nbytes, peak['nbytes'])}"
        for category, nbytes in by_category
        if share_text(nbytes, peak["nbytes"]) not in ("", "0%")
    ]
    largest = merge_live(peak["live"])[:_MAX_LIVE]
    lines = [
        wrapped(f"{nbytes_text(peak['nbytes'])} in {position_text(peak)}"),
        wrapped(", ".join(shares)),
        grid(
            [_live_row(entry, peak) for entry in largest],
            ("", "largest", *[""] * 4),
            "rlllrr",
            flexible=1,
        ),
    ]
    return titled(title, "\n".join(filter(None, lines)), style)


def _live_row(repeat: LiveRepeat, peak: Peak) -> tuple[str, ...]:
    return (
        count_text(repeat.count),
        repeat.what,
        repeat.first["category"],
        shortened(tensor_text(repeat.first["shape"], repeat.first["dtype"]), 24),
        nbytes_text(repeat.nbytes),
        share_text(repeat.nbytes, peak["nbytes"]),
    )


def _alternatives(document: Document, style: Style) -> str:
    alternatives = document["alternatives"]
    if not alternatives:
        return ""
    has_batch = document["fits_nbytes"] is not None
    notes = list(dict.fromkeys(way["note"] for way in alternatives if way["note"]))
    rows = []
    for way in alternatives:
        row = [
            way["name"],
            nbytes_text(way["saved_nbytes"]),
            nbytes_text(way["peak_nbytes"]),
            flops_text(way["added_flops"]),
            way["gradient"],
        ]
        batch = way["largest_batch"]
        row += [NOTHING if batch is None else str(batch)] if has_batch else []
        row += [f"[{notes.index(way['note']) + 1}]" if way["note"] else ""] if notes else []
        rows.append(row)
    headers = ["", "saved", "peak", "FLOPs", "gradient"]
    fits = document["fits_nbytes"]
    headers += [f"batch in {nbytes_text(fits)}"] if has_batch else []
    headers += [""] if notes else []
    table = grid(rows, headers, "lrrrl" + "r" * has_batch + "l" * bool(notes))
    lines = [wrapped(f"[{number}] {note}", 4) for number, note in enumerate(notes, start=1)]
    return titled("what would help: the same step in other ways", "\n".join([table, *lines]), style)


def _measured(document: Document, style: Style) -> str:
    rows = [
        _measured_row(way, way["measured"])
        for way in document["alternatives"]
        if way["measured"] is not None
    ]
    if document["measured"] is None or not rows:
        return ""
    headers = ("", "saved", "measured", "peak", "measured", "", "step time")
    title = f"estimated and measured, on {document['measured']['device']}"
    table = grid(rows, headers, "lrrrrrr")
    return titled(title, "\n".join([table, wrapped(STEP_TIME_NOTE)]), style)


def _measured_row(way: Alternative, measured: MeasuredAlternative) -> tuple[str, ...]:
    estimated, peak = way["peak_nbytes"], measured["peak_nbytes"]
    is_known = estimated is not None and peak is not None
    return (
        way["name"],
        nbytes_text(way["saved_nbytes"]),
        nbytes_text(measured["saved_nbytes"]),
        nbytes_text(estimated),
        nbytes_text(peak),
        change_text(estimated or 0, peak or 0) if is_known else "",
        step_time_text(measured),
    )


def _gpus(document: Document, style: Style) -> str:
    gpus = document.get("gpus")
    if gpus is None:
        return ""
    has_prices = any(gpu["price_per_hour"] is not None for gpu in gpus["rows"])
    rows = [
        (
            gpu["name"],
            nbytes_text(gpu["memory_nbytes"]),
            *([price_text(gpu["price_per_hour"])] if has_prices else []),
            fits_text(gpu["fits_before"]),
            fits_text(gpu["fits_after"]),
        )
        for gpu in gpus["rows"]
    ]
    prices = ["an hour"] if has_prices else []
    table = grid(
        rows,
        ("", "memory", *prices, BEFORE, AFTER),
        f"lr{'r' * has_prices}ll",
        flexible=0,
    )
    lines = [table, *map(wrapped, cheapest_texts(gpus)), wrapped(context_text(gpus))]
    return titled("GPUs that the step fits", "\n".join(lines), style)


def _advice(document: Document, style: Style) -> str:
    return titled(
        "advice", "\n".join(wrapped(f"- {sentence}", 2) for sentence in document["advice"]), style
    )


def _values(document: Document, top: int, style: Style) -> str:
    listed = [value for value in document["values"] if is_listed(value)]
    repeats = merge_repeats(listed)
    shown = repeats[: top or None]
    table = grid(
        [_value_row(repeat) for repeat in shown],
        ("", "value", "role", "before", "after", "stored as"),
        "rllrrl",
        flexible=1,
    )
    lines = [with_details(table, map(_value_details, shown), style)]
    left_out = len(document["values"]) - len(listed)
    if left_out:
        lines.append(
            f"inputs and parameters, {left_out} of them, are saved as they are, at no cost"
        )
    return titled(
        "what the step keeps for backward", "\n".join([*lines, *more_rows(repeats, shown)]), style
    )


def _value_row(repeat: Repeat) -> tuple[str, ...]:
    return (
        count_text(len(repeat.values)),
        repeat.module,
        repeat.first["role"],
        nbytes_text(repeat.before_nbytes),
        nbytes_text(repeat.after_nbytes),
        repeat.first["stored_as"],
    )


def _value_details(repeat: Repeat) -> tuple[str, ...]:
    value = repeat.first
    return (
        value["reason"],
        f"{operator_text(value['op'])} {tensor_text(value['shape'], value['dtype'])}",
        source_text(value["file"], value["line"]),
    )


def _rollup(document: Document, by: By, top: int, style: Style) -> str:
    assert by != "value"
    rows = [row for row in document["rollup"][by] if row["before_nbytes"] or row["after_nbytes"]]
    rows.sort(key=lambda row: -row["before_nbytes"])
    shown = rows[: top or None]
    table = grid(
        [_rollup_row(row, style) for row in shown], ("", "values", "before", "after", ""), "lrrrr"
    )
    title = {"module": "by module", "kind": "by kind of layer", "role": "by role"}[by]
    return titled(title, "\n".join([table, *more_rows(rows, shown)]), style) if shown else ""


def _rollup_row(row: RollupRow, style: Style) -> tuple[str, ...]:
    before, after = row["before_nbytes"], row["after_nbytes"]
    return (
        row["name"] or NOTHING,
        str(row["count"]),
        nbytes_text(before),
        nbytes_text(after),
        style.change(change_text(before, after)),
    )


def _reasons(document: Document, style: Style) -> str:
    lines = [wrapped(f"{code}: {REASONS.get(code, '')}", 2) for code in reason_codes(document)]
    return titled("reasons", "\n".join(lines), style)
