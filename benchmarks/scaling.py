"""How costs grow: with depth (compile and report time), sites (overhead) and width (state).

    python -m benchmarks scaling [--size paper]

1. compile   first step of a LLaMA of several depths, plain Inductor and our policies; cold, then
             warm with the caches that the cold run left (`benchmarks.compile_time`)
2. report    `prac_fx.explain` on the same models
3. overhead  what our code adds to every step around the compiled graphs
             (`benchmarks.runtime_overhead`)
4. state     bytes of bases, sampled rows and seeds against the bytes of the parameters, by width
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tabulate import tabulate

import prac_fx
from benchmarks import runtime_overhead
from benchmarks.compile_time import first_steps
from benchmarks.methods import BASELINE, METHODS
from benchmarks.settings import Settings
from benchmarks.shapes import Shape, build, chosen_shapes, with_layers

TITLE = "Compile time, report time, run-time overhead and state against size"

DEPTHS = {"tiny": (1,), "small": (1, 2, 4), "paper": (2, 8, 24)}
WIDTHS = {"tiny": (64,), "small": (128, 256, 512), "paper": (384, 768, 1024, 2048)}
SITES = {"tiny": (10,), "small": (1, 10, 100, 1000), "paper": (1, 10, 100, 1000)}
COMPILED = {
    "tiny": ("inductor", "prac balanced"),
    "small": ("inductor", "prac balanced", "prac max"),
    "paper": ("inductor", "prac balanced", "prac max"),
}
# of the report; the fastest counts
REPEATS = {"tiny": 1, "small": 2, "paper": 2}


def run(settings: Settings) -> Iterator[dict[str, Any]]:
    """All four parts, compile times last, depth by depth until time is up."""
    (shape, *_) = chosen_shapes(settings.size, settings.only)
    overhead = runtime_overhead.measure(SITES[settings.size], settings.device)
    state = [_state(_of_width(shape, width), settings) for width in WIDTHS[settings.size]]
    report = [_report(with_layers(shape, depth), settings) for depth in DEPTHS[settings.size]]
    compile_: list[dict[str, Any]] = []
    figures = {
        "shape": shape.describe(),
        "compile": compile_,
        "report": report,
        "overhead": overhead,
        "state": state,
    }
    yield figures
    for depth in DEPTHS[settings.size]:
        if settings.out_of_time:
            break
        compile_ += _compile_times(with_layers(shape, depth), settings)
        yield figures


def _of_width(shape: Shape, width: int) -> Shape:
    # the proportions of a LLaMA; one layer is enough, the others are like it
    return replace(
        shape,
        hidden=width,
        intermediate=width * 8 // 3 // 16 * 16,
        heads=width // 64,
        layers=1,
    )


def _compile_times(shape: Shape, settings: Settings) -> list[dict[str, Any]]:
    model, inputs = build(shape, settings.device, settings.dtype)
    return [
        {"layers": shape.layers, "method": name, **first_steps(METHODS[name], model, inputs)}
        for name in COMPILED[settings.size]
    ]


def _report(shape: Shape, settings: Settings) -> dict[str, Any]:
    model, inputs = build(shape, settings.device, settings.dtype)
    seconds = []
    for _ in range(REPEATS[settings.size]):
        begin = time.perf_counter()
        report = prac_fx.explain(model, **inputs)
        seconds.append(time.perf_counter() - begin)
    return {
        "layers": shape.layers,
        "seconds": min(seconds),
        "values": len(report.values),
    }


def _state(shape: Shape, settings: Settings) -> dict[str, Any]:
    model, inputs = build(shape, settings.device, settings.dtype)
    report = prac_fx.explain(model, **inputs)
    block = sum(p.nbytes for name, p in model.named_parameters() if ".layers." in name)
    return {"width": shape.hidden, "state_nbytes": report.state_nbytes, "block_nbytes": block}


def body(record: dict[str, Any]) -> str:
    """A table per part."""
    parts = {
        "First step": _compile_table(record["compile"]),
        "`prac_fx.explain`": tabulate(
            [[row["layers"], f"{row['seconds']:.2f}", row["values"]] for row in record["report"]],
            headers=["layers", "seconds", "values"],
            tablefmt="github",
        ),
        "Around the compiled graphs, each step": runtime_overhead.table(record["overhead"]),
        "State": tabulate(
            [
                [
                    row["width"],
                    row["state_nbytes"],
                    f"{row['state_nbytes'] / row['block_nbytes']:.2f}",
                ]
                for row in record["state"]
            ],
            headers=["width", "state of a layer, bytes", "over its parameters"],
            tablefmt="github",
        ),
    }
    texts = [f"## {title}\n\n{table}" for title, table in parts.items()]
    return "\n\n".join([f"LLaMA, {record['shape']} unless said.", *texts]) + "\n"


def _compile_table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "Not run: time was up."
    plain = {row["layers"]: row for row in rows if row["method"] == BASELINE.name}
    lines = [
        [
            row["layers"],
            row["method"],
            *(
                f"{row[key]:.1f} s ({row[key] / plain[row['layers']][key]:.2f})"
                for key in ("cold_s", "warm_s")
            ),
        ]
        for row in rows
    ]
    return tabulate(
        lines,
        headers=["layers", "method", "cold (over inductor)", "warm (over inductor)"],
        tablefmt="github",
        disable_numparse=True,
    )
